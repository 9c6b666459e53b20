"""Multi30k, German to English, small enough for two CPU cores.

janus-jax train --config=configs/multi30k_deen.py --workdir=runs/m30k --config.data.raw_dir=FOLDER_OF_RAW_FILES
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "multi30k"
    config.data.source, config.data.target = "de", "en"
    config.batch.buckets = (16, 24, 32, 48)
    config.batch.tokens = 1536
    config.model.vocab_size = 4000
    config.model.dim, config.model.ffn, config.model.heads = 128, 256, 4
    config.model.encoder_layers = config.model.decoder_layers = 2
    config.model.max_positions = 96
    config.model.dropout = 0.1
    config.optim.lr = 1e-3
    config.optim.warmup_steps = 1000
    return config
