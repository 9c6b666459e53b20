"""What the decode loops ask of a row of scores over the vocabulary: what may be said, and what is best.

Letters: R rows, V vocabulary, k how many are wanted.
Room: pure core.  Imports nothing of ours.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def allowed(vocabulary: int, banned: tuple[int, ...], error: type[ValueError]) -> np.ndarray:
    """[V] bool: the symbols that are not banned.

    Raises:
      error: a banned symbol outside the vocabulary.
    """
    if absent := sorted(set(banned) - set(range(vocabulary))):
        raise error(f"banned symbols {absent} lie outside the vocabulary of {vocabulary}")
    return ~np.isin(np.arange(vocabulary), banned)


def best(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best symbol of each row, of equals the lowest, and its score: [.., V] -> int32 [..] and [..].

    `argmax` in two plain reductions, which XLA vectorises on CPU, as it does not `argmax`.
    """
    highest = jnp.max(scores, axis=-1)
    places = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(scores == highest[..., None], places, scores.shape[-1] - 1), axis=-1)
    return first, highest


def top(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best symbols of each row, of equals the lowest first: [R, V] -> scores [R, k], int32 [R, k].

    What `lax.top_k` gives (which puts 0.0 before -0.0); on CPU, where that visits one score after the other,
    in a third to a half of the time where V is large.
    """
    block = 1 << max(0, round(math.log2(scores.shape[-1] / k) / 2))  # as many blocks as scores in k of them
    if scores.shape[-1] < 8 * k * block:
        return _top_k(scores, k=k)
    by_block = functools.partial(_top_by_block, k=k, block=block)
    found: tuple[jax.Array, jax.Array] = jax.lax.platform_dependent(
        scores, cpu=by_block, default=functools.partial(_top_k, k=k)
    )
    return found


def _top_k(scores: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    found = jax.lax.top_k(scores, k)
    return found[0], found[1]


def _top_by_block(scores: jax.Array, *, k: int, block: int) -> tuple[jax.Array, jax.Array]:
    """`top` by the highest score of each block, which XLA vectorises: the k best lie in the k best blocks.

    If one lay elsewhere, each of those blocks would hold a score before it: a higher one, or an equal one of
    a lower symbol.
    """
    rows, vocabulary = scores.shape
    whole, left = vocabulary - vocabulary % block, vocabulary % block
    highest = jnp.max(scores[:, :whole].reshape(rows, -1, block), axis=-1)
    if left:
        highest = jnp.concatenate([highest, jnp.max(scores[:, whole:], axis=-1, keepdims=True)], axis=1)
    chosen = _rising(jax.lax.top_k(highest, k)[1])
    symbols = (chosen[:, :, None] * block + jnp.arange(block, dtype=jnp.int32)).reshape(rows, -1)
    candidates = jnp.take_along_axis(scores, jnp.minimum(symbols, vocabulary - 1), axis=1)
    values, places = jax.lax.top_k(jnp.where(symbols < vocabulary, candidates, -jnp.inf), k)
    return values, jnp.take_along_axis(symbols, places, axis=1)


def _rising(numbers: jax.Array) -> jax.Array:
    """The distinct numbers of each row in rising order, [R, k]: a few of them faster than `sort` on CPU."""
    rank = jnp.sum(numbers[:, None, :] < numbers[:, :, None], axis=-1)
    at = rank[:, :, None] == jnp.arange(numbers.shape[-1])
    return jnp.sum(jnp.where(at, numbers[:, :, None], 0), axis=1)
