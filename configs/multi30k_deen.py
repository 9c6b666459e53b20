"""Multi30k, German to English, small enough for two CPU cores.

    janus-jax train --config=configs/multi30k_deen.py --workdir=runs/m30k --config.data.raw_dir=FOLDER

FOLDER holds the raw files (train.de.gz, train.en.gz, val.de.gz, ...); without the key they are downloaded.
Baselines on equal terms: --config.loss.objective=ar (or cmlm, rdrop) and another --workdir.

20 epochs.  launch/tables has five, in the other direction: launch/tables/multi30k.sh --scale=cpu.
"""

import ml_collections

from janus_jax.config import to_config_dict


def get_config() -> ml_collections.ConfigDict:
    config = to_config_dict()
    config.data.name = "multi30k"
    config.data.source, config.data.target = "de", "en"
    config.batch.buckets = (16, 24, 32, 48)
    config.batch.tokens = 1536
    config.batch.workers = 1
    config.model.vocab_size = 4000
    config.model.dim, config.model.ffn, config.model.heads = 128, 256, 4
    config.model.encoder_layers = config.model.decoder_layers = 2
    config.model.max_positions = 96
    config.model.length_gradient = False  # with it no side learns at this learning rate
    config.model.dropout = 0.1
    config.optim.lr = 4e-3
    config.optim.schedule = "polynomial"
    config.optim.warmup_steps = 500
    config.optim.clip_norm = 1.0
    config.train.steps = 9100
    config.train.eval_every = config.train.checkpoint_every = 910
    config.train.dev_sentences = 200
    return config
