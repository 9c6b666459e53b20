"""Multi30k, German to English, at the size that the field reports: for one GPU.

    launch/tables/multi30k.sh --scale=full --raw_dir=FOLDER_OF_RAW_FILES

On NVIDIA GPUs: pip install -e '.[cuda]' first.

4+4 layers, D 128, dropout 0.3: the Transformer-tiny of Wu et al. 2021, which reports 41.0 (BLEU of lower-case
tokens, English to German).
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "multi30k"
    config.data.source, config.data.target = "de", "en"
    config.batch.buckets = (24, 48)  # few, as each is compiled
    config.batch.tokens = 4096
    config.batch.workers = 2
    config.model.vocab_size = 8000
    config.model.dim, config.model.ffn, config.model.heads = 128, 256, 4
    config.model.encoder_layers = config.model.decoder_layers = 4
    config.model.max_positions = 128
    config.model.length_gradient = False
    config.model.dropout = 0.3
    config.model.scan_layers = True
    config.loss.chunk = 4096  # all slots of a batch: each turn of the loop makes the host wait for the GPU
    config.optim.lr = 3e-3
    config.optim.schedule = "polynomial"
    config.optim.warmup_steps = 1000
    config.optim.clip_norm = 1.0
    config.train.steps = 6000
    config.train.eval_every = config.train.checkpoint_every = 600
    return config
