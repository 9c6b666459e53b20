"""Reading a distribution at chosen slots only, some at a time: no [.., V] of all slots is ever there.

Letters: D width of a state, V vocabulary, c slots read at a time.
Room: pure core.  Imports symbols only; knows no model; touches no file, no device, no clock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from janus_jax.decode.symbols import allowed, best, top

Project = Callable[[jax.Array], jax.Array]

AT_ONCE = 2048  # most slots whose logits exist at a time; on a CPU a quarter of all if that is less
AT_LEAST = 16
IN_TURN = "logits_in_turn"  # the name of that loop in a program
OF_ANY = 256  # where the number of rows is a symbol (`janus-jax export`)


def fill(
    project: Project, states: jax.Array, where: jax.Array, banned: tuple[int, ...], error: type[ValueError]
) -> tuple[jax.Array, jax.Array]:
    """The likeliest admitted symbol of the chosen slots, and its log-probability.

    Args:
      project: states [.., D] -> logits [.., V].
      states: [..., D].
      where: [...] bool, the slots to read; logits are computed for these alone, chunk by chunk.
      banned: symbols that are never emitted.
      error: what to raise for a banned symbol outside the vocabulary.

    Returns:
      [...] int32 and [...] float32; 0 where nothing was read.
    """

    def read(logits: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        said = allowed(logits.shape[-1], banned, error)
        found, highest = best(jnp.where(said, logits, -jnp.inf))
        return found, highest - jax.nn.logsumexp(logits, axis=-1)

    symbols, log_probs = _walk(project, states, where, read, (jnp.int32, jnp.float32))
    return symbols, log_probs


def likeliest(
    project: Project,
    states: jax.Array,
    where: jax.Array,
    banned: tuple[int, ...],
    error: type[ValueError],
    *,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest admitted symbols of the chosen slots, best first, of equals the lowest.

    Args as of `fill`.

    Returns:
      [..., count] int32 and their log-probabilities, [..., count] float32; 0 where nothing was read.
    """

    def read(logits: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        said = allowed(logits.shape[-1], banned, error)
        scores, found = top(jnp.where(said, logits, -jnp.inf), count)
        return found, scores - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    symbols, log_probs = _walk(project, states, where, read, (jnp.int32, jnp.float32), (count,))
    return symbols, log_probs


def score(project: Project, states: jax.Array, where: jax.Array, symbols: jax.Array) -> jax.Array:
    """Log-probability of the symbols [...] that stand in the chosen slots: [...] float32; 0 elsewhere.

    Args as of `fill`; softmax is over the whole vocabulary.
    """
    flat = symbols.reshape(-1)

    def read(logits: jax.Array, slots: jax.Array) -> tuple[jax.Array]:
        truth = jnp.take(flat, slots, mode="clip")
        picked = jnp.take_along_axis(logits, truth[:, None], axis=-1)[:, 0]
        return (picked - jax.nn.logsumexp(logits, axis=-1),)

    (log_probs,) = _walk(project, states, where, read, (jnp.float32,))
    return log_probs


def _walk(
    project: Project,
    states: jax.Array,
    where: jax.Array,
    read: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    dtypes: tuple[type, ...],
    each: tuple[int, ...] = (),
) -> tuple[jax.Array, ...]:
    """`read`(logits [c, V] float32, their slots [c]) of the chosen slots, each result laid out as `where`.

    `each` is the shape of what is read of a slot.
    """
    known = states[..., 0].size

    def all_of_them(states: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        flat = states.reshape(-1, states.shape[-1])
        found = read(project(flat).astype(jnp.float32), jnp.arange(known))
        return tuple(_kept(x.reshape(*where.shape, *each), where) for x in found)

    if not isinstance(known, int):  # a symbol
        return _turns(project, states, where, read, dtypes, each, OF_ANY)
    if known <= AT_LEAST:  # one turn would read them all
        return all_of_them(states, where)
    in_turn = functools.partial(_turns, project, read=read, dtypes=dtypes, each=each, size=at_a_time(known))
    if known > AT_ONCE:
        return in_turn(states, where)
    # Elsewhere a few logits more cost nothing, and on a GPU the host would wait at each turn.
    return lax.platform_dependent(states, where, cpu=in_turn, default=all_of_them)


def at_a_time(slots: int) -> int:
    """How many of so many slots are read in one turn, where they are read in turn."""
    return min(AT_ONCE, max(AT_LEAST, -(-slots // 4)))


def _turns(
    project: Project,
    states: jax.Array,
    where: jax.Array,
    read: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    dtypes: tuple[type, ...],
    each: tuple[int, ...],
    size: int,
) -> tuple[jax.Array, ...]:
    """As `_walk`, `size` slots at a time, as often as the chosen ones want."""
    flat = states.reshape(-1, states.shape[-1])
    known = flat.shape[0]
    order = jnp.argsort(~where.reshape(-1), stable=True)  # the chosen slots, then the others
    order = jnp.pad(order, (0, size))
    count = jnp.sum(where, dtype=jnp.int32)
    Carry = tuple[jax.Array, tuple[jax.Array, ...]]

    def step(carry: Carry) -> Carry:
        start, results = carry
        slots = lax.dynamic_slice_in_dim(order, start, size)
        # Beyond the chosen ones: out of range, so that nothing is written.
        slots = jnp.where(start + jnp.arange(size) < count, slots, jnp.iinfo(slots.dtype).max)
        logits = project(jnp.take(flat, slots, axis=0, mode="clip")).astype(jnp.float32)
        found = read(logits, slots)
        return start + size, tuple(
            x.at[slots].set(y, mode="drop") for x, y in zip(results, found, strict=True)
        )

    start = (jnp.int32(0), tuple(jnp.zeros((known, *each), dtype) for dtype in dtypes))
    with jax.named_scope(IN_TURN):
        _, results = lax.while_loop(lambda carry: carry[0] < count, step, start)
    return tuple(x.reshape(*where.shape, *each) for x in results)


def _kept(x: jax.Array, where: jax.Array) -> jax.Array:
    """[..] or [.., n], 0 where `where` [..] is False."""
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), x, 0)
