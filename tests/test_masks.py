"""Each mask against a double loop over the table of models/streams.py, and against its own drawing."""

import inspect
import re

import jax
import numpy as np
import pytest

from janus_jax import masks

B, T = 6, 9


@pytest.fixture(scope="module")
def batch():
    """(masked, real), [B, T] bool: random sets M, lengths 9 ... 2, one sentence with nothing masked."""
    lengths = np.array([9, 9, 7, 5, 3, 2])
    real = np.arange(T) < lengths[:, None]
    inner = (np.arange(T) > 0) & (np.arange(T) < lengths[:, None] - 1)
    masked = inner & (np.random.default_rng(0).random((B, T)) < 0.6)
    masked[1] = False
    masked[3, 2] = True
    assert masked.sum() > 6
    return masked, real


def looped(rule, masked, real):
    """[B, T, 2T] bool from rule(j, k, stream of k); columns as in the two-stream masks."""
    seen = np.zeros((B, T, 2 * T), bool)
    for b, j, k in np.ndindex(B, T, T):
        visible = real[b, k] and not masked[b, k]
        seen[b, j, k] = visible or (masked[b, k] and rule(j, k, "symbol"))
        seen[b, j, T + k] = masked[b, k] and rule(j, k, "truth")
    return seen


def test_padding_mask_by_loop(batch):
    _, real = batch
    mask = np.asarray(masks.padding_mask(jax.numpy.asarray(real)))
    assert mask.shape == (B, 1, T)
    for b, k in np.ndindex(B, T):
        assert mask[b, 0, k] == real[b, k]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_causal_mask_by_loop(length):
    mask = np.asarray(masks.causal_mask(length))
    assert mask.shape == (1, length, length)
    for i, k in np.ndindex(length, length):
        assert mask[0, i, k] == (k <= i)


def test_true_content_sees_symbols_ahead_and_truths_up_to_itself(batch):
    masked, real = batch
    mask = np.asarray(masks.true_content_mask(*map(jax.numpy.asarray, batch)))
    expected = looped(lambda j, k, of: k > j if of == "symbol" else k <= j, masked, real)
    np.testing.assert_array_equal(mask, expected)


def test_aux_query_sees_symbols_from_itself_on_and_truths_before(batch):
    masked, real = batch
    mask = np.asarray(masks.aux_query_mask(*map(jax.numpy.asarray, batch)))
    expected = looped(lambda j, k, of: k >= j if of == "symbol" else k < j, masked, real)
    np.testing.assert_array_equal(mask, expected)


def test_every_slot_of_m_sees_each_place_exactly_once(batch):
    """As symbol or as truth, never both, never neither: the context is as long as the sentence."""
    _, real = batch
    for make in (masks.true_content_mask, masks.aux_query_mask):
        mask = np.asarray(make(*map(jax.numpy.asarray, batch)))
        times = mask[..., :T].astype(int) + mask[..., T:]
        np.testing.assert_array_equal(times, np.broadcast_to(real[:, None], times.shape))


@pytest.mark.parametrize("own", [False, True], ids=["truth", "aux"])
def test_a_random_order_over_m_by_loop(batch, own):
    """Turns take the place of places, whether the places in M are held by slots or not."""
    masked, real = batch
    rng = np.random.default_rng(3)
    turn = np.zeros((B, T), np.int32)
    for b in range(B):
        turn[b, masked[b]] = rng.permutation(masked[b].sum())
    assert (np.diff(turn[0, masked[0]]) < 0).any()
    make = masks.aux_query_mask if own else masks.true_content_mask
    mask = np.asarray(make(*map(jax.numpy.asarray, batch), None, jax.numpy.asarray(turn)))
    for b, j, k in np.ndindex(B, T, T):
        if masked[b, j]:
            mine, other = turn[b, j], turn[b, k]
            before = other < mine if own else other <= mine
            visible = real[b, k] and not masked[b, k]
            assert mask[b, j, k] == (visible or (masked[b, k] and not before))
            assert mask[b, j, T + k] == (masked[b, k] and before)
    place = np.argsort(~masked, axis=1, kind="stable")[:, : masked.sum(1).max()]
    there = np.take_along_axis(masked, place, axis=1)
    held = np.asarray(make(*jax.tree.map(jax.numpy.asarray, (masked, real, (place, there), turn))))
    for b in range(B):
        at = place[b, there[b]]
        np.testing.assert_array_equal(
            held[b, : len(at)][:, np.append(np.ones(T, bool), there[b])],
            mask[b, at][:, np.append(np.arange(T), T + at)],
        )


@pytest.mark.parametrize("make", [masks.true_content_mask, masks.aux_query_mask])
def test_with_held_places_the_rows_and_columns_of_m_are_the_same(batch, make):
    masked, real = batch
    whole = np.asarray(make(*map(jax.numpy.asarray, batch)))
    capacity = masked.sum(1).max() + 1
    place = np.argsort(~masked, axis=1, kind="stable")[:, :capacity]
    there = np.take_along_axis(masked, place, axis=1)
    found = np.asarray(make(*jax.tree.map(jax.numpy.asarray, (masked, real, (place, there)))))
    assert found.shape == (B, capacity, T + capacity)
    for b in range(B):
        n = masked[b].sum()
        expected = whole[b][place[b, :n]]
        np.testing.assert_array_equal(found[b, :n, :T], expected[:, :T])
        np.testing.assert_array_equal(found[b, :n, T : T + n], expected[:, T + place[b, :n]])
        assert not found[b, :n, T + n :].any()


# The drawings ----------------------------------------------------------------------------------------


def drawing(function):
    """(label, row of booleans) of every line of x and . in a docstring."""
    found = re.findall(r"^ *([a-w] )?([x.](?: +[x.])+)$", inspect.getdoc(function), re.MULTILINE)
    assert found, f"{function.__name__} has lost its drawing"
    return [label.strip() for label, _ in found], np.array(
        [[c == "x" for c in row.split()] for _, row in found]
    )


def test_the_drawing_of_padding_mask():
    real = np.array(
        [[c == "1" for c in re.search(r"real = ([01 ]+):", masks.padding_mask.__doc__)[1].split()]]
    )
    _, drawn = drawing(masks.padding_mask)
    np.testing.assert_array_equal(masks.padding_mask(jax.numpy.asarray(real))[0], drawn)


def test_the_drawing_of_causal_mask():
    length = int(re.search(r"T = (\d+)", masks.causal_mask.__doc__)[1])
    _, drawn = drawing(masks.causal_mask)
    np.testing.assert_array_equal(masks.causal_mask(length)[0], drawn)


@pytest.mark.parametrize("make", [masks.true_content_mask, masks.aux_query_mask])
def test_the_drawings_of_the_two_streams(make):
    sentence = re.search(r"Target `(.*)`", masks.true_content_mask.__doc__)[1].split()
    chosen = {int(j) for j in re.search(r"M = \{(.*)\}", masks.true_content_mask.__doc__)[1].split(",")}
    labels, drawn = drawing(make)
    assert labels == [sentence[j] for j in sorted(chosen)]
    masked = jax.numpy.asarray([[j in chosen for j in range(len(sentence))]])
    mask = np.asarray(make(masked, jax.numpy.ones_like(masked)))[0]
    np.testing.assert_array_equal(mask[sorted(chosen)], drawn)
    header = ["M" if j in chosen else word for j, word in enumerate(sentence)]
    header += [word if j in chosen else "." for j, word in enumerate(sentence)]
    assert " ".join(header) in " ".join(make.__doc__.split())
