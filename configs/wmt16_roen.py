"""WMT16, Romanian to English: wmt16_enro.py the other way round.

    janus-jax prepare --config=configs/wmt16_roen.py --workdir=RUN     # with the extra [prepare]
    janus-jax train   --config=configs/wmt16_roen.py --workdir=RUN

Hardware as there.  Not run here: no score of ours.
"""

import ml_collections

from configs import wmt16_enro


def get_config() -> ml_collections.ConfigDict:
    config = wmt16_enro.get_config()
    config.data.source, config.data.target = "ro", "en"
    return config
