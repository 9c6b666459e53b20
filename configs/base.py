"""Every key with its default.  They are defined, typed and explained in `janus_jax/config.py`.

An experiment file starts from here and changes what it must:

    from configs import base

    def get_config():
        config = base.get_config()
        config.model.dim = 512
        return config
"""

import ml_collections

from janus_jax import config as janus_config


def get_config() -> ml_collections.ConfigDict:
    return janus_config.to_config_dict()
