"""The slots in M of each row, gathered into a static capacity, and put back where they came from.

Which places are in M differs by row, how many there can be is known beforehand (`batch.capacity`): C slots
hold them, in the order of the sentence, and the rest of the C slots hold nothing.  Each of the two maps is
the transpose of the other, so both directions of both are gathers, never scatters.

Letters: R rows, T target length, C capacity, D model width.
Room: pure core, models.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Members:
    """Which place each of the C slots holds, and which slot each of the T places is held by."""

    place: jax.Array  # [R, C] int32
    there: jax.Array  # [R, C] bool, False for a slot that holds nothing
    slot: jax.Array  # [R, T] int32
    masked: jax.Array  # [R, T] bool


def members(masked: jax.Array, capacity: int) -> Members:
    """Where the places in M, [R, T] bool, are held; `capacity` is C, static."""
    length = masked.shape[1]
    slot = jnp.cumsum(masked, axis=1, dtype=jnp.int32) - 1
    here = masked[:, None, :] & (slot[:, None, :] == jnp.arange(capacity)[:, None])  # [R, C, T], one or none
    place = jnp.sum(here * jnp.arange(length, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    return Members(place, jnp.any(here, axis=-1), slot, masked)


@jax.custom_vjp
def pick(x: jax.Array, m: Members) -> jax.Array:
    """[R, T, D] -> [R, C, D]: what stands at the places in M, then zeros."""
    return jnp.where(m.there[..., None], _take(x, m.place), 0)


@jax.custom_vjp
def put_back(x: jax.Array, m: Members) -> jax.Array:
    """[R, C, D] -> [R, T, D]: each slot at its place, zeros outside M.

    NaN where M is larger than C, so that a loss which reads it cannot pass for one.
    """
    beyond = m.masked & (m.slot >= x.shape[1])
    return jnp.where(beyond[..., None], jnp.nan, _spread(x, m))


def _spread(x: jax.Array, m: Members) -> jax.Array:
    held = m.masked & (m.slot < x.shape[1])
    return jnp.where(held[..., None], _take(x, jnp.clip(m.slot, 0, x.shape[1] - 1)), 0)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """[R, n, D] at the places [R, m] -> [R, m, D]."""
    return jnp.take_along_axis(x, at[..., None], axis=1)


pick.defvjp(lambda x, m: (pick(x, m), m), lambda m, g: (_spread(g, m), None))
put_back.defvjp(lambda x, m: (put_back(x, m), m), lambda m, g: (pick(g, m), None))
