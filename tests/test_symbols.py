"""The best symbol of a row, and the banned ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.decode.symbols import allowed, best


def test_the_best_symbol_is_the_first_of_the_best():
    rows = [[1.0, 3.0, 3.0], [-np.inf, -np.inf, -1.0], [-np.inf] * 3, [0.0, -0.0, -1.0]]
    scores = jnp.asarray(rows, jnp.float32)
    numbers, highest = best(scores)
    assert numbers.tolist() == [1, 2, 0, 0] == jnp.argmax(scores, axis=-1).tolist()
    np.testing.assert_array_equal(highest, scores.max(-1))


def test_banned_symbols_are_of_the_vocabulary():
    assert allowed(4, (0, 2), ValueError).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"\[4, 9\] lie outside the vocabulary of 4"):
        allowed(4, (9, 1, 4), ValueError)
