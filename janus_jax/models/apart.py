"""Parameters as decoding reads them: those of each layer apart, in the dtype of computation.

Training has the layers of a side stacked on a first axis, in float32, so that a scan goes over them and the
optimiser sees few arrays.  Decoding goes over all layers for each symbol: out of a stack XLA would copy every
layer at every step, and each call would cast it.  So both are done before, by `engine` once for all calls.

    stacked  decoder/layers/ffn/rise/kernel    [L, D, F] float32
    apart    decoder/layers/1/ffn/rise/kernel  [D, F] in model.dtype

Letters: L layers.
Room: pure core, models.  Imports config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import ModelConfig

Params = dict[str, Any]

SIDES = ("encoder", "decoder")
LAYERS = "layers"
# What is cast wherever it is read, beside the linear maps, which have a kernel.  Norms compute in float32,
# and so do the length table and the output's bias.
TABLES = frozenset({"source_table", "target_table", "output_table", "positions"})


def apart(params: Params, config: ModelConfig) -> Params:
    """The same parameters for decoding; those that are apart already stay as they are.

    Args:
      params: of `Janus`: arrays of numpy (views come back where nothing is cast) or of jax.
      config: of the model.
    """
    dtype = jnp.dtype(config.dtype)
    sides = {side: {**params[side], LAYERS: _taken_apart(params[side][LAYERS])} for side in SIDES}
    found = {**params, **sides}
    return found if dtype == jnp.float32 else _cast(found, dtype)


def are_apart(layers: Mapping[str, Any]) -> bool:
    """Whether the parameters of a side's layers are apart."""
    return "0" in layers


def each_layer(layers: Mapping[str, Any]) -> list[Params]:
    """The parameters of each layer of a side, the lowest first, whichever way they come."""
    taken = _taken_apart(layers)
    return [taken[str(n)] for n in range(len(taken))]


def _taken_apart(layers: Mapping[str, Any]) -> Params:
    if are_apart(layers):
        return dict(layers)
    depth = len(jax.tree.leaves(layers)[0])
    return {str(n): jax.tree.map(lambda stacked, n=n: stacked[n], layers) for n in range(depth)}


def _cast(tree: Mapping[str, Any], dtype: jnp.dtype) -> Params:
    """`tree` with what is cast wherever it is read in `dtype`."""
    linear = "kernel" in tree
    return {
        name: _cast(value, dtype)
        if isinstance(value, Mapping)
        else (value.astype(dtype) if linear or name in TABLES else value)
        for name, value in tree.items()
    }
