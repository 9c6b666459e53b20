"""The network.  The only room that knows flax; imports masks, batch and config alone."""

from janus_jax.models.apart import Params, apart
from janus_jax.models.janus import (
    ArCache,
    Janus,
    Memory,
    Outputs,
    Projection,
    empty_cache,
    init_params,
    output_projection,
    project,
)

__all__ = [
    "ArCache",
    "Janus",
    "Memory",
    "Outputs",
    "Params",
    "Projection",
    "apart",
    "empty_cache",
    "init_params",
    "output_projection",
    "project",
]
