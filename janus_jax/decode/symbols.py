"""What the decode loops ask of a row of scores over the vocabulary: what may be said, and what is best.

Letters: V vocabulary.
Room: pure core.  Imports nothing of ours.
"""

from __future__ import annotations

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
