"""Decoding with a model: what a hypothesis must not depend on, and what it may contain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import cost, mesh
from janus_jax.config import Config, DecodeConfig, MeshConfig, ModelConfig, SpecialIds
from janus_jax.decode import leaving as leave
from janus_jax.decode.mask_predict import mean_log_prob
from janus_jax.generate import Generator, with_options
from janus_jax.models import Janus, init_params

IDS = SpecialIds()
MODEL = ModelConfig(
    vocab_size=17,
    dim=8,
    ffn=12,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    max_positions=64,
    max_length=40,
    tie_output=False,
    output_bias=True,
    dropout=0.0,
)
# With early stopping, which leaves the outputs of random weights further apart than all passes do.
DECODE = DecodeConfig(beam=1, max_length_a=1.0, max_length_b=3, iterations=4, candidates=3, early_stop=True)
WIDE = 12  # slots of the sources
SEED = 10  # whose model says different things to different sources
SPECIAL = (IDS.pad, IDS.bos, IDS.unk, IDS.mask)


def random_params(seed):
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scale = path[-1].key == "scale"
        return scale + (0.2 if scale else 0.7) * rng.normal(size=x.shape).astype(np.float32)

    abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    drawn = jax.tree_util.tree_map_with_path(draw, abstract)
    drawn["decoder"]["input"]["positions"] *= 4  # slots that differ by their place alone
    drawn["output_bias"][[*SPECIAL, IDS.eos]] = 3.0  # it would rather say what is never to be said
    drawn["length_table"][13:] = 0  # few sentences predict a length beyond their limits
    return drawn


@pytest.fixture(scope="module")
def params():
    return random_params(SEED)


@pytest.fixture(scope="module")
def source():
    """[8, 12]: eight sources, 2 (no word at all) to 12 tokens long."""
    rng = np.random.default_rng(3)
    rows = np.full((8, WIDE), IDS.pad, np.int32)
    for row, n in zip(rows, (12, 4, 9, 2, 7, 3, 11, 6), strict=True):
        row[:n] = [IDS.bos, *rng.integers(5, MODEL.vocab_size, n - 2), IDS.eos]
    return rows


@functools.partial(jax.jit, static_argnums=0)
def autoregressive(generator, params, source):
    return generator.autoregressive(params, source)


@functools.partial(jax.jit, static_argnums=0)
def non_autoregressive(generator, params, source):
    memory, lengths = generator.remember(params, source)
    slots = generator.slots(source.shape[1]) + 1  # BOS too
    return generator.non_autoregressive(params, memory, lengths, slots)[0]


@functools.partial(jax.jit, static_argnums=0)
def draft_and_verify(generator, params, source):
    memory, lengths = generator.remember(params, source)
    slots = generator.slots(source.shape[1]) + 1
    return generator.draft_and_verify(params, source, memory, lengths, slots)


def generator(**options):
    return Generator(MODEL, with_options(DECODE, **options))


WAYS = {
    "greedy": (autoregressive, generator()),
    "beam 4": (autoregressive, generator(beam=4)),
    "draft": (draft_and_verify, generator()),
    "draft, no branches": (draft_and_verify, generator(draft_branches=0)),
    "draft, tolerant": (draft_and_verify, generator(draft_top_k=3, draft_margin=2.0)),
    "nar": (non_autoregressive, generator()),
    "nar, rescored": (non_autoregressive, generator(rescore=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_other_devices_compute_is_what_a_cpu_computes(way, params, source, off_the_cpu):
    """Some things have a form for CPUs, which all other tests see, and one for accelerators."""
    function, g = WAYS[way]
    wide = np.pad(source, [(0, 0), (0, 28)], constant_values=IDS.pad)  # a cache of more than one window

    def run():
        return jax.tree.map(np.asarray, jax.jit(lambda p, s: function.__wrapped__(g, p, s))(params, wide))

    here = run()
    forms = off_the_cpu()
    elsewhere = run()
    assert forms
    np.testing.assert_array_equal(here.tokens, elsewhere.tokens)
    np.testing.assert_allclose(here.scores, elsewhere.scores, rtol=1e-5)


@pytest.mark.parametrize("way", ["greedy", "beam 4", "draft", "nar"])
def test_sentences_that_leave_their_batch_lose_nothing(way, params, monkeypatch):
    """72 sentences in batches of 72, 36 and 18, against all rounds by all of them."""
    function, g = WAYS[way]
    rng = np.random.default_rng(5)
    lengths = rng.integers(3, WIDE + 1, 72)
    source = rng.integers(5, MODEL.vocab_size, (72, WIDE)).astype(np.int32)
    source[:, 0] = IDS.bos
    source[np.arange(72), lengths - 1] = IDS.eos
    source[np.arange(WIDE) >= lengths[:, None]] = IDS.pad

    def run():
        return jax.tree.map(np.asarray, jax.jit(lambda p, s: function.__wrapped__(g, p, s))(params, source))

    leaving, sizes = run(), []
    monkeypatch.setattr(leave, "sizes", lambda rows: sizes.append(rows) or (rows,))
    together = run()
    assert sizes == [72]
    for name, ours, expected in zip(leaving._fields, leaving, together, strict=True):
        if ours.dtype == np.float32:
            np.testing.assert_allclose(ours, expected, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, expected, err_msg=name)


@pytest.fixture(scope="module", params=WAYS)
def way(request, params, source):
    """(decode a source, the result for all eight together)."""
    decode, g = WAYS[request.param]
    run = functools.partial(decode, g, params)
    return run, jax.tree.map(np.asarray, run(source))


def assert_same(ours, expected):
    """The same symbols and, to rounding, the same scores; one may have more slots of padding."""
    slots = min(ours.tokens.shape[-1], expected.tokens.shape[-1])
    for name in ("tokens", "log_probs"):
        a, b = (np.asarray(getattr(r, name)) for r in (ours, expected))
        for beyond in (a[..., slots:], b[..., slots:]):
            assert (beyond == 0).all()  # pad is 0
        if name == "tokens":
            np.testing.assert_array_equal(a[..., :slots], b[..., :slots])
        else:
            np.testing.assert_allclose(a[..., :slots], b[..., :slots], atol=1e-4)
    np.testing.assert_array_equal(ours.lengths, expected.lengths)
    np.testing.assert_allclose(ours.scores, expected.scores, atol=1e-4)


def test_the_hypotheses_differ(way):
    """Else what follows would show nothing."""
    tokens = way[1].tokens.reshape(8, -1)
    assert len(np.unique(tokens, axis=0)) >= 5


def test_a_sentence_alone_and_in_a_batch_is_the_same(way, source):
    run, together = way
    for b in range(8):
        assert_same(run(source[b : b + 1]), jax.tree.map(lambda x, b=b: x[b : b + 1], together))


def test_order_is_nothing(way, source):
    run, together = way
    order = np.random.default_rng(0).permutation(8)
    assert_same(run(source[order]), jax.tree.map(lambda x: x[order], together))


def test_sixteen_more_slots_of_padding_are_nothing(way, source):
    run, together = way
    assert_same(run(np.pad(source, [(0, 0), (0, 16)])), together)


def test_what_is_never_said_is_not_said(way):
    _, result = way
    tokens, lengths = result.tokens, result.lengths
    places = np.arange(tokens.shape[-1])
    inside = places < lengths[..., None] - 1
    if tokens.ndim == 2:  # NAR carries BOS
        assert (tokens[:, 0] == IDS.bos).all()
        inside &= places > 0
    assert not np.isin(tokens[inside], (*SPECIAL, IDS.eos)).any()
    assert (np.take_along_axis(tokens, lengths[..., None] - 1, -1) == IDS.eos).all()
    assert (tokens[places >= lengths[..., None]] == IDS.pad).all()


@pytest.mark.parametrize("decode", [autoregressive, non_autoregressive])
def test_unk_is_said_where_it_may_be(params, source, decode):
    result = decode(generator(ban_unk=False, iterations=1), params, source)
    assert (np.asarray(result.tokens) == IDS.unk).any()


def test_banned_symbols_by_kind_of_model():
    bart = dataclasses.replace(MODEL, ids=dataclasses.replace(IDS, start=IDS.eos))
    assert Generator(MODEL, DECODE)._banned(eos=False) == (0, 1, 3, 4)
    assert Generator(MODEL, DECODE)._banned(eos=True) == (0, 1, 2, 3, 4)
    assert Generator(bart, DECODE)._banned(eos=False) == (0, 1, 3, 4)  # its start symbol ends a sentence
    assert generator(ban_unk=False)._banned(eos=False) == (0, 1, 4)


@pytest.mark.parametrize(("block", "branches"), [(1, 0), (3, 0), (8, 0), (3, 6), (8, 8)])
def test_strict_drafts_say_what_greedy_search_says(params, source, block, branches):
    found = draft_and_verify(generator(draft_block=block, draft_branches=branches), params, source)
    assert_same(found, autoregressive(generator(), params, source))
    assert (found.passes <= found.lengths[:, 0]).all()


# Lengths ---------------------------------------------------------------------------------------------


def test_a_limit_is_a_function_of_the_sentence_alone(source):
    n = (source != IDS.pad).sum(1)
    g = generator(max_length_a=1.5, max_length_b=2)
    expected = np.floor(1.5 * n) + 2
    np.testing.assert_array_equal(g.limits(jnp.asarray(source)), expected)
    np.testing.assert_array_equal(g.limits(jnp.pad(source, [(0, 0), (0, 9)])), expected)
    assert g.slots(WIDE) == expected.max() == 20


def test_no_limit_leaves_the_tables():
    g = generator(max_length_a=3.0, max_length_b=50)
    assert g.slots(30) == MODEL.max_length - 1  # the length table counts BOS and EOS
    long = Generator(dataclasses.replace(MODEL, max_length=200), g.decode)
    assert long.slots(30) == MODEL.max_positions - 1  # and BOS has a place too
    endless = Generator(dataclasses.replace(long.model, positions="sinusoidal"), g.decode)
    assert endless.slots(30) == 3 * 30 + 50
    assert g.limits(jnp.ones((1, 30), jnp.int32)).tolist() == [MODEL.max_length - 1]


@pytest.mark.parametrize(
    "options", [{"max_length_a": 1e9}, {"max_length_a": 1e308}, {"max_length_b": 3 * 10**9}]
)
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_a_huge_limit_is_none(source, options, positions):
    g = Generator(dataclasses.replace(MODEL, positions=positions), with_options(DECODE, **options))
    assert g.slots(WIDE) == MODEL.max_length - 1
    assert jax.jit(g.limits)(source).tolist() == [MODEL.max_length - 1] * 8
    assert cost.decode_slots(Config(model=g.model, decode=g.decode), WIDE) == MODEL.max_length - 1


def test_hypotheses_keep_their_limits(way, source):
    _, result = way
    limits = np.asarray(generator().limits(jnp.asarray(source)))
    carries_bos = result.tokens.ndim == 2
    most = result.lengths.reshape(8, -1).max(1) - carries_bos
    assert (most <= limits).all()
    if carries_bos:
        assert result.lengths.min() >= 3  # no empty answer


@pytest.mark.parametrize("decode", [autoregressive, non_autoregressive, draft_and_verify])
def test_a_limit_of_one_token(params, source, decode):
    result = decode(generator(max_length_a=0.0, max_length_b=1), params, source)
    real = np.asarray(result.tokens).reshape(8, -1)
    assert [[t for t in row if t not in (IDS.pad, IDS.bos)] for row in real.tolist()] == [[IDS.eos]] * 8


# Scores ----------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def rescored(generator, params, source, tokens):
    """(`rescore`, log-probabilities of `ar_pass`)."""
    memory, _ = generator.remember(params, source)
    model, variables = Janus(generator.model), {"params": params}
    states = model.apply(variables, tokens, memory, method="ar_pass")
    logits = model.apply(variables, states, method="logits")
    return generator.rescore(params, memory, tokens), jax.nn.log_softmax(logits)


def test_rescoring_gives_what_beam_search_gave(params, source):
    """The same model in one pass: sum of log p, EOS counted, over length ** penalty."""
    g = generator(beam=4, length_penalty=0.7)
    found = jax.tree.map(np.asarray, autoregressive(g, params, source))
    assert (found.lengths > 0).all()
    tokens = np.pad(found.tokens, [(0, 0), (0, 0), (1, 0)], constant_values=IDS.bos)
    scores, log_p = rescored(g, params, source, tokens)
    np.testing.assert_allclose(scores, found.scores, atol=1e-4)
    for b, n in np.ndindex(8, 4):
        length = found.lengths[b, n]
        total = sum(log_p[b, n, t, tokens[b, n, t]] for t in range(1, length + 1))
        np.testing.assert_allclose(scores[b, n], total / length**0.7, atol=1e-4)


def test_a_rescored_choice_is_the_best_candidate_by_its_ar_score(params, source):
    g = generator(rescore=True, candidates=5)

    @jax.jit
    def run(source):
        memory, lengths = g.remember(params, source)
        choice, result = g.non_autoregressive(params, memory, lengths, g.slots(WIDE) + 1)
        return choice, result, g.rescore(params, memory, result.tokens)

    choice, result, scores = run(source)
    np.testing.assert_allclose(result.scores, scores, atol=1e-5)
    np.testing.assert_array_equal(choice.candidate, np.argmax(scores, axis=1))
    np.testing.assert_allclose(choice.scores, np.max(scores, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(choice.tokens, result.tokens[np.arange(8), choice.candidate])
    own = mean_log_prob(result.log_probs, result.lengths)
    assert (choice.candidate != np.argmax(own, axis=1)).any()


# Devices, options ------------------------------------------------------------------------------------


def test_eight_devices_are_one(params, source):
    devices = mesh.make_mesh(MeshConfig())
    spread = mesh.global_batch(devices, {"source": source})["source"]
    there = jax.device_put(params, mesh.replicated(devices))
    assert_same(autoregressive(generator(), there, spread), autoregressive(generator(), params, source))


def test_an_unknown_option_is_named():
    assert with_options(DECODE, beam=3).beam == 3
    with pytest.raises(ValueError, match=r"unknown decoding option 'beams'; there are .*beam, candidates"):
        with_options(DECODE, beams=3)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_step_writes_into_the_cache_and_copies_none_of_it(beam):
    model = dataclasses.replace(MODEL, dim=32, decoder_layers=4, max_positions=300, max_length=300)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    rows, memory, cache = 8, {}, {}
    for slots in (128, 256):
        decode = dataclasses.replace(DECODE, beam=beam, max_length_a=0.0, max_length_b=slots)
        source = jax.ShapeDtypeStruct((rows, WIDE), jnp.int32)
        compiled = autoregressive.lower(Generator(model, decode), params, source).compile()
        memory[slots] = compiled.memory_analysis().temp_size_in_bytes
        cache[slots] = 2 * model.decoder_layers * rows * slots * beam * model.dim * 4
    # Once the cache itself, and what one layer reads of it at a time.
    assert memory[256] - memory[128] < 1.4 * (cache[256] - cache[128])
