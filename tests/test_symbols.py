"""The best symbols of a row, and the banned ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.decode.symbols import allowed, best, top


def test_the_best_symbol_is_the_first_of_the_best():
    rows = [[1.0, 3.0, 3.0], [-np.inf, -np.inf, -1.0], [-np.inf] * 3, [0.0, -0.0, -1.0]]
    scores = jnp.asarray(rows, jnp.float32)
    numbers, highest = best(scores)
    assert numbers.tolist() == [1, 2, 0, 0] == jnp.argmax(scores, axis=-1).tolist()
    np.testing.assert_array_equal(highest, scores.max(-1))


@pytest.mark.parametrize(("vocabulary", "k"), [(1000, 10), (997, 10), (640, 1), (81, 2), (20, 20), (7, 3)])
def test_the_best_symbols_are_those_of_top_k(vocabulary, k):
    """Ties fall to the lower symbol, of hidden symbols too, whichever way they are found."""
    rng = np.random.default_rng(vocabulary)
    scores = rng.normal(size=(64, vocabulary)).round(1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:3] = [[-np.inf], [0.0], [2.5]]
    scores[3, :-1] = scores[4, 1:] = scores[5] = -np.inf
    scores[5, vocabulary // 2] = -1e9
    wanted = jax.lax.top_k(scores, k)
    for found in (top(jnp.asarray(scores), k), jax.jit(top, static_argnums=1)(scores, k)):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
        assert found[1].dtype == jnp.int32


def test_where_there_are_many_symbols_blocks_are_searched_on_cpu_alone():
    def program(vocabulary, platform):
        traced = jax.jit(top, static_argnums=1).trace(jnp.zeros((2, vocabulary)), 4)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert program(4096, "cpu").count("chlo.top_k(") == 2
    assert "tensor<2x128x32xf32>" in program(4096, "cpu")
    for few_or_elsewhere in (program(64, "cpu"), program(4096, "cuda")):
        assert few_or_elsewhere.count("chlo.top_k(") == 1


def test_banned_symbols_are_of_the_vocabulary():
    assert allowed(4, (0, 2), ValueError).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"\[4, 9\] lie outside the vocabulary of 4"):
        allowed(4, (9, 1, 4), ValueError)
