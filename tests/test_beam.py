"""Beam and greedy search against exhaustive enumeration and a plain-Python beam search.

The model is a table: a prefix is hashed to a row of random logits, so the distribution depends on the
whole prefix, and a wrong reordering of the state shows.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax.config import SpecialIds
from janus_jax.decode.beam import (
    BeamOptions,
    BeamOptionsError,
    beam_search,
    greedy_search,
    reorder_beams,
)

IDS = SpecialIds(pad=0, bos=1, eos=2, unk=3, mask=4, start=1)
PRIME = 997


def make_table(vocabulary: int, *, rows: int = 1, seed: int = 0, eos_bonus: float = 0.0) -> np.ndarray:
    """[B, PRIME, V] float32 logits."""
    table = np.random.default_rng(seed).normal(scale=1.5, size=(rows, PRIME, vocabulary))
    table[..., IDS.eos] += eos_bonus
    return table.astype(np.float32)


def hashed(node, token):
    return (node * 31 + token * 7 + 1) % PRIME


@functools.partial(jax.jit, static_argnames=("options", "decode"))
def compiled(table, limits, options, decode):
    def step(tokens, index, node):
        node = jnp.where(index == 0, node, hashed(node, tokens))
        return jax.vmap(lambda rows, n: rows[n])(table, node), node

    width = 1 if decode is greedy_search else options.beam
    return decode(step, jnp.zeros((table.shape[0], width), jnp.int32), limits, options)


def search(table, limits, options, decode=beam_search):
    """Decode with the table model; the state is the hash of each beam's prefix."""
    result = compiled(jnp.asarray(table), jnp.asarray(limits, jnp.int32), options, decode)
    return jax.tree.map(np.asarray, result)


def check_same(mine, other):
    """Symbols exactly; numbers up to the rounding of a softmax that is vectorised otherwise."""
    np.testing.assert_array_equal(mine.tokens, other.tokens)
    np.testing.assert_array_equal(mine.lengths, other.lengths)
    np.testing.assert_allclose(mine.scores, other.scores, rtol=1e-5)
    np.testing.assert_allclose(mine.log_probs, other.log_probs, rtol=1e-5, atol=1e-6)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def prefix_node(prefix):
    return functools.reduce(hashed, prefix, 0)


def plain_beam_search(table, limit, o):
    """One sentence, one list of (sum, prefix, log-probs) at a time; best first (score, tokens, log-probs)."""
    live, closed = [(0.0, (), ())], []
    for place in range(limit):
        last, options = place == limit - 1, []
        for total, prefix, parts in live:
            log_p = log_softmax(table[prefix_node(prefix)])
            for symbol, p in enumerate(log_p):
                if last:
                    if symbol != o.ids.eos:
                        continue
                    p = 0.0 if o.forced_eos == "free" else p
                elif symbol in o.banned or (symbol == o.ids.eos and place < o.min_length):
                    continue
                options.append((total + p, (*prefix, symbol), (*parts, p)))
        options = sorted(options, key=lambda x: -x[0])[: 2 * o.beam]
        for total, tokens, parts in options[: o.beam]:
            if tokens[-1] == o.ids.eos and (len(closed) < o.beam or not o.early_stop or o.displace):
                closed.append((total / len(tokens) ** o.length_penalty, tokens, parts))
        closed = sorted(closed, key=lambda x: -x[0])[: o.beam]
        live = [x for x in options if x[1][-1] != o.ids.eos][: o.beam]
        if not live:
            break
        if len(closed) == o.beam:
            hopeless = live[0][0] / (place + 1) ** o.length_penalty <= closed[-1][0]
            if o.early_stop or hopeless:
                break
    return closed


def all_sentences(table, limit, o):
    """Every sentence that may be emitted, with its score, best first."""
    words = [v for v in range(table.shape[-1]) if v != o.ids.eos and v not in o.banned]
    found = []
    for n in range(o.min_length, limit):
        for prefix in itertools.product(words, repeat=n):
            tokens = (*prefix, o.ids.eos)
            total = sum(log_softmax(table[prefix_node(tokens[:i])])[t] for i, t in enumerate(tokens))
            found.append((total / len(tokens) ** o.length_penalty, tokens))
    return sorted(found, reverse=True)


def check_against(result, row, expected, options):
    """Row `row` of `result` holds exactly the `expected` hypotheses, in order."""
    assert np.isfinite(result.scores[row]).sum() == len(expected)
    for n, (score, tokens, parts) in enumerate(expected):
        size = result.lengths[row, n]
        assert tuple(result.tokens[row, n, :size]) == tokens
        np.testing.assert_allclose(result.scores[row, n], score, rtol=1e-5)
        np.testing.assert_allclose(result.log_probs[row, n, :size], parts, rtol=1e-4, atol=1e-5)
        assert (result.tokens[row, n, size:] == options.ids.pad).all()
        assert (result.log_probs[row, n, size:] == 0).all()
    assert (result.lengths[row, len(expected) :] == 0).all()
    assert (result.tokens[row, len(expected) :] == options.ids.pad).all()


@pytest.mark.parametrize(("early_stop", "length_penalty"), [(True, 1.0), (False, 0.0)])
def test_a_beam_as_wide_as_the_language_finds_every_sentence_in_order(early_stop, length_penalty):
    table = make_table(4, seed=3)
    options = BeamOptions(
        IDS, beam=64, max_length=4, min_length=0, early_stop=early_stop, length_penalty=length_penalty
    )
    result = search(table, [4], options)
    expected = all_sentences(table[0], 4, options)
    assert len(expected) == 1 + 3 + 9 + 27
    assert [tuple(t[:n]) for t, n in zip(result.tokens[0], result.lengths[0], strict=True) if n] == [
        tokens for _, tokens in expected
    ]
    np.testing.assert_allclose(result.scores[0, :40], [score for score, _ in expected], rtol=1e-5)
    assert (result.scores[0, 40:] == -np.inf).all()


@pytest.mark.parametrize(
    ("vocabulary", "beam", "min_length", "length_penalty", "eos_bonus", "stop", "forced_eos"),
    [
        (9, 1, 1, 1.0, 1.0, "late", "scored"),
        (9, 3, 1, 1.0, 1.0, "first", "free"),
        (9, 4, 3, 0.6, 2.0, "first", "scored"),
        (9, 4, 3, 0.6, 2.0, "late", "free"),
        (12, 5, 0, 2.0, 3.0, "first", "scored"),
        (12, 5, 0, 2.0, 3.0, "late", "scored"),
        (9, 4, 0, 1.0, 3.0, "best", "free"),
        (3, 4, 1, 1.0, 0.0, "first", "scored"),
        (3, 4, 0, 1.0, 0.0, "late", "free"),
        (30, 5, 1, -1.0, -1.0, "late", "scored"),
    ],
)
def test_a_narrow_beam_does_what_plain_python_does(
    vocabulary, beam, min_length, length_penalty, eos_bonus, stop, forced_eos
):
    rows = 12
    table = make_table(vocabulary, rows=rows, seed=vocabulary * 10 + beam, eos_bonus=eos_bonus)
    limits = [1 + (5 * b) % 9 for b in range(rows)]
    options = BeamOptions(
        IDS,
        beam=beam,
        max_length=9,
        banned=(IDS.pad,),
        min_length=min_length,
        length_penalty=length_penalty,
        early_stop=stop != "late",
        displace=stop == "best",
        forced_eos=forced_eos,
    )
    result = search(table, limits, options)
    assert result.tokens.shape == (rows, beam, 9)
    assert result.tokens.dtype == result.lengths.dtype == np.int32
    for b in range(rows):
        check_against(result, b, plain_beam_search(table[b], limits[b], options), options)


def test_the_stop_rules_and_the_penalty_change_what_is_found():
    """So that the comparisons above cannot pass by all being the same."""
    table = make_table(9, rows=16, seed=5, eos_bonus=1.5)
    base = BeamOptions(IDS, beam=4, max_length=9)
    first, best, late, short = (
        search(table, [9] * 16, dataclasses.replace(base, **change))
        for change in ({}, {"displace": True}, {"early_stop": False}, {"length_penalty": 0.0})
    )
    assert (first.tokens != best.tokens).any()
    assert (best.tokens != late.tokens).any()
    assert (best.scores >= first.scores - 1e-6).all()
    assert (late.scores[:, 0] >= best.scores[:, 0] - 1e-6).all()
    assert short.lengths[:, 0].mean() < first.lengths[:, 0].mean()


@pytest.mark.parametrize(("forced_eos", "length_penalty"), [("scored", 0.7), ("free", 1.0)])
def test_greedy_is_beam_one_number_for_number(forced_eos, length_penalty):
    table = make_table(11, rows=16, seed=8, eos_bonus=0.5)
    limits = [1 + b % 10 for b in range(16)]
    options = BeamOptions(
        IDS, beam=1, max_length=10, banned=(0, 4), forced_eos=forced_eos, length_penalty=length_penalty
    )
    beam = search(table, limits, options)
    greedy = search(table, limits, options, decode=greedy_search)
    for a, b in zip(beam, greedy, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(set(beam.lengths[:, 0].tolist())) > 3


@pytest.mark.parametrize(
    ("decode", "early_stop"), [(beam_search, True), (beam_search, False), (greedy_search, True)]
)
def test_a_sentence_does_not_see_its_batch(decode, early_stop):
    table = make_table(10, rows=8, seed=2, eos_bonus=1.0)
    limits = np.array([3, 12, 7, 12, 1, 9, 12, 5])
    options = BeamOptions(IDS, beam=3, max_length=12, early_stop=early_stop)
    whole = search(table, limits, options, decode)
    order = np.random.default_rng(0).permutation(8)
    shuffled = search(table[order], limits[order], options, decode)
    check_same(jax.tree.map(lambda x: x[order], whole), shuffled)
    for b in range(8):
        alone = search(table[b : b + 1], limits[b : b + 1], options, decode)
        check_same(jax.tree.map(lambda x, b=b: x[b : b + 1], whole), alone)


def test_more_slots_than_the_limits_need_change_nothing():
    table = make_table(10, rows=4, seed=4)
    narrow = search(table, [6, 3, 8, 8], BeamOptions(IDS, beam=3, max_length=8))
    wide = search(table, [6, 3, 8, 8], BeamOptions(IDS, beam=3, max_length=24))
    cut = wide._replace(tokens=wide.tokens[..., :8], log_probs=wide.log_probs[..., :8])
    check_same(narrow, cut)
    assert (wide.tokens[..., 8:] == IDS.pad).all()


@pytest.mark.parametrize("decode", [beam_search, greedy_search])
def test_banned_symbols_are_never_emitted_and_still_take_their_share_of_the_softmax(decode):
    table = make_table(8, rows=6, seed=6)
    table[..., [0, 1, 3]] += 8.0  # what the model wants most
    options = BeamOptions(IDS, beam=3, max_length=6, banned=(0, 1, 3))
    result = search(table, [6] * 6, options, decode)
    emitted = result.tokens[np.arange(6) < result.lengths[..., None]]
    assert emitted.size
    assert not set(emitted.tolist()) & {0, 1, 3}
    assert (result.log_probs[:, 0, 0] < -5).all()


@pytest.mark.parametrize("decode", [beam_search, greedy_search])
@pytest.mark.parametrize("unwilling", [-50.0, -np.inf])
def test_a_model_that_never_ends_keeps_its_whole_sentence(decode, unwilling):
    table = make_table(8, rows=2, seed=7)
    table[..., IDS.eos] = unwilling
    options = BeamOptions(IDS, beam=2, max_length=7)
    result = search(table, [7, 4], options, decode)
    assert (result.lengths == [[7], [4]]).all()
    assert (result.tokens[0, :, 6] == IDS.eos).all()
    assert (result.tokens[0, :, :6] != IDS.eos).all()
    assert np.isfinite(result.scores).all()
    assert (result.scores[:, 0] < -5).all()
    if unwilling == -np.inf:  # all ends are equally impossible: as if they were free
        options = dataclasses.replace(options, forced_eos="free")
    if decode is greedy_search:
        options = dataclasses.replace(options, beam=1)
    best = plain_beam_search(np.maximum(table[0], -50.0), 7, options)
    assert tuple(result.tokens[0, 0]) == best[0][1]


def test_the_forced_end_costs_its_own_probability_or_nothing():
    table = make_table(8, rows=1, seed=9, eos_bonus=-9.0)
    scored, free = (
        search(table, [4], BeamOptions(IDS, max_length=4, forced_eos=kind), greedy_search)
        for kind in ("scored", "free")
    )
    np.testing.assert_array_equal(scored.tokens, free.tokens)
    assert scored.log_probs[0, 0, 3] < -5
    assert free.log_probs[0, 0, 3] == 0
    np.testing.assert_allclose(free.scores[0, 0], free.log_probs[0, 0].sum() / 4, rtol=1e-6)


def test_limits_are_brought_inside_the_slots():
    table = make_table(8, rows=3, seed=10, eos_bonus=-30.0)
    result = search(table, [0, -5, 99], BeamOptions(IDS, beam=2, max_length=5))
    assert result.lengths[:, 0].tolist() == [1, 1, 5]


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_reorder_beams_gathers_every_leaf(batch_axis):
    leaf = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    leaf = leaf if batch_axis else leaf.transpose(1, 2, 0, 3)
    parents = np.array([[3, 0, 0, 1], [0, 1, 2, 3], [2, 2, 2, 2]])
    moved = reorder_beams({"k": jnp.asarray(leaf)}, jnp.asarray(parents), batch_axis=batch_axis)["k"]
    for b, n in np.ndindex(3, 4):
        if batch_axis:
            np.testing.assert_array_equal(moved[:, b, n], leaf[:, b, parents[b, n]])
        else:
            np.testing.assert_array_equal(moved[b, n], leaf[b, parents[b, n]])


def test_a_stacked_cache_follows_its_beams():
    """The same search with the state hidden in a cache [layers, B, N, T] gives the same result."""
    table = jnp.asarray(make_table(9, rows=4, seed=11))
    options = BeamOptions(IDS, beam=3, max_length=7)

    def step(tokens, index, cache):
        cache = cache.at[:, :, :, index].set(tokens)
        node = jnp.zeros(tokens.shape, jnp.int32)
        node = jax.lax.fori_loop(1, index + 1, lambda i, n: hashed(n, cache[1, :, :, i]), node)
        return jax.vmap(lambda rows, n: rows[n])(table, node), cache

    reorder = functools.partial(reorder_beams, batch_axis=1)
    decode = jax.jit(lambda cache, limits: beam_search(step, cache, limits, options, reorder=reorder))
    result = decode(jnp.zeros((2, 4, 3, 8), jnp.int32), jnp.full(4, 7))
    np.testing.assert_array_equal(result.tokens, search(table, [7] * 4, options).tokens)


@pytest.mark.parametrize("decode", [beam_search, greedy_search])
def test_one_compilation_per_shape_and_one_trace_of_the_model(decode):
    table = jnp.asarray(make_table(9, rows=4))
    options = BeamOptions(IDS, beam=1, max_length=7)
    traces = []

    @functools.partial(jax.jit, static_argnames="options")
    def run(table, limits, options):
        def step(tokens, index, state):
            traces.append(tokens.shape)
            return table[:, None, hashed(index, 0)], state

        return decode(step, jnp.zeros((table.shape[0], 1)), limits, options)

    run(table, jnp.array([7, 7, 7, 7]), options)
    once = len(traces)  # while_loop may trace its body more than once for one compilation
    run(table, jnp.array([1, 5, 2, 3]), options)
    run(table + 1, jnp.array([7, 7, 7, 7]), BeamOptions(IDS, beam=1, max_length=7))
    assert len(traces) == once
    assert run._cache_size() == 1
    run(table[:2], jnp.array([7, 7]), options)
    assert run._cache_size() == 2


def test_the_loop_ends_with_its_last_sentence():
    table = jnp.asarray(make_table(9, rows=3, seed=1, eos_bonus=-30.0))
    steps = []

    def step(tokens, index, state):
        jax.debug.callback(lambda i: steps.append(int(i)), index)
        return table[:, :2], state

    options = BeamOptions(IDS, beam=2, max_length=100)
    jax.block_until_ready(
        jax.jit(lambda limits: beam_search(step, jnp.zeros((3, 2)), limits, options))(jnp.array([2, 4, 3]))
    )
    jax.effects_barrier()
    assert sorted(steps) == [0, 1, 2, 3]


def test_bfloat16_logits_are_scored_in_float32():
    logits = jnp.asarray(make_table(9, rows=2)[:, :1], jnp.bfloat16)
    options = BeamOptions(IDS, beam=1, max_length=2, min_length=0)
    result = jax.jit(
        lambda limits: beam_search(lambda t, i, s: (logits, s), jnp.zeros((2, 1)), limits, options)
    )(jnp.array([2, 2]))
    expected = np.max([log_softmax(x) for x in np.asarray(logits[:, 0], np.float32)], axis=-1)
    np.testing.assert_allclose(result.log_probs[:, 0, 0], expected, atol=1e-5)


def test_sentences_may_lie_on_different_devices():
    table = make_table(10, rows=8, seed=2, eos_bonus=1.0)
    limits = np.array([3, 12, 7, 12, 1, 9, 12, 5], np.int32)
    options = BeamOptions(IDS, beam=3, max_length=12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    spread = jax.device_put((table, limits), NamedSharding(mesh, rows))
    here = search(table, limits, options)
    check_same(here, search(*spread, options))  # automatic sharding

    decode = functools.partial(compiled, options=options, decode=beam_search)
    apart = jax.shard_map(decode, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False)
    program = jax.jit(apart).lower(*spread).compile()
    check_same(here, program(*spread))
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"beam": 0}, "beam"),
        ({"max_length": 0}, "max_length"),
        ({"min_length": -1}, "min_length"),
        ({"forced_eos": "never"}, "forced_eos"),
        ({"banned": (2,)}, "EOS"),
    ],
)
def test_unusable_options_are_named(values, named):
    with pytest.raises(BeamOptionsError, match=named):
        BeamOptions(IDS, **values)


def test_a_banned_symbol_outside_the_vocabulary_is_an_error():
    with pytest.raises(BeamOptionsError, match="99"):
        search(make_table(8), [3], BeamOptions(IDS, beam=2, max_length=3, banned=(0, 99)))
