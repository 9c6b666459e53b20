"""Encoded splits and the batches made of them: exact, repeatable, the same for any number of hosts."""

import dataclasses
import itertools

import numpy as np
import pytest

from janus_jax import batch as B
from janus_jax.config import BatchConfig, SpecialIds, VocabConfig
from janus_jax.data import encoded, pipeline
from janus_jax.data.lines import DataError
from janus_jax.data.sources import PairSource
from janus_jax.text import Vocabulary

IDS = SpecialIds()
CONFIG = BatchConfig(buckets=(8, 12, 16), tokens=96, workers=2, prefetch=4)


def examples(count=100, longest=16, seed=0):
    """Pairs of random tokens; every token of example i is 10 + i, so that a batch shows whose it is."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("source", "target"):
        lengths = rng.integers(2, longest + 1, count)
        rows = [[IDS.bos, *[10 + i] * (n - 2), IDS.eos] for i, n in enumerate(lengths)]
        arrays[side] = np.array(list(itertools.chain(*rows)), np.int32)
        arrays[f"{side}_offsets"] = np.concatenate([[0], np.cumsum(lengths)])
    return encoded.EncodedSource(arrays, IDS, "made up")


def tokens(data, side, index):
    """One side of one pair, without padding."""
    return data.padded(side, np.array([index]), getattr(data, f"{side}_lengths")[index])[0].tolist()


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    assert len(taken) == count
    return taken


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], name)


# -- the plan ------------------------------------------------------------------------------------------


def test_every_epoch_holds_every_example_once_in_the_same_number_of_batches():
    data = examples()
    plan = pipeline.BatchPlan(data.lengths, CONFIG, seed=3)
    assert plan.shapes == [(12, 8), (8, 12), (6, 16)]
    orders = []
    for epoch in range(3):
        steps = range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
        planned = [plan.batch(step) for step in steps]
        assert {p.epoch for p in planned} == {epoch}
        indices = np.concatenate([p.indices for p in planned])
        assert sorted(indices[indices >= 0]) == list(range(100))
        for p in planned:
            assert (len(p.indices), p.length) in plan.shapes
            real = p.indices[p.indices >= 0]
            below = max([0, *[b for b in CONFIG.buckets if b < p.length]])
            assert ((data.lengths[real] > below) & (data.lengths[real] <= p.length)).all()
        orders.append(indices.tolist())
    assert orders[0] != orders[1] != orders[2]
    other = pipeline.BatchPlan(data.lengths, CONFIG, seed=4)
    assert [other.batch(i).indices.tolist() for i in range(3)] != [
        plan.batch(i).indices.tolist() for i in range(3)
    ]


def test_a_step_needs_no_step_before_it():
    lengths = examples().lengths
    forward = pipeline.BatchPlan(lengths, CONFIG, seed=1)
    backward = pipeline.BatchPlan(lengths, CONFIG, seed=1)
    steps = range(3 * forward.batches_per_epoch)
    expected = [forward.batch(s) for s in steps]
    for step in reversed(steps):
        assert backward.batch(step).indices.tolist() == expected[step].indices.tolist()


def test_overlong_examples_are_listed_and_in_no_batch():
    data = examples(longest=20)
    plan = pipeline.BatchPlan(data.lengths, CONFIG)
    assert plan.overlong.tolist() == np.flatnonzero(data.lengths > 16).tolist() != []
    seen = {int(i) for s in range(plan.batches_per_epoch) for i in plan.batch(s).indices}
    assert seen - {-1} == set(range(100)) - set(plan.overlong.tolist())


def test_rows_are_a_multiple_and_too_small_a_budget_says_so():
    lengths = examples().lengths
    plan, one = pipeline.BatchPlan(lengths, CONFIG, row_multiple=4), pipeline.BatchPlan(lengths, CONFIG)
    assert one.shapes == [(12, 8), (8, 12), (6, 16)]
    assert plan.shapes == [(12, 8), (8, 12), (8, 16)]
    for step in range(2 * one.batches_per_epoch):  # the same examples, and fillers after them
        ours, theirs = plan.batch(step), one.batch(step)
        assert ours.length == theirs.length
        np.testing.assert_array_equal(ours.indices[: len(theirs.indices)], theirs.indices)
        assert (ours.indices[len(theirs.indices) :] == B.FILLER).all()
    with pytest.raises(
        DataError, match=r"batch\.tokens = 96 does not hold 8 rows .* raise it to 128 or more"
    ):
        pipeline.BatchPlan(lengths[lengths > 12], CONFIG, row_multiple=8)


@pytest.mark.parametrize("lengths", [[17, 40], []])
def test_nothing_that_fits(lengths):
    with pytest.raises(DataError, match=rf"none of {len(lengths)} examples fits"):
        pipeline.BatchPlan(np.array(lengths, int), CONFIG)


def test_padding_share():
    plan = pipeline.BatchPlan(np.array([4] * 12 + [12] * 5), CONFIG)
    assert plan.padding() == {8: pytest.approx(0.5), 12: pytest.approx(1 - 60 / 96)}


# -- the batches -----------------------------------------------------------------------------------------


def test_batches_hold_what_the_plan_says():
    data = examples()
    plan = pipeline.BatchPlan(data.lengths, CONFIG, seed=5)
    count = plan.batches_per_epoch + 2
    for step, batch in enumerate(take(pipeline.train_batches(data, CONFIG, seed=5), count)):
        planned = plan.batch(step)
        rows = len(planned.indices)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == B.spec(rows, planned.length)
        np.testing.assert_array_equal(batch["index"], planned.indices)
        for row, index in enumerate(planned.indices):
            for side in ("source", "target"):
                expected = tokens(data, side, index) if index >= 0 else []
                padded = np.pad(expected, (0, planned.length - len(expected)), constant_values=IDS.pad)
                np.testing.assert_array_equal(batch[side][row], padded)
            assert set(batch["target"][row][batch["masked"][row]]) <= {10 + index}  # no BOS, EOS or padding


def test_a_random_order_over_m_comes_with_the_same_batches():
    data, ordered = examples(), dataclasses.replace(CONFIG, order="random")
    plain, batches = (take(pipeline.train_batches(data, c, seed=5), 3) for c in (CONFIG, ordered))
    for batch, other in zip(batches, plain, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == B.spec(*batch["target"].shape, "random")
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name])
        for turn, masked in zip(batch["turn"], batch["masked"], strict=True):
            assert sorted(turn[masked]) == list(range(masked.sum()))


def test_resume_at_any_step():
    data = examples()
    whole = take(pipeline.train_batches(data, CONFIG, seed=7), 40)
    for start in (1, 13, 29):
        assert_same(
            take(pipeline.train_batches(data, CONFIG, seed=7, start_step=start), 10),
            whole[start : start + 10],
        )


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts):
    data = examples()
    whole = take(pipeline.train_batches(data, CONFIG, seed=2, row_multiple=4), 20)
    parts = [
        take(
            pipeline.train_batches(data, CONFIG, seed=2, row_multiple=4, part=((p,), hosts)),
            20,
        )
        for p in range(hosts)
    ]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole)


def test_padded_rows_are_the_pairs_and_fillers_are_padding():
    data = examples()
    wanted = np.array([3, -1, 7, 3])
    for side, lengths in (("source", data.source_lengths), ("target", data.target_lengths)):
        rows = data.padded(side, wanted, 20)
        assert rows.dtype == np.int32
        for row, index in zip(rows, wanted, strict=True):
            tokens = [] if index < 0 else [IDS.bos, *[10 + index] * (lengths[index] - 2), IDS.eos]
            assert row.tolist() == tokens + [IDS.pad] * (20 - len(tokens))
        assert data.padded(side, np.array([-1]), 4).tolist() == [[IDS.pad] * 4]
    longest = int(data.target_lengths.argmax())
    tokens = data.target_lengths[longest]
    with pytest.raises(ValueError, match=f"pair {longest} has {tokens} tokens, more than {tokens - 1}"):
        data.padded("target", np.array([0, longest]), tokens - 1)


def test_masks_belong_to_the_example_and_the_epoch():
    data = examples(30)

    def masks(config, steps, seed=0):
        found = {}
        for batch in take(pipeline.train_batches(data, config, seed=seed), steps):
            for index, masked in zip(batch["index"], batch["masked"], strict=True):
                if index >= 0:
                    found.setdefault(int(index), []).append(masked[: data.target_lengths[index]].tolist())
        return found

    steps = pipeline.BatchPlan(data.lengths, CONFIG).batches_per_epoch
    two = masks(CONFIG, 2 * steps)
    other = BatchConfig(buckets=(16,), tokens=64)  # other batches, the same corruption
    one = masks(other, pipeline.BatchPlan(data.lengths, other).batches_per_epoch)
    assert {i: m[0] for i, m in two.items()} == {i: m[0] for i, m in one.items()}
    assert sum(m[0] != m[1] for m in two.values()) > 15
    assert masks(CONFIG, steps, seed=1) != {i: m[:1] for i, m in two.items()}


def test_a_host_may_have_any_shares():
    data = examples()
    whole = take(pipeline.train_batches(data, CONFIG, seed=2, row_multiple=4), 20)
    some = take(pipeline.train_batches(data, CONFIG, seed=2, row_multiple=4, part=((0, 3), 4)), 20)
    for found, batch in zip(some, whole, strict=True):
        for name, rows in batch.items():
            first, *_, last = np.split(rows, 4)
            np.testing.assert_array_equal(found[name], np.concatenate([first, last]), name)


@pytest.mark.parametrize(
    ("shares", "of", "multiple"), [((2,), 2, 2), ((-1,), 1, 1), ((0,), 2, 3), ((), 2, 2)]
)
def test_shares_that_cannot_be(shares, of, multiple):
    with pytest.raises(ValueError, match="shares"):
        pipeline.train_batches(examples(), CONFIG, seed=0, part=(shares, of), row_multiple=multiple)


def test_evaluation_sees_every_example_once_in_order_of_length_with_the_same_masks():
    data = examples()
    first = list(pipeline.eval_batches(data, CONFIG, row_multiple=2))
    assert_same(first, list(pipeline.eval_batches(data, CONFIG, row_multiple=2)))
    indices = np.concatenate([b["index"] for b in first])
    real = indices[indices >= 0]
    assert sorted(real) == list(range(100))
    assert (np.diff(data.lengths[real]) >= 0).all()
    halves = [list(pipeline.eval_batches(data, CONFIG, row_multiple=2, part=((p,), 2))) for p in (0, 1)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)], first)


# -- encoded splits ----------------------------------------------------------------------------------------


class Records(list):
    def __getitems__(self, keys):
        return [self[k] for k in keys]


TEXT = [
    ("ein Hund rennt", "a dog runs"),
    ("", "empty"),
    ("zwei Katzen schlafen heute", "two cats sleep today"),
    ("der Morgen graut", "the morning dawns grey"),
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.train([side for pair in TEXT for side in pair], VocabConfig(), 290, IDS)


def pairs(text=TEXT, identity="test/de/en"):
    return PairSource(Records({"de": a, "en": b} for a, b in text), ("de", "en"), len(text), identity)


def test_encode_split(tmp_path, vocabulary):
    told = []
    data = encoded.encode_split(pairs(), vocabulary, tmp_path, lambda *args: told.append(args))
    assert len(data) == 4
    assert told[-1] == ("encode", 4, 4)
    for i, (source, target) in enumerate(TEXT):
        assert tokens(data, "source", i) == vocabulary.encode(source)
        assert tokens(data, "target", i) == vocabulary.encode(target)
        assert data.lengths[i] == max(len(vocabulary.encode(source)), len(vocabulary.encode(target)))
    assert tokens(data, "source", 1) == [IDS.bos, IDS.eos]
    told.clear()
    again = encoded.encode_split(pairs(), vocabulary, tmp_path, lambda *args: told.append(args))
    assert told == []  # not encoded a second time
    assert tokens(again, "target", 3) == tokens(data, "target", 3)


def test_the_hash_is_of_the_pairs_and_not_of_where_they_came_from(tmp_path, vocabulary):
    data = encoded.encode_split(pairs(), vocabulary, tmp_path)
    moved = encoded.encode_split(pairs(identity="elsewhere"), vocabulary, tmp_path / "other")
    assert len(data.sha256()) == 64
    assert moved.sha256() == data.sha256()
    shuffled = [TEXT[0], TEXT[1], (TEXT[2][0], TEXT[3][1]), (TEXT[3][0], TEXT[2][1])]
    for other in (shuffled, TEXT[:3], TEXT[::-1]):
        assert encoded.encode_split(pairs(other, str(other)), vocabulary, tmp_path).sha256() != data.sha256()


def test_another_text_or_vocabulary_is_another_copy(tmp_path, vocabulary):
    encoded.encode_split(pairs(), vocabulary, tmp_path)
    other = Vocabulary.train([side for pair in TEXT for side in pair], VocabConfig(), 288, IDS)
    assert encoded.is_encoded(pairs(), vocabulary, tmp_path)
    assert not encoded.is_encoded(pairs(), other, tmp_path)
    assert not encoded.is_encoded(pairs(identity="test/en/de"), vocabulary, tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "info"])
def test_a_damaged_copy_is_made_again(tmp_path, vocabulary, damage):
    expected = tokens(encoded.encode_split(pairs(), vocabulary, tmp_path), "target", 2)
    (folder,) = (tmp_path / "encoded").iterdir()
    file = folder / "target.npy"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-4])
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "info.json").write_text('{"identity"')
    assert not encoded.is_encoded(pairs(), vocabulary, tmp_path)
    assert tokens(encoded.encode_split(pairs(), vocabulary, tmp_path), "target", 2) == expected
    assert encoded.is_encoded(pairs(), vocabulary, tmp_path)
    assert [p.name for p in (tmp_path / "encoded").iterdir()] == [folder.name]  # nothing left lying about
