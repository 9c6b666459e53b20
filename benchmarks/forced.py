"""Decoding programs that write a given number of symbols, so that engines and sizes can be compared.

The real step functions and loops of the package, with the length taken out of the model's hands: no EOS
before the limit (AR), a canvas of the given length (NAR).  Parameters as `models.apart` lays them out.

Letters: B sentences, N beams, S source length, T symbols written (neither BOS nor EOS counted).
Room: beside the package.  Pure.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from janus_jax.config import ModelConfig
from janus_jax.decode import beam, mask_predict
from janus_jax.models import ArCache, Janus, Memory, Params, apart, empty_cache


@functools.partial(jax.jit, static_argnames=("model", "width", "length"))
def autoregressive(
    params: Params, source: jax.Array, *, model: ModelConfig, width: int, length: int
) -> jax.Array:
    """Greedy (`width` = 1) or beam search: [B, S] int32 -> [B, T + 1] int32, EOS at the end.

    T + 1 steps: the last writes the EOS, at no cost, and counts against us where others stop at T.
    """
    params = apart(params, model)
    memory = _apply(model, params, "remember", source)
    slots = length + 1
    options = beam.BeamOptions(
        ids=model.ids, beam=width, max_length=slots, min_length=length, forced_eos="free"
    )

    def step(tokens: jax.Array, index: jax.Array, cache: ArCache) -> Any:
        return _apply(model, params, "ar_step", tokens, index, cache, memory)

    cache = empty_cache(model, source.shape[0], width, slots)
    limits = jnp.full(source.shape[0], slots)
    if width == 1:
        return beam.greedy_search(step, cache, limits, options).tokens[:, 0]
    return beam.beam_search(step, cache, limits, options, reorder=ArCache.reorder).tokens[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "iterations", "length"))
def non_autoregressive(
    params: Params, source: jax.Array, *, model: ModelConfig, iterations: int, length: int
) -> jax.Array:
    """Mask-predict, one candidate, all passes: [B, S] int32 -> [B, T + 1] int32, EOS at the end."""
    params = apart(params, model)
    memory = _apply(model, params, "remember", source)
    options = mask_predict.MaskPredictOptions(
        ids=model.ids, max_length=length + 2, iterations=iterations, early_stop=False
    )
    lengths = jnp.full((source.shape[0], 1), length + 2)

    def look(canvas: jax.Array, memory: Memory) -> jax.Array:
        return _apply(model, params, "nar_pass", canvas, memory)

    def project(states: jax.Array) -> jax.Array:
        return _apply(model, params, "logits", states)

    return mask_predict.mask_predict(look, project, memory, lengths, options).tokens[:, 0, 1:]


def _apply(model: ModelConfig, params: Params, method: str, *args: object) -> Any:
    return Janus(model).apply({"params": params}, *args, method=method)
