"""IWSLT14, English to German: iwslt14_deen.py the other way round.

    janus-jax prepare --config=configs/iwslt14_ende.py --workdir=RUN --config.data.raw_dir=FOLDER
    janus-jax train   --config=configs/iwslt14_ende.py --workdir=RUN

Hardware as there.  Not run here: no score of ours.
"""

import ml_collections

from configs import iwslt14_deen


def get_config() -> ml_collections.ConfigDict:
    config = iwslt14_deen.get_config()
    config.data.source, config.data.target = "en", "de"
    return config
