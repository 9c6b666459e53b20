"""Mask-predict against a plain NumPy version of its rules, and against the reference's stored histories."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.config import SpecialIds
from janus_jax.decode.mask_predict import (
    MaskPredictOptions,
    MaskPredictOptionsError,
    blank_canvas,
    candidate_lengths,
    choose,
    least_certain,
    lengths_around,
    mask_predict,
    mean_log_prob,
)

IDS = SpecialIds()
FAIRSEQ = SpecialIds(pad=1, bos=0, eos=2, unk=3, mask=3, start=0)
BANNED = (IDS.pad, IDS.bos, IDS.eos, IDS.mask)
PRIME, VOCABULARY, T = 499, 14, 12
TABLE = np.random.default_rng(0).normal(scale=2.0, size=(PRIME, VOCABULARY)).astype(np.float32)
LENGTHS = np.array([[11, 12, 10], [2, 3, 4], [3, 4, 5], [7, 8, 9], [6, 6, 2]], np.int32)


def slot_codes(tokens, xp):
    """[..., T] a number for each slot that depends on all symbols of its row, but not on padding."""
    place = xp.arange(tokens.shape[-1])
    sums = xp.sum(xp.where(tokens == IDS.pad, 0, (tokens + 3) * (place * place + 5)), axis=-1)
    return (sums[..., None] * 7 + place * 13) % PRIME


def fill(tokens, _):
    return jnp.asarray(TABLE)[slot_codes(tokens, jnp)]


@functools.partial(jax.jit, static_argnames=("options", "fill"))
def compiled(lengths, options, fill):
    return mask_predict(fill, lambda logits: logits, None, lengths, options)


def run(lengths=LENGTHS, fill=fill, **options):
    o = MaskPredictOptions(IDS, **{"max_length": T, "banned": BANNED, "history": True, **options})
    return jax.tree.map(np.asarray, compiled(jnp.asarray(lengths), o, fill))


def plain_mask_predict(n, passes, *, banned, early_stop):
    """One row, as the rules read; returns the (filled tokens, log-probs, remasked) of each pass made."""
    canvas = np.full(T, IDS.pad)
    canvas[:n] = [IDS.bos] + [IDS.mask] * (n - 2) + [IDS.eos]
    log_probs, before, made = np.zeros(T), canvas.copy(), []
    for s in range(passes):
        logits = TABLE[slot_codes(canvas, np)].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_p[:, list(banned)] = -np.inf
        filled = canvas.copy()
        for t in range(T):
            if canvas[t] == IDS.mask:
                filled[t] = log_p[t].argmax()
                log_probs[t] = log_p[t].max()
        count = int((n - 2) * (passes - 1 - s) / passes + 1e-9)
        worst = sorted(range(1, n - 1), key=lambda t: (log_probs[t], t))[:count]
        remasked = np.zeros(T, bool)
        remasked[worst] = True
        canvas = np.where(remasked, IDS.mask, filled)
        made.append((filled, log_probs.copy(), remasked))
        if (early_stop and (filled == before).all()) or (canvas != IDS.mask).all():
            break
        before = filled
    return made


@pytest.mark.parametrize(
    ("passes", "early_stop", "banned"),
    [
        (1, True, BANNED),
        (2, False, BANNED),
        (4, True, (IDS.pad,)),
        (10, False, (IDS.pad,)),
        (10, True, BANNED),
        (23, True, BANNED),
    ],
)
def test_every_pass_does_what_plain_numpy_does(passes, early_stop, banned):
    result = run(iterations=passes, early_stop=early_stop, banned=banned)
    history = result.history
    assert history.tokens.shape == (passes, *LENGTHS.shape, T)
    for b, j in np.ndindex(LENGTHS.shape):
        n = LENGTHS[b, j]
        made = plain_mask_predict(n, passes, banned=banned, early_stop=early_stop)
        assert result.passes[b, j] == len(made)
        for s in range(passes):
            filled, log_probs, remasked = made[min(s, len(made) - 1)]
            np.testing.assert_array_equal(history.tokens[s, b, j], filled)
            np.testing.assert_allclose(history.log_probs[s, b, j], log_probs, atol=1e-5)
            if s >= len(made) - 1:
                assert not history.remasked[s, b, j].any()
            else:
                np.testing.assert_array_equal(history.remasked[s, b, j], remasked)
        np.testing.assert_array_equal(result.tokens[b, j], made[-1][0])
        if n > 2:
            np.testing.assert_allclose(result.scores[b, j], made[-1][1].sum() / (n - 2), atol=1e-5)


def test_early_stop_saves_passes_and_forced_runs_make_them_all():
    early, forced = run(iterations=23), run(iterations=23, early_stop=False)
    masked_again = [[[(n - 2) * (22 - s) // 23 for s in range(23)] for n in row] for row in LENGTHS.tolist()]
    assert forced.passes.tolist() == [[counts.index(0) + 1 for counts in row] for row in masked_again]
    assert early.passes.min() == 1
    assert len(np.unique(early.passes)) > 2


def test_a_canvas_without_slots_or_with_one():
    result = run([[2, 3]], iterations=6)
    assert result.passes.tolist() == [[1, 1]]
    assert result.tokens[0, 0].tolist() == [IDS.bos, IDS.eos] + [IDS.pad] * (T - 2)
    assert result.tokens[0, 1, [0, 2]].tolist() == [IDS.bos, IDS.eos]
    assert result.tokens[0, 1, 1] not in BANNED


@pytest.mark.parametrize(("iterations", "calls"), [(1, 1), (4, 4)])
def test_the_model_is_called_once_a_pass(iterations, calls):
    seen = []

    def counted(tokens, _):
        jax.debug.callback(lambda: seen.append(1))
        return fill(tokens, None)

    run(fill=counted, iterations=iterations, early_stop=False)
    jax.effects_barrier()
    assert len(seen) == calls


def test_the_loop_ends_when_all_rows_have_stopped():
    seen = []

    def counted(tokens, _):
        jax.debug.callback(lambda: seen.append(1))
        return fill(tokens, None)

    result = run(LENGTHS[1:3], fill=counted, iterations=50)
    jax.effects_barrier()
    assert len(seen) == result.passes.max() < 50


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_row_does_not_see_its_batch_nor_the_padding(early_stop):
    whole = run(iterations=8, early_stop=early_stop)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = run(LENGTHS[order], iterations=8, early_stop=early_stop)
    padded = run(iterations=8, early_stop=early_stop, max_length=T + 16)
    alone = [run(LENGTHS[b : b + 1], iterations=8, early_stop=early_stop) for b in range(len(LENGTHS))]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # softmax rounding
    for name in ("tokens", "log_probs", "scores", "passes"):
        mine, moved, wide = (getattr(r, name) for r in (whole, shuffled, padded))
        same = np.testing.assert_array_equal if mine.dtype == np.int32 else close
        same(mine[order], moved)
        same(mine, wide[..., :T] if wide.ndim == 3 else wide)
        for b in range(len(LENGTHS)):
            same(mine[b], getattr(alone[b], name)[0])
    assert (padded.tokens[..., T:] == IDS.pad).all()


def test_banned_symbols_are_never_emitted_and_a_mask_that_may_be_is_filled_again():
    inside = (np.arange(T) > 0) & (np.arange(T) < LENGTHS[..., None] - 1)
    assert not np.isin(run(iterations=5).tokens[inside], BANNED).any()

    def stubborn(tokens, _):  # wants the mask while any other slot is masked, then symbol 7
        crowd = jnp.sum(tokens == IDS.mask, axis=-1, keepdims=True) > 1
        wish = jnp.where(crowd & (jnp.arange(T) == 1), IDS.mask, 7)
        return 5.0 * jax.nn.one_hot(wish, VOCABULARY)

    result = run([[5]], fill=stubborn, iterations=3, banned=(), early_stop=False)
    assert result.history.tokens[:, 0, 0, 1].tolist() == [IDS.mask, IDS.mask, 7]
    assert result.tokens[0, 0, :5].tolist() == [IDS.bos, 7, 7, 7, IDS.eos]


def test_a_banned_symbol_keeps_its_share_of_the_softmax():
    logits = jnp.zeros((1, 1, 4, VOCABULARY)).at[..., IDS.mask].set(9.0).at[..., 8].set(1.0)
    result = run([[4]], fill=lambda tokens, _: logits, iterations=1, max_length=4)
    expected = 1 - np.log(np.exp(9) + np.exp(1) + VOCABULARY - 2)
    np.testing.assert_allclose(result.log_probs[0, 0], [0, expected, expected, 0], rtol=1e-5)


def test_the_fraction_masked_again_is_an_exact_floor():
    n = np.arange(2, 300)
    flags = jax.jit(least_certain, static_argnums=3)
    for passes in (1, 3, 5, 7, 10, 11):
        for s in range(passes):
            count = flags(jnp.zeros((len(n), 300)), jnp.asarray(n), jnp.int32(s), passes).sum(-1)
            assert count.tolist() == [(k - 2) * (passes - 1 - s) // passes for k in n.tolist()]


def test_of_equally_uncertain_slots_the_leftmost_is_masked_again():
    log_probs = jnp.array([[0.0, -1.0, -2.0, -1.0, -1.0, 0.0, 0.0]])
    flags = least_certain(log_probs, jnp.array([6]), jnp.int32(0), 4)  # 4 * 3 // 4 = 3
    assert flags.astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 0]]
    certain = least_certain(jnp.zeros((1, 7)), jnp.array([6]), jnp.int32(0), 4)
    assert certain.astype(int).tolist() == [[0, 1, 1, 1, 0, 0, 0]]  # never BOS, EOS or padding


def test_length_candidates():
    logits = jax.nn.one_hot(jnp.array([7, 1, 15, 0]), 16)
    make = functools.partial(candidate_lengths, logits, max_length=14)
    assert make(1).tolist() == [[7], [2], [14], [2]]
    assert make(3).tolist() == [[6, 7, 8], [2, 2, 3], [13, 14, 14], [2, 2, 2 + 1]]
    assert make(4).tolist()[0] == [5, 6, 7, 8]
    assert make(3, min_length=3).tolist()[1] == [3, 3, 4]
    given = lengths_around(jnp.array([7, 2, 20]), 3, max_length=14)
    assert given.tolist() == [[6, 7, 8], [2, 2, 3], [13, 14, 14]]
    each = candidate_lengths(logits, 3, max_length=jnp.array([7, 9, 9, 9]))
    assert each.tolist() == [[6, 7, 7], [2, 2, 3], [8, 9, 9], [2, 2, 3]]
    for b in range(4):
        np.testing.assert_array_equal(candidate_lengths(logits[b : b + 1], 3, max_length=14)[0], make(3)[b])


def test_an_empty_candidate_wins_only_when_there_is_no_other():
    log_probs = jnp.full((2, 2, 5), -3.0).at[..., 0].set(0)
    scores = mean_log_prob(log_probs, jnp.array([[2, 4], [2, 2]]))
    assert scores.tolist() == [[-np.inf, -3.0], [0.0, 0.0]]


def test_choose_takes_the_first_best_by_its_own_or_given_scores():
    result = run(iterations=4)
    mine = choose(result)
    for b, scores in enumerate(result.scores):
        best = list(scores).index(max(scores))
        assert mine.candidate[b] == best
        assert mine.scores[b] == scores[best]
        assert mine.lengths[b] == LENGTHS[b, best]
        assert mine.passes[b] == result.passes[b, best]
        np.testing.assert_array_equal(mine.tokens[b], result.tokens[b, best])
        np.testing.assert_array_equal(mine.log_probs[b], result.log_probs[b, best])
    given = jnp.array([[0, 0, 0], [0, 2, 1], [0, 1, 1], [-3, -2, -1], [1, 0, 0]])
    assert choose(result, given).candidate.tolist() == [0, 1, 1, 2, 0]
    assert choose(result, given).scores.tolist() == [0, 2, 1, -1, 1]


def test_one_compilation_per_shape():
    traces = []

    @functools.partial(jax.jit, static_argnames="options")
    def decode(lengths, options):
        def counted(tokens, nothing):
            traces.append(tokens.shape)
            return fill(tokens, nothing)

        return mask_predict(counted, lambda logits: logits, None, lengths, options)

    decode(jnp.asarray(LENGTHS), MaskPredictOptions(IDS, max_length=T, iterations=4))
    once = len(traces)
    decode(jnp.asarray(LENGTHS[::-1]), MaskPredictOptions(IDS, max_length=T, iterations=4))
    assert len(traces) == once
    assert decode._cache_size() == 1
    decode(jnp.asarray(LENGTHS[:2]), MaskPredictOptions(IDS, max_length=T, iterations=4))
    assert decode._cache_size() == 2


def test_without_history_the_result_is_the_same_and_carries_none():
    bare = run(iterations=4, history=False)
    assert bare.history is None
    np.testing.assert_array_equal(bare.tokens, run(iterations=4).tokens)


def test_rows_may_lie_on_different_devices():
    lengths = np.tile(LENGTHS[:4], (2, 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    there = jax.device_put(lengths, NamedSharding(mesh, rows))
    options = MaskPredictOptions(IDS, max_length=T, iterations=5, banned=BANNED)
    here = run(lengths, iterations=5).tokens
    np.testing.assert_array_equal(here, compiled(there, options, fill).tokens)  # automatic sharding

    decode = functools.partial(compiled, options=options, fill=fill)
    apart = jax.shard_map(decode, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    program = jax.jit(apart).lower(there).compile()
    np.testing.assert_array_equal(here, program(there).tokens)
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())


@pytest.mark.parametrize(
    ("values", "named"), [({"iterations": 0}, "iterations"), ({"max_length": 1}, "max_length")]
)
def test_unusable_options_are_named(values, named):
    with pytest.raises(MaskPredictOptionsError, match=named):
        MaskPredictOptions(IDS, **values)


def test_a_banned_symbol_outside_the_vocabulary_is_an_error():
    with pytest.raises(MaskPredictOptionsError, match="99"):
        run(banned=(0, 99))


# The reference's own histories ---------------------------------------------------------------------

REFERENCE_RUNS = [
    *(f"nar/it{m}_b{k}" for m in (0, 4, 10) for k in (1, 3)),
    "nar_special/it4_b1",
    "nar_special/it10_b3",
]


def reference_run(golden, name):
    """The stored arrays of one run, without the rows in which it predicted padding (a quirk)."""
    with np.load(golden / "janus_small.npz") as stored:
        arrays = {
            key.removeprefix(name + "/"): stored[key] for key in stored.files if key.startswith(name + "/")
        }
    real = arrays["init_tokens"] != FAIRSEQ.pad
    keep = ~((arrays["filled_tokens"] == FAIRSEQ.pad) & real).any((0, 2))
    rows_last = ("filled_tokens", "filled_scores", "remasked_tokens", "num_remasked")
    picked = {key: arrays[key][:, keep] for key in rows_last}
    picked |= {key: arrays[key][keep] for key in ("init_tokens", "cand_score", "cand_len")}
    return picked


@pytest.mark.parametrize("name", REFERENCE_RUNS)
def test_the_reference_predictions_lead_to_the_reference_history(golden, name):
    """A model that answers each canvas as the reference's did must be asked the same questions."""
    r = reference_run(golden, name)
    passes, rows, slots = r["filled_tokens"].shape
    assert rows >= 2
    asked = np.concatenate([r["init_tokens"][None], r["remasked_tokens"]])
    vocabulary = 96
    p = np.exp(r["filled_scores"])[..., None]
    answer = np.where(
        np.arange(vocabulary) == r["filled_tokens"][..., None],
        r["filled_scores"][..., None],
        np.log(np.maximum(1 - p, 1e-30) / (vocabulary - 1)),
    )

    def recorded(tokens, _):
        known = (jnp.asarray(asked) == tokens[:, 0]).all(-1)  # [P, rows]
        logits = jnp.asarray(answer, jnp.float32)[jnp.argmax(known, axis=0), jnp.arange(rows)]
        return jnp.where(known.any(0)[:, None, None], logits, jnp.nan)[:, None]

    options = MaskPredictOptions(FAIRSEQ, max_length=slots, iterations=passes, early_stop=False, history=True)
    lengths = jnp.asarray((r["init_tokens"] != FAIRSEQ.pad).sum(-1))[:, None]
    np.testing.assert_array_equal(blank_canvas(lengths, options)[:, 0], r["init_tokens"])
    result = compiled(lengths, options, recorded)
    tokens, log_probs, remasked = (np.asarray(x)[:, :, 0] for x in result.history)
    np.testing.assert_array_equal(tokens, r["filled_tokens"])
    np.testing.assert_allclose(log_probs, r["filled_scores"], atol=1e-4)
    np.testing.assert_array_equal(remasked[:-1].sum(-1), r["num_remasked"])
    np.testing.assert_array_equal(np.where(remasked, FAIRSEQ.mask, tokens)[:-1], r["remasked_tokens"])
    assert not remasked[-1].any()
    real = r["cand_len"] > 2  # the reference averages over BOS and EOS too
    theirs = (r["cand_score"] * r["cand_len"])[real] / (r["cand_len"][real] - 2)
    np.testing.assert_allclose(np.asarray(result.scores)[real, 0], theirs, atol=1e-4)


@pytest.mark.parametrize(("name", "candidates"), [("nar/it4_b1", 1), ("nar/it4_b3", 3)])
def test_length_candidates_are_the_reference_ones(golden, name, candidates):
    with np.load(golden / "janus_small.npz") as stored:
        logits, canvas = stored["out/length_logits"], stored[f"{name}/init_tokens"]
    lengths = candidate_lengths(jnp.asarray(logits), candidates, max_length=255)
    np.testing.assert_array_equal(lengths.reshape(-1), (canvas != FAIRSEQ.pad).sum(-1))
