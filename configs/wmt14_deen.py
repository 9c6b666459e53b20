"""WMT14, German to English: wmt14_ende.py the other way round.

    janus-jax prepare --config=configs/wmt14_deen.py --workdir=RUN     # with the extra [prepare]
    janus-jax train   --config=configs/wmt14_deen.py --workdir=RUN

Hardware and data as there.  Not run here: no score of ours.
"""

import ml_collections

from configs import wmt14_ende


def get_config() -> ml_collections.ConfigDict:
    config = wmt14_ende.get_config()
    config.data.source, config.data.target = "de", "en"
    return config
