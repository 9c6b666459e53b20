"""A decode loop whose sentences leave it when they are done, so that the others go on in a smaller batch.

    rows   128 ............... 64 ......... 32 ............
    open   128  117  98  71    64  50  37   32  18  7  1  0

When no more than half of the rows are open they are gathered, and the loop goes on with half of the
batch; what it writes is put back where it belongs.  All of it is one program: sizes are few and fixed, so
each costs the compilation of one more loop.  A sentence's result depends on no other one, so it is the
same in either batch (but for the rounding of products of another shape).

Letters: B rows of the batch.
Room: pure core.  Knows no model and no kind of decoding; touches no file, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LEAST = 16  # rows of the smallest batch that a larger one shrinks to
SIZES = 3  # most sizes of one loop


@dataclass(frozen=True)
class Rows:
    """A part of the state with one entry a sentence, along `axis`; `kept`: it is read after the loop."""

    axis: int = 0
    kept: bool = True


@dataclass(frozen=True)
class Shared:
    """A part of the state that all sentences share."""


def parts(start: Any, *, model: str, axes: Any, kept: dict[str, int], shared: Sequence[str] = ()) -> Any:
    """The parts of a loop's state; None, so that nobody leaves, where nothing is known of the model.

    Args:
      start: the state, a NamedTuple; a field that is not named below is one entry a row, not read afterwards.
      model: the field that holds the model's own state.
      axes: where B lies in the leaves of that, ints in a prefix of its tree, or None.
      kept: where B lies in the fields that are read after the loop.
      shared: fields without B.
    """
    if axes is None:
        return None

    def part(name: str) -> Any:
        if name == model:
            return jax.tree.map(lambda axis: Rows(axis, kept=False), axes)
        if name in shared:
            return Shared()
        return Rows(kept[name]) if name in kept else Rows(kept=False)

    return type(start)(*map(part, start._fields))


def sizes(rows: Any) -> tuple[Any, ...]:
    """Sizes that a batch of `rows` goes through, itself the first; it alone where `rows` is a symbol."""
    found = [rows]
    while isinstance(rows, int) and len(found) < SIZES and (half := -(-found[-1] // 2)) >= LEAST:
        found.append(half)
    return tuple(found)


def until_done(
    advance: Callable[[Any], Any],
    state: Any,
    done: Callable[[Any], jax.Array],
    parts: Any,
    *,
    go_on: Callable[[Any], jax.Array] | None = None,
) -> Any:
    """Advances `state` until every sentence is done, in ever smaller batches.

    Args:
      advance: state -> state, for any B; must leave what is kept of sentences that are done as it is.
      state: a pytree.
      done: state -> [B] bool.
      parts: a `Rows` or `Shared` for each part of `state` (a prefix of its tree); None: no part is known, and
        nobody leaves.
      go_on: state -> [] bool, what else must hold for another round.

    Returns:
      The state at the end, B rows; parts that are not kept are as they were when rows first left.
    """
    steps = sizes(done(state).shape[0]) if parts is not None else (0,)

    def run(state: Any, steps: tuple[Any, ...]) -> Any:
        least = steps[1] if len(steps) > 1 else 0

        def more(state: Any) -> jax.Array:
            still = jnp.sum(~done(state), dtype=jnp.int32) > least
            return still if go_on is None else still & go_on(state)

        state = lax.while_loop(more, advance, state)
        if len(steps) == 1:
            return state
        order = jnp.argsort(done(state), stable=True)[:least]  # those still open, then others
        fewer = jax.tree.map(lambda part, x: _take(part, x, order), parts, state)
        fewer = run(fewer, steps[1:])
        return jax.tree.map(lambda part, x, y: _put(part, x, y, order), parts, state, fewer)

    return run(state, steps)


def _take(part: Rows | Shared, tree: Any, order: jax.Array) -> Any:
    if isinstance(part, Shared):
        return tree
    return jax.tree.map(lambda x: jnp.take(x, order, axis=part.axis, mode="clip"), tree)


def _put(part: Rows | Shared, tree: Any, fewer: Any, order: jax.Array) -> Any:
    if isinstance(part, Shared):
        return fewer
    if not part.kept:
        return tree
    at = (*(slice(None),) * part.axis, order)
    return jax.tree.map(lambda x, y: x.at[at].set(y, unique_indices=True), tree, fewer)
