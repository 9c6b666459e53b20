"""Multi30k, German to English, at the size that the field reports: for one GPU.

    launch/tables/multi30k.sh --scale=full --raw_dir=FOLDER_OF_RAW_FILES

4+4 layers, D 256, dropout 0.3, some 100 epochs.  Not run yet: no GPU was at hand.
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "multi30k"
    config.data.source, config.data.target = "de", "en"
    config.batch.buckets = (16, 24, 32, 48, 64)
    config.batch.tokens = 4096
    config.model.vocab_size = 8000
    config.model.dim, config.model.ffn, config.model.heads = 256, 1024, 4
    config.model.encoder_layers = config.model.decoder_layers = 4
    config.model.max_positions = 128
    config.model.length_gradient = False
    config.model.dropout = 0.3
    config.model.dtype = "bfloat16"
    config.loss.chunk = 1024
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 2000
    config.train.steps = 20_000
    return config
