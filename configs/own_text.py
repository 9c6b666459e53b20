"""Your own pairs of sentences, in any two languages; a small model that two CPU cores or one GPU train.

    janus-jax train --config=configs/own_text.py --workdir=runs/mine \\
        --config.data.raw_dir=FOLDER --config.data.source=de --config.data.target=en

FOLDER holds train.de, train.en, val.de, val.en, test.de and test.en (plain or .gz), a sentence a line, both
sides of a pair on the same line.  Without a test set: --config.data.test_split=val.

The model, its learning rate and its dropout are those of configs/multi30k_deen.py: for tens of thousands of
pairs.  With more, raise train.steps first.
"""

import ml_collections

from configs import multi30k_deen


def get_config() -> ml_collections.ConfigDict:
    config = multi30k_deen.get_config()
    config.data.name = "parallel_text"
    config.data.test_split = "test"
    config.batch.buckets = (16, 24, 32, 48, 64, 96, 128)
    config.batch.tokens = 2048
    config.model.max_positions = 192
    return config
