"""Batches: exact shapes, and masks that follow the reference's statistics."""

import json

import numpy as np
import pytest

from janus_jax import batch as B
from janus_jax.config import BatchConfig, SpecialIds

DRAWS = 20_000


def example(index, source, target):
    target = np.array(target, np.int32)
    return B.Example(index, np.array(source, np.int32), target, target > 10)


def test_spec_is_what_assemble_makes():
    batch = B.assemble([example(7, [1, 9, 2], [1, 11, 12, 2])], rows=2, length=5, pad=0)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == B.spec(2, 5)
    assert batch["source"].tolist() == [[1, 9, 2, 0, 0], [0] * 5]
    assert batch["target"].tolist() == [[1, 11, 12, 2, 0], [0] * 5]
    assert batch["masked"].tolist() == [[False, True, True, False, False], [False] * 5]
    assert batch["index"].tolist() == [7, -1]


def test_assemble_pads_with_the_given_id_and_refuses_what_does_not_fit():
    one = example(3, [0, 9, 2], [0, 11, 2])
    assert B.assemble([one], 2, 4, pad=5)["source"].tolist() == [[0, 9, 2, 5], [5, 5, 5, 5]]
    with pytest.raises(ValueError, match="2 examples do not fit into 1 rows"):
        B.assemble([one, one], 1, 4, 0)
    with pytest.raises(ValueError, match="example 3 has 3 and 3 tokens, more than 2"):
        B.assemble([one], 1, 2, 0)


@pytest.mark.parametrize("n", [3, 4, 6, 12, 25, 50])
@pytest.mark.parametrize(("sampler", "name"), [("span", "whole_word_mask"), ("uniform", "random_noise")])
def test_samplers_follow_the_reference(golden, sampler, name, n):
    # The tolerances are those that the reference numbers state for 20000 draws.
    truth = json.loads((golden / "mask_sampler.json").read_text())[name]["by_length"][str(n)]
    config, ids = BatchConfig(sampler=sampler), SpecialIds()
    target = np.array([ids.bos, *range(10, 8 + n), ids.eos], np.int32)
    rng = np.random.default_rng(n)
    drawn = np.stack([B.corrupt(target, rng, config, ids) for _ in range(DRAWS)])
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
    target = np.array([1, 2][:n], np.int32)
    for seed in range(20):
        masked = B.corrupt(target, np.random.default_rng(seed), BatchConfig(sampler=sampler), SpecialIds())
        assert masked.shape == (n,)
        assert not masked.any()


def test_a_full_budget_masks_a_good_part_and_never_the_ends():
    masked = np.stack([B.mask_span(40, np.random.default_rng(i), 1.0, 3.0) for i in range(200)])
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
            target = np.full(n, ids.mask + 1, np.int32)
            for seed in range(60):
                masked = B.corrupt(target, np.random.default_rng((n, seed)), config, ids)
                most = max(most, int(masked.sum()))
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
    for seed in range(50):
        masked = B.corrupt(target, np.random.default_rng(seed), BatchConfig(mask_rate=0.1), ids)
        assert masked[2]
        assert not masked[0]
        assert not masked[-1]


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
