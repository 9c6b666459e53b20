"""WMT16, English to Romanian, in the size and with the recipe of the released JANUS script.

    janus-jax prepare  --config=configs/wmt16_enro.py --workdir=RUN     # with the extra [prepare]
    janus-jax train    --config=configs/wmt16_enro.py --workdir=RUN

wmt14_ende.py but for the data, dropout 0.3 and 4 x 8192 slots an update, on any number of devices; meant
for 4 GPUs, or a TPU slice of 4 chips or more.  Not run here: no score of ours.
"""

import ml_collections

from configs import wmt14_ende


def get_config() -> ml_collections.ConfigDict:
    config = wmt14_ende.get_config()
    config.data.name = "wmt16"
    config.data.source, config.data.target = "en", "ro"
    config.batch.tokens = 4 * 8192
    config.model.dropout = 0.3
    config.train.eval_every = config.train.checkpoint_every = 2000
    return config
