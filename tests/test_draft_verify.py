"""Draft and verify against greedy search and a plain Python reading of its rules, over toy models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import SpecialIds
from janus_jax.decode.beam import BeamOptions, greedy_search
from janus_jax.decode.draft_verify import (
    OTHERS,
    SPARE,
    STRIDE,
    DraftOptions,
    DraftOptionsError,
    draft_and_verify,
)

IDS = SpecialIds()
NEVER = (IDS.pad, IDS.bos, IDS.mask)
PRIME, VOCABULARY, L = 499, 14, 20
RNG = np.random.default_rng(5)
AR = RNG.normal(scale=2.0, size=(PRIME, VOCABULARY)).astype(np.float32)
AR[:, IDS.eos] += 0.5
LENGTHS = np.array([9, 3, 14, 22, 6, 11], np.int32)
LIMITS = np.array([20, 12, 1, 20, 7, 20], np.int32)


def ar_logits(tokens, xp, table):
    """[B, n] symbols fed -> [B, n, V]: a function of the place and, now and then, of the last two symbols."""
    before = xp.pad(tokens[:, :-1], [(0, 0), (1, 0)])
    place = xp.arange(tokens.shape[1])
    return table[((tokens % 3 == 0) * 31 + (before % 5 == 1) * 70 + place * 3) % PRIME]


def nar_states(canvas, xp, agreement):
    """[B, T] -> [B, T, V]: AR's logits after the symbol before, or, at some places, something else.

    What is before a mask is not known: it is taken for symbol 5, so drafts are right now and then.
    """
    known = xp.where(canvas == IDS.mask, 5, canvas)
    fed = xp.pad(known[:, :-1], [(0, 0), (1, 0)], constant_values=IDS.bos)
    right = ar_logits(fed, xp, jnp.asarray(AR) if xp is jnp else AR)
    wrong = xp.roll(right, 1, axis=-1)
    good = (xp.arange(canvas.shape[1]) * 5) % 7 < agreement
    return xp.where(good[:, None], right, wrong)


def toy(agreement):
    """The model of draft and verify, whose state is the symbol and the place of each cell."""

    def look(block, canvas, state):
        def write(row, x, a):
            return jax.lax.dynamic_update_slice(row, x, (a,))

        symbols, places = (
            jax.vmap(write)(row, x, block.start)
            for row, x in zip(state, (block.tokens, block.places), strict=True)
        )
        # What a slot sees of each place: one cell of all up to its own, and none beyond.
        at = block.sees[:, :, :, None] & (places[:, None, :, None] == jnp.arange(L + 1))
        whole = (at.sum(2) == (jnp.arange(L + 1) <= block.places[..., None])).all(-1)
        seen = jnp.einsum("bnpl,bp->bnl", at.astype(jnp.int32), symbols)
        logits = jax.vmap(lambda rows: ar_logits(rows, jnp, jnp.asarray(AR)), 1, 1)(seen)
        read = jnp.take_along_axis(logits, block.places[..., None, None], axis=2)[:, :, 0]
        read = jnp.where(whole[..., None], read, jnp.roll(read, 1, axis=-1))
        return read, nar_states(canvas, jnp, agreement), (symbols, places)

    return look


@functools.partial(jax.jit, static_argnames=("options", "agreement"))
def drafted(lengths, limits, options, agreement):
    cells = jnp.zeros((len(lengths), options.cells), jnp.int32)
    return draft_and_verify(toy(agreement), lambda x: x, (cells, cells), lengths, limits, options)


@functools.partial(jax.jit, static_argnames="options")
def greedy(limits, options):
    def step(tokens, index, fed):
        fed = jax.lax.dynamic_update_slice_in_dim(fed, tokens, index, axis=1)
        return ar_logits(fed, jnp, jnp.asarray(AR))[:, index][:, None], fed

    return greedy_search(step, jnp.zeros((len(limits), L), jnp.int32), limits, options)


def search(**changed):
    return BeamOptions(IDS, beam=1, max_length=L, banned=NEVER, **changed)


def run(lengths=LENGTHS, limits=LIMITS, agreement=4, **options):
    o = DraftOptions(**{"search": search(), "banned": (*NEVER, IDS.eos), "canvas": L + 1, **options})
    return jax.tree.map(np.asarray, drafted(jnp.asarray(lengths), jnp.asarray(limits), o, agreement))


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


@pytest.mark.parametrize("agreement", [0, 4, 7])
@pytest.mark.parametrize(
    ("block", "branches"), [(1, 0), (2, 0), (5, 0), (8, 0), (1, 4), (2, 2), (5, 30), (8, 6)]
)
def test_strict_is_greedy_search_symbol_for_symbol(block, branches, agreement):
    expected = greedy(jnp.asarray(LIMITS), search())
    found = run(block=block, branches=branches, agreement=agreement)
    assert_same(found, expected)
    lengths = found.lengths[:, 0]
    assert (found.passes <= lengths).all()
    assert (found.passes >= -(-lengths // block)).all()
    if block == 1:
        np.testing.assert_array_equal(found.passes, lengths)
        assert (found.accepted == 0).all()


@pytest.mark.parametrize("changed", [{"min_length": 6}, {"forced_eos": "free"}, {"length_penalty": 0.6}])
@pytest.mark.parametrize("branches", [0, 7])
def test_the_rules_of_the_search_are_kept(changed, branches):
    expected = greedy(jnp.asarray(LIMITS), search(**changed))
    assert_same(run(block=6, branches=branches, search=search(**changed)), expected)


def test_better_drafts_take_fewer_passes_and_some_are_accepted():
    passes = [run(agreement=a).passes.sum() for a in (0, 4, 7)]
    assert passes[2] < passes[0]
    found = run(agreement=7)
    assert found.accepted.sum() > 0
    # Each pass gives what it accepted of the draft, and one symbol of AR's own, unless the draft had EOS.
    assert (found.accepted + found.passes >= found.lengths[:, 0]).all()


def test_branches_take_fewer_passes():
    passes = [run(block=5, branches=m, agreement=3).passes.sum() for m in (0, 2, 12)]
    assert passes[0] > passes[1] >= passes[2]


def branches_of(guesses, places, ends, most):
    """The likeliest others for the places of a draft: pairs of its place, 0 .., and a symbol."""
    log_p = guesses - np.log(np.exp(guesses).sum(1, keepdims=True))
    log_p[:, [*NEVER, IDS.eos]] = -np.inf
    found, before = [], 0.0
    for j, place in enumerate(p for p in places if p < ends - 1):
        order = np.argsort(-log_p[place], kind="stable")
        found += [(before + log_p[place, s], j, int(s)) for s in order[1 : OTHERS + 1]]
        before += log_p[place, order[0]]
    found.sort(key=lambda x: -x[0])
    return [(j, s) for _, j, s in found[:most]]


def plain(length, limit, *, block, branches, top_k, margin, canvas, agreement):
    """One sentence, as the rules read: (symbols, passes, drafted symbols among them)."""
    said, draft, ends, passes, accepted = [], [], min(max(length, 3), canvas), 0, 0
    widest, others = min(ends + SPARE, canvas), []
    while True:
        passes += 1
        a = len(said)
        row = [IDS.bos, *said] + [IDS.mask] * (ends - 2 - a) + [IDS.eos] * (a < ends - 1)
        row = (row + [IDS.pad] * canvas)[:canvas]
        guesses = nar_states(np.array([row]), np, agreement)[0]
        likely = guesses.astype(np.float64)
        guesses[:, [*NEVER, IDS.eos]] = -np.inf
        new, branched = [], False
        while True:
            logits = ar_logits(np.array([[IDS.start, *said, *new]]), np, AR)[0, -1].astype(np.float64)
            logits[list(NEVER)] = -np.inf
            if a + len(new) >= limit - 1:
                logits[np.arange(VOCABULARY) != IDS.eos] = -np.inf
            best = int(logits.argmax())
            d = draft[len(new)] if len(new) < min(len(draft), block - 1) and not branched else None
            near = d is not None and np.isfinite(logits[d]) and (logits > logits[d]).sum() < top_k
            near = near and logits[d] >= logits.max() - margin
            took = d is not None and (d == best or (top_k > 1 and near))
            new.append(d if took else best)
            accepted += took
            if new[-1] == IDS.eos or branched:
                break
            if not took:
                if (len(new) - 1, best) not in others:
                    break
                branched, accepted = True, accepted + 1
        said += new
        if said[-1] == IDS.eos:
            return said, passes, accepted
        first = len(said) + 1
        places = range(first, first + block - 1)
        of = {p: IDS.eos if p == ends - 1 else int(guesses[p].argmax()) for p in places if p < ends}
        draft = [of.get(p, IDS.pad) for p in places]
        others = branches_of(likely, places, ends, branches)
        if len(said) + 1 >= ends - 1:
            ends = min(len(said) + 2 + STRIDE, widest)


@pytest.mark.parametrize(("top_k", "margin"), [(1, 0.0), (2, 0.5), (3, 4.0), (14, 100.0)])
@pytest.mark.parametrize(("block", "branches"), [(3, 0), (8, 0), (3, 2), (3, 6), (8, 5)])
def test_every_sentence_goes_as_plain_python_does(block, branches, top_k, margin):
    policy = {"block": block, "branches": branches, "top_k": top_k, "margin": margin}
    found = run(**policy)
    for b in range(len(LENGTHS)):
        rules = {**policy, "canvas": L + 1, "agreement": 4}
        said, passes, accepted = plain(int(LENGTHS[b]), int(LIMITS[b]), **rules)
        assert found.tokens[b, 0, : len(said)].tolist() == said
        assert (found.tokens[b, 0, len(said) :] == IDS.pad).all()
        assert (found.passes[b], found.accepted[b]) == (passes, accepted)


def test_tolerance_accepts_what_greedy_search_would_not_have_said():
    strict, tolerant = run(), run(top_k=14, margin=100.0)
    assert (strict.tokens != tolerant.tokens).any()
    assert tolerant.passes.sum() < strict.passes.sum()
    np.testing.assert_array_equal(run(top_k=3, margin=0.0).tokens, strict.tokens)


@pytest.mark.parametrize(("top_k", "branches"), [(1, 0), (3, 0), (1, 9)])
def test_a_sentence_does_not_see_its_batch_nor_the_room_on_its_canvas(top_k, branches):
    drafted = functools.partial(run, top_k=top_k, branches=branches, margin=2.0)
    lengths = np.minimum(LENGTHS, 12)
    whole = drafted(lengths, canvas=12 + SPARE)
    order = np.array([3, 0, 5, 4, 1, 2])
    shuffled = drafted(lengths[order], LIMITS[order], canvas=12 + SPARE)
    wide = drafted(lengths, canvas=40)
    for name in ("tokens", "lengths", "passes", "accepted"):
        mine = getattr(whole, name)
        np.testing.assert_array_equal(mine[order], getattr(shuffled, name))
        np.testing.assert_array_equal(mine, getattr(wide, name))
        for b in range(len(lengths)):
            rows = slice(b, b + 1)
            alone = drafted(lengths[rows], LIMITS[rows], canvas=12 + SPARE)
            np.testing.assert_array_equal(mine[b], getattr(alone, name)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"branches": -1}, "branches must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"margin": -1.0}, "margin must be at least 0"),
        ({"margin": float("nan")}, "margin must be at least 0"),
        ({"canvas": 2}, "canvas must be at least 3"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(DraftOptionsError, match=message):
        DraftOptions(**options)
