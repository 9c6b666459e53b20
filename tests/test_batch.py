"""Batches: exact shapes, and masks that follow the reference's statistics."""

import json

import numpy as np
import pytest

from janus_jax import batch as B
from janus_jax.config import BatchConfig, SpecialIds

DRAWS = 20_000


def targets(n, rows, ids=None):
    """[rows, n] BOS, ordinary tokens, EOS."""
    ids = ids or SpecialIds()
    whole = np.array([ids.bos, *range(10, 8 + n), ids.eos][:n], np.int32)
    return np.tile(whole, (rows, 1))


def seeds(rows, n=0):
    return [np.random.default_rng((n, i)) for i in range(rows)]


def test_spec_is_what_corrupted_makes():
    index, rngs = np.array([7, B.FILLER], np.int32), [B.example_rng(0, 0, 7), None]
    rows = np.array([[1, 9, 11, 12, 2, 0], [0] * 6], np.int32)
    for order in ("sentence", "random"):
        batch = B.corrupted(index, rows, rows, rngs, BatchConfig(order=order), SpecialIds())
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == B.spec(2, 6, order)
        assert batch["masked"][0].any()
        assert not batch["masked"][1].any()
        assert batch["source"] is batch["target"] is rows
        assert batch["index"].tolist() == [7, -1]


def test_a_random_order_leaves_everything_else_as_it_is():
    ids, target = SpecialIds(), targets(22, 4)
    target[3] = ids.pad
    index = np.array([3, 4, 3, B.FILLER], np.int32)
    made = {}
    for order in ("sentence", "random"):
        rngs = [None if i == B.FILLER else B.example_rng(0, 0, int(i)) for i in index]
        made[order] = B.corrupted(index, target, target, rngs, BatchConfig(order=order), ids)
    plain, batch = made["sentence"], made["random"]
    turn = batch.pop("turn")
    assert batch.keys() == plain.keys() == B.spec(4, 24).keys()
    for name in plain:
        np.testing.assert_array_equal(batch[name], plain[name])
    for row in range(4):
        of_m = turn[row, batch["masked"][row]]
        assert sorted(of_m) == list(range(len(of_m)))
        assert not turn[row, ~batch["masked"][row]].any()
    assert (np.diff(turn[0, batch["masked"][0]]) < 0).any()
    np.testing.assert_array_equal(turn[0], turn[2])
    assert (turn[0] != turn[1]).any()


@pytest.mark.parametrize("sampler", ["span", "uniform"])
def test_a_row_depends_on_no_other_row_nor_on_the_padding(sampler):
    """So M is the same in every batch, bucket and on every host."""
    config, ids = BatchConfig(sampler=sampler, order="random"), SpecialIds()
    lengths = [2, 3, 4, 9, 17, 24]
    together = np.full((len(lengths), 40), ids.pad, np.int32)
    for row, n in zip(together, lengths, strict=True):
        row[:n] = targets(n, 1)
    index = np.arange(len(lengths), dtype=np.int32)
    rngs = [B.example_rng(0, 5, i) for i in range(len(lengths))]
    batch = B.corrupted(index, together, together, rngs, config, ids)
    assert batch["masked"].any(axis=1).sum() >= 4
    for i, n in enumerate(lengths):
        one = targets(n, 1)
        alone = B.corrupted(index[i : i + 1], one, one, [B.example_rng(0, 5, i)], config, ids)
        for name in ("target", "masked", "turn"):
            np.testing.assert_array_equal(batch[name][i, :n], alone[name][0])
            assert name == "target" or not batch[name][i, n:].any()


def test_every_order_over_m_is_drawn_equally_often():
    rng, masked = np.random.default_rng(0), np.array([False, True, True, False, True, False])
    turns = B.draw_turns(np.tile(masked, (1200, 1)), [rng] * 1200)
    drawn = [tuple(row[masked]) for row in turns]
    counts = [drawn.count(one) for one in set(drawn)]
    assert len(counts) == 6
    assert min(counts) > 150


@pytest.mark.parametrize("n", [3, 4, 6, 12, 25, 50])
@pytest.mark.parametrize(("sampler", "name"), [("span", "whole_word_mask"), ("uniform", "random_noise")])
def test_samplers_follow_the_reference(golden, sampler, name, n):
    # The tolerances are those that the reference numbers state for 20000 draws.
    truth = json.loads((golden / "mask_sampler.json").read_text())[name]["by_length"][str(n)]
    config, ids = BatchConfig(sampler=sampler), SpecialIds()
    drawn = B.corrupt(targets(n, DRAWS), [np.random.default_rng(n)] * DRAWS, config, ids)
    counts = drawn.sum(1)
    std = truth["num_masked_std"]
    assert abs(counts.mean() - truth["num_masked_mean"]) <= 4 * np.sqrt(2) * std / np.sqrt(DRAWS)
    np.testing.assert_allclose(drawn.mean(0), truth["position_freq"], atol=0.025)
    histogram = np.bincount(counts, minlength=n + 1) / DRAWS
    reference = np.array(truth["num_masked_hist"]) / DRAWS
    assert abs(histogram - reference).sum() / 2 <= (0.015 if sampler == "span" else 0.03)
    runs = np.diff(drawn.astype(int), axis=1, prepend=0) == 1
    assert runs.sum(1).mean() == pytest.approx(truth["runs_per_sentence_mean"], abs=0.05)


def test_span_lengths_are_the_references(golden):
    listed = json.loads((golden / "mask_sampler.json").read_text())["whole_word_mask"]["span_length_probs"]
    np.testing.assert_allclose(np.diff(B._span_lengths(2.0), prepend=0), listed, atol=1e-7)


def test_span_table_of_a_large_mean_is_not_cut_at_its_beginning():
    lengths = np.diff(B._span_lengths(30.0), prepend=0)
    assert lengths @ np.arange(len(lengths)) == pytest.approx(30, abs=0.01)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("sampler", ["span", "uniform"])
def test_targets_without_inner_positions_stay_unmasked(sampler, n):
    masked = B.corrupt(targets(n, 20), seeds(20), BatchConfig(sampler=sampler), SpecialIds())
    assert masked.shape == (20, n)
    assert not masked.any()


def test_a_full_budget_masks_a_good_part_and_never_the_ends():
    masked = B.mask_span(np.full(200, 40), 40, seeds(200), 1.0, 3.0)
    assert not masked[:, [0, -1]].any()
    assert 0.5 < masked[:, 1:-1].mean() < 0.9


@pytest.mark.parametrize(("rate", "mean"), [(0.7, 2.0), (0.3, 3.0), (0.1, 0.2), (0.9, 8.0)])
def test_no_target_of_a_bucket_has_more_masked_than_its_capacity(rate, mean):
    """And some target has as many, or nearly: the bound is not a loose one."""
    config, ids = BatchConfig(mask_rate=rate, span_mean=mean), SpecialIds()
    for length in (16, 24, 48):
        capacity = B.capacity(length, config, ids)
        most = 0
        for n in range(length + 1):
            target = np.full((60, n), ids.mask + 1, np.int32)
            masked = B.corrupt(target, seeds(60, n), config, ids)
            most = max(most, int(masked.sum(axis=1).max()))
        assert most <= (length - 2 if capacity is None else capacity)
        if capacity is not None and mean < 3:
            assert most > 0.6 * capacity


def test_where_all_inner_places_may_be_masked_there_is_no_capacity():
    ids = SpecialIds()
    assert B.capacity(24, BatchConfig(), ids) == 17
    assert B.capacity(24, BatchConfig(sampler="uniform"), ids) is None
    assert B.capacity(24, BatchConfig(mask_rate=0.95), ids) is None
    assert B.capacity(8, BatchConfig(), ids) is None
    assert B.capacity(24, BatchConfig(), SpecialIds(mask=3)) is None  # a text may hold any number of unk


def test_a_real_mask_symbol_counts_as_masked_but_not_at_the_ends():
    ids = SpecialIds(pad=1, bos=0, eos=2, unk=3, mask=3)
    target = np.array([3, 9, 3, 9, 9, 9, 9, 9, 3], np.int32)
    masked = B.corrupt(np.tile(target, (50, 1)), seeds(50), BatchConfig(mask_rate=0.1), ids)
    assert masked[:, 2].all()
    assert not masked[:, [0, -1]].any()


def test_example_rng_is_a_function_of_its_arguments_alone():
    draws = {
        args: tuple(B.example_rng(*args).random(4))
        for args in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, B.EVAL_STREAM)]
    }
    assert len(set(draws.values())) == len(draws)
    for args, values in draws.items():
        assert tuple(B.example_rng(*args).random(4)) == values


@pytest.mark.parametrize("args", [(-1, 0, 0), (0, 1 << 24, 0), (0, 0, -1), (1 << 56, 0, 0)])
def test_example_rng_refuses_arguments_that_would_collide(args):
    with pytest.raises(ValueError, match="out of range"):
        B.example_rng(*args)
