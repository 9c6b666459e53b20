"""Sentences that are done leave their batch; the results are those of the whole batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.decode import leaving
from janus_jax.decode.leaving import Rows, Shared, parts, until_done


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, (1,)), (16, (16,)), (31, (31, 16)), (64, (64, 32, 16)), (65, (65, 33, 17)), (512, (512, 256, 128))],
)
def test_sizes(rows, sizes):
    assert leaving.sizes(rows) == sizes


def test_a_batch_of_any_size_stays_together():
    (rows,) = jax.export.symbolic_shape("rows")
    assert leaving.sizes(rows) == (rows,)


def count_down(counts, *, leave=True, most=None):
    """Each row lasts counts[b] rounds and writes its number of the round; -> (result, rows of each round)."""
    sizes = []

    def advance(state):
        rows = len(state["left"])
        jax.debug.callback(lambda: sizes.append(rows))
        is_open = state["left"] > 0
        trace = state["trace"].at[state["round"]].set(jnp.where(is_open, state["name"], -1))
        return {
            "round": state["round"] + 1,
            "name": state["name"],
            "left": state["left"] - is_open,
            "sum": state["sum"] + jnp.where(is_open, state["name"], 0),
            "trace": trace,
        }

    counts = jnp.asarray(counts)
    start = {
        "round": jnp.int32(0),
        "name": 1 + jnp.arange(len(counts)),
        "left": counts,
        "sum": jnp.zeros_like(counts),
        "trace": jnp.full((8, len(counts)), -1),
    }
    within = Rows(kept=False)
    known = {"round": Shared(), "name": within, "left": within, "sum": Rows(), "trace": Rows(1)}

    @jax.jit
    def run(start):
        return until_done(
            advance,
            start,
            lambda state: state["left"] == 0,
            known if leave else None,
            go_on=None if most is None else lambda state: state["round"] < most,
        )

    result = jax.tree.map(np.asarray, run(start))
    jax.effects_barrier()
    return result, sizes


@pytest.mark.parametrize("most", [None, 4])
def test_what_is_kept_is_that_of_the_whole_batch(most):
    counts = np.random.default_rng(0).integers(0, 8, size=70)
    result, sizes = count_down(counts, most=most)
    whole, all_sizes = count_down(counts, leave=False, most=most)
    for name in ("sum", "trace", "round"):
        np.testing.assert_array_equal(result[name], whole[name], err_msg=name)
    rounds = counts if most is None else np.minimum(counts, most)
    np.testing.assert_array_equal(result["sum"], rounds * np.arange(1, 71))
    assert all_sizes == [70] * rounds.max()
    still = [int((counts > r).sum()) for r in range(rounds.max())]
    assert sizes == [70 if n > 35 else 35 if n > 18 else 18 for n in still]


def test_nothing_to_do():
    result, sizes = count_down([0] * 40)
    assert sizes == []
    assert not result["sum"].any()


def test_no_round_is_made_for_rows_that_are_done():
    _, sizes = count_down([3] * 40)
    assert sizes == [40] * 3


class State(NamedTuple):
    place: int
    done: int
    text: int
    cache: tuple


def test_parts_of_a_state():
    start = State(0, 0, 0, (0, {"mask": 0}))
    within = Rows(kept=False)
    axes = (1, {"mask": 0})
    assert parts(start, model="cache", axes=axes, kept={"text": 1}, shared=["place"]) == State(
        Shared(), within, Rows(1), (Rows(1, kept=False), {"mask": within})
    )
    assert parts(start, model="cache", axes=None, kept={"text": 1}) is None
