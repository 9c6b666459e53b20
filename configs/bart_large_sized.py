"""A JANUS as large as BART-large, to plan with: what it takes on a pod, before anybody trains it.

    janus-jax compile --config=configs/bart_large_sized.py --topology=v5e:4x8 --config.mesh.fsdp=8

12+12 layers of width 1024, 50k symbols, blocks of 512 tokens, half a million of them per update, bfloat16;
layers are scanned and recomputed in the backward pass.  Parameters and optimiser state are cut over fsdp.
docs/scaling.md has its tables.  Nothing was trained with it: no score, no hours.
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.batch.buckets = (512,)
    config.batch.tokens = 1024 * 512
    config.batch.device_tokens = 16 * 512
    config.model.vocab_size = 50_304
    config.model.dim, config.model.ffn, config.model.heads = 1024, 4096, 16
    config.model.encoder_layers = config.model.decoder_layers = 12
    config.model.max_positions = 1024
    config.model.max_length = 1023
    config.model.activation = "gelu"
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = True
    config.loss.chunk = 512
    config.optim.lr = 1e-4
    config.optim.schedule = "polynomial"
    config.optim.warmup_steps = 10_000
    config.optim.weight_decay = 0.01
    config.train.microbatches = 0
    config.train.steps = 500_000
    config.mesh.fsdp = 8
    return config
