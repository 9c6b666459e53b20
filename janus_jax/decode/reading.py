"""Reading a distribution at chosen slots, some at a time: no [.., V] of more than AT_ONCE is ever there.

Letters: D width of a state, V vocabulary, c slots read at a time.
Room: pure core.  Imports symbols only; knows no model; touches no file, no device, no clock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

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
      where: [...] bool, the slots to read.  On a CPU, and where there are more than AT_ONCE slots, logits are
        computed for these alone.
      banned: symbols that are never emitted.
      error: what to raise for a banned symbol outside the vocabulary.

    Returns:
      [...] int32 and [...] float32; 0 where nothing was read.
    """

    def read(logits: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        said = allowed(logits.shape[-1], banned, error)
        found, highest = best(jnp.where(said, logits, -jnp.inf))
        return found, highest - jax.nn.logsumexp(logits, axis=-1)

    symbols, log_probs = _Reading(project, read, (jnp.int32, jnp.float32))(states, where)
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

    symbols, log_probs = _Reading(project, read, (jnp.int32, jnp.float32), (count,))(states, where)
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

    (log_probs,) = _Reading(project, read, (jnp.float32,))(states, where)
    return log_probs


def at_a_time(slots: int) -> int:
    """How many of so many slots are read in one turn, where they are read in turn."""
    return min(AT_ONCE, max(AT_LEAST, -(-slots // 4)))


@dataclass(frozen=True)
class _Reading:
    """What is read off the logits of a slot, and where they come from."""

    project: Project
    read: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]  # of logits [c, V] float32, their slots [c]
    dtypes: tuple[type, ...]  # of what is read
    each: tuple[int, ...] = ()  # the shape of what is read of a slot

    def __call__(self, states: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        """What is read of the chosen slots, each result laid out as `where`."""
        known = states[..., 0].size
        if not isinstance(known, int):  # a symbol
            return self.in_turn(OF_ANY, states, where)
        if known <= AT_LEAST:  # one turn would read them all
            return self.at_once(states, where)
        in_turn = functools.partial(self.in_turn, at_a_time(known))
        if known > AT_ONCE:
            return in_turn(states, where)
        # Elsewhere a few logits more cost nothing, and on a GPU the host would wait at each turn.
        return lax.platform_dependent(states, where, cpu=in_turn, default=self.at_once)

    def at_once(self, states: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        """All slots, whether chosen or not."""
        flat = states.reshape(-1, states.shape[-1])
        found = self.read(self.project(flat).astype(jnp.float32), jnp.arange(flat.shape[0]))
        return tuple(_kept(x.reshape(*where.shape, *self.each), where) for x in found)

    def in_turn(self, size: int, states: jax.Array, where: jax.Array) -> tuple[jax.Array, ...]:
        """The chosen slots alone, `size` at a time."""
        flat = states.reshape(-1, states.shape[-1])
        order = jnp.argsort(~where.reshape(-1), stable=True)  # the chosen slots, then the others
        order = jnp.pad(order, (0, size))
        count = jnp.sum(where, dtype=jnp.int32)
        Carry = tuple[jax.Array, tuple[jax.Array, ...]]

        def step(carry: Carry) -> Carry:
            start, results = carry
            slots = lax.dynamic_slice_in_dim(order, start, size)
            # Beyond the chosen ones: out of range, so that nothing is written.
            slots = jnp.where(start + jnp.arange(size) < count, slots, jnp.iinfo(slots.dtype).max)
            logits = self.project(jnp.take(flat, slots, axis=0, mode="clip")).astype(jnp.float32)
            found = self.read(logits, slots)
            return start + size, tuple(
                x.at[slots].set(y, mode="drop") for x, y in zip(results, found, strict=True)
            )

        blank = tuple(jnp.zeros((flat.shape[0], *self.each), dtype) for dtype in self.dtypes)
        with jax.named_scope(IN_TURN):
            _, results = lax.while_loop(lambda carry: carry[0] < count, step, (jnp.int32(0), blank))
        return tuple(x.reshape(*where.shape, *self.each) for x in results)


def _kept(x: jax.Array, where: jax.Array) -> jax.Array:
    """[..] or [.., n], 0 where `where` [..] is False."""
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), x, 0)
