"""The model against a plain NumPy reading of docs/method.md sections 1 to 3, and what may flow where."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import ModelConfig, SpecialIds
from janus_jax.models import Janus, empty_cache, init_params
from janus_jax.models.transformer import layer_norm, windows

IDS = SpecialIds()
BASE = ModelConfig(
    vocab_size=19,
    dim=8,
    ffn=12,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    max_positions=40,
    max_length=20,
    dropout=0.0,
)
# Every option is on in one of these and off in another.
VARIANTS = {
    "base": {},
    "pre": {"norm": "pre", "activation": "gelu", "ar_positions": "figure", "positions": "sinusoidal"},
    "apart": {
        "share_embeddings": False,
        "tie_output": False,
        "output_bias": True,
        "embed_norm": True,
        "ar_positions": "aligned",
    },
    "content": {"ar_stream": "content", "embed_norm": True, "scale_embeddings": False, "activation": "gelu"},
    "content, eos starts": {
        "ar_stream": "content",
        "norm": "pre",
        "ar_positions": "figure",
        "output_bias": True,
        "ids": dataclasses.replace(IDS, start=IDS.eos),
    },
}


def random_params(config, seed=0):
    """Parameters in which every entry counts, biases and norms too."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        return (path[-1].key == "scale") + 0.3 * rng.normal(size=x.shape).astype(np.float32)

    abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def sentence(rng, length):
    return np.concatenate([[IDS.bos], rng.integers(5, BASE.vocab_size, length - 2), [IDS.eos]]).astype(
        np.int32
    )


@pytest.fixture(scope="module")
def batch():
    """Three pairs without padding: source [3, 7], target [3, 9], masked [3, 9]."""
    rng = np.random.default_rng(1)
    source, target = (np.stack([sentence(rng, n) for _ in range(3)]) for n in (7, 9))
    masked = np.zeros(target.shape, bool)
    masked[0, [2, 3, 5, 7]] = masked[1, [1, 2, 6]] = True  # and nothing in the last
    return source, target, masked


@functools.partial(jax.jit, static_argnames="config")
def forward(params, source, target, masked, config):
    return Janus(config).apply({"params": params}, source, target, masked)


# A plain reading -------------------------------------------------------------------------------------


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def normalise(p, x, eps):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def attention(p, heads, x, content, sees):
    """States [N, D] attend content [M, D] where sees [N, M]."""
    q, k, v = dense(p["query"], x), dense(p["key"], content), dense(p["value"], content)
    mixed = []
    for qh, kh, vh in zip(*(np.split(a, heads, axis=-1) for a in (q, k, v)), strict=True):
        scores = np.exp(qh @ kh.T / math.sqrt(qh.shape[-1])) * sees
        mixed.append(scores / scores.sum(-1, keepdims=True) @ vh)
    return dense(p["out"], np.concatenate(mixed, axis=-1))


def feed_forward(p, activation, x):
    x = dense(p["rise"], x)
    gelu = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return dense(p["fall"], np.maximum(x, 0) if activation == "relu" else gelu)


def stack(p, config, x, encoded=None, sees=None):
    """All layers of one side over x [N, D]."""

    def residual(x, norm, f):
        if config.norm == "pre":
            return x + f(normalise(norm, x, config.norm_eps))
        return normalise(norm, x + f(x), config.norm_eps)

    everything = np.ones((len(x), len(x)), bool) if sees is None else sees
    for i in range(len(p["layers"]["ffn_norm"]["scale"])):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        x = residual(
            x,
            layer["attention_norm"],
            lambda h, p=layer["attention"]: attention(p, config.heads, h, h, everything),
        )
        if encoded is not None:
            x = residual(
                x,
                layer["cross_norm"],
                lambda h, p=layer["cross"]: attention(
                    p, config.heads, h, encoded, np.ones((len(h), len(encoded)), bool)
                ),
            )
        x = residual(x, layer["ffn_norm"], lambda h, p=layer["ffn"]: feed_forward(p, config.activation, h))
    return normalise(p["norm"], x, config.norm_eps) if config.norm == "pre" else x


def embed(p, config, table, tokens, places):
    x = table[tokens] * (math.sqrt(config.dim) if config.scale_embeddings else 1.0)
    if config.positions == "learned":
        x = x + p["input"]["positions"][places]
    else:
        half = config.dim // 2
        angles = np.outer(places, [10_000 ** (-i / (half - 1)) for i in range(half)])
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return normalise(p["input"]["norm"], x, config.norm_eps) if config.embed_norm else x


def sees(query, key, masked):
    """The table of models/streams.py: does slot (stream, j) attend slot (stream, k)?"""
    (stream, j), (of, k) = query, key
    if stream in ("ar content", "ar query"):
        return of == "ar content" and k <= j
    if stream == "nar":
        return of == "nar"
    if not masked[k]:
        return of == "nar"
    if stream == "truth":
        return (of == "nar" and k > j) or (of == "truth" and k <= j)
    return (of == "nar" and k >= j) or (of == "truth" and k < j)


def plain(params, config, source, target, masked):
    """{'ar', 'nar', 'aux': {place: logits [V]}, 'length': [C]} of one pair without padding."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    table = params["target_table"]
    source_table = table if config.share_embeddings else params["source_table"]
    output = table if config.tie_output else params["output_table"]
    side = params["encoder"]
    encoded = stack(side, config, embed(side, config, source_table, source, np.arange(len(source))))

    ids, n, query = config.ids, len(target), config.ar_stream == "query"
    content_ahead, query_ahead = {"code": (0, 0), "figure": (1, 1), "aligned": (0, 1)}[config.ar_positions]
    fed = [ids.start, *target[1:]]
    slots = [("ar content", i, fed[i], i + content_ahead) for i in range(n - 1)]
    slots += [("ar query", i, ids.mask, i + query_ahead) for i in range(n - 1) if query]
    if query:
        in_m = np.flatnonzero(masked)
        slots += [("nar", j, ids.mask if masked[j] else target[j], j) for j in range(n)]
        slots += [("truth", j, target[j], j) for j in in_m]
        slots += [("aux", j, ids.mask, j) for j in in_m]
    names = [slot[:2] for slot in slots]
    seen = np.array([[sees(a, b, masked) for b in names] for a in names])
    side = params["decoder"]
    x = embed(side, config, table, [slot[2] for slot in slots], np.array([slot[3] for slot in slots]))
    logits = stack(side, config, x, encoded, seen) @ output.T
    if config.output_bias:
        logits += params["output_bias"]

    found = {"ar": {}, "nar": {}, "aux": {}, "length": params["length_table"] @ encoded.mean(0)}
    for (stream, j), row in zip(names, logits, strict=True):
        if stream == ("ar query" if query else "ar content"):
            found["ar"][j + 1] = row
        elif stream in found:
            found[stream][j] = row
    return found


@functools.partial(jax.jit, static_argnames="config")
def all_ways(params, source, target, masked, config):
    """Logits of training, and of decoding: a whole pass of each kind, and token by token."""
    model, variables = Janus(config), {"params": params}
    nar = config.ar_stream == "query"
    outputs = model.apply(variables, source, target, masked, nar=nar, aux=nar)
    memory = model.apply(variables, source, method="remember")
    canvas = jnp.where(masked, config.ids.mask, target)

    def step(cache, at):
        logits, cache = model.apply(variables, at[1], at[0], cache, memory, method="ar_step")
        return cache, logits[:, 0]

    fed = target.at[:, 0].set(config.ids.start).T[..., None]
    length = target.shape[1]
    cache = empty_cache(config, len(target), 1, length)
    _, stepped = jax.lax.scan(step, cache, (jnp.arange(length), fed))
    whole = model.apply(variables, target[:, None], memory, method="ar_pass")[:, 0]
    whole = model.apply(variables, whole, method="logits")
    filled = model.apply(variables, canvas[:, None], memory, method="nar_pass")[:, 0]
    filled = model.apply(variables, filled, method="logits")
    return outputs, whole, jnp.moveaxis(stepped, 0, 1), filled, memory.length_logits


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, batch):
    config = dataclasses.replace(BASE, **VARIANTS[request.param])
    params = random_params(config)
    return config, params, all_ways(params, *map(jnp.asarray, batch), config)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("cells", "sizes"), [(8, (8,)), (30, (30,)), (31, (16, 31)), (32, (16, 32)), (300, (75, 150, 300))]
)
def test_windows_of_a_cache(cells, sizes):
    assert windows(cells) == sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_and_its_gradient_are_flax_s(dtype):
    rng = np.random.default_rng(8)
    x = jnp.asarray(3 + 2 * rng.normal(size=(4, 5, 16)), dtype)
    params = {"scale": jnp.asarray(rng.normal(size=16)), "bias": jnp.asarray(rng.normal(size=16))}
    ours = layer_norm(dataclasses.replace(BASE, dtype=dtype))
    theirs = nn.LayerNorm(epsilon=BASE.norm_eps, dtype=jnp.dtype(dtype))

    def apply(norm, params, x):
        return norm.apply({"params": params}, x)

    def gradients(norm):
        loss = lambda params, x: jnp.sum(jnp.sin(apply(norm, params, x).astype(jnp.float32)))  # noqa: E731
        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, x))

    exact = 1e-5 if dtype == "float32" else 2e-2
    found = apply(ours, params, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(
        np.float32(found), np.float32(apply(theirs, params, x)), rtol=exact, atol=exact
    )
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(other), rtol=10 * exact, atol=exact)


def test_a_cache_read_in_windows_gives_what_one_pass_gives():
    """70 places: windows of 18, 35 and 70 cells."""
    config = dataclasses.replace(BASE, max_positions=80, max_length=80)
    rng = np.random.default_rng(6)
    source = jnp.asarray(rng.integers(5, config.vocab_size, (2, 9)))
    target = jnp.asarray(np.stack([sentence(rng, 70) for _ in range(2)]))
    _, whole, stepped, *_ = all_ways(random_params(config), source, target, jnp.zeros((2, 70), bool), config)
    close(stepped[:, :-1], whole[:, 1:])


def test_all_distributions_are_those_of_the_plain_reading(variant, batch):
    config, params, (outputs, *_) = variant
    for b, (source, target, masked) in enumerate(zip(*batch, strict=True)):
        expected = plain(params, config, source, target, masked)
        close(outputs.length[b], expected["length"])
        assert len(expected["ar"]) == len(target) - 1
        for name in ("ar", "nar", "aux"):
            for place, logits in expected[name].items():
                close(getattr(outputs, name)[b, place], logits)


def test_decoding_is_the_same_model(variant):
    config, _, (outputs, whole, stepped, filled, length) = variant
    close(whole[:, 1:], outputs.ar[:, 1:])
    close(stepped[:, :-1], outputs.ar[:, 1:])  # by the place fed, by the place predicted
    close(length, outputs.length)
    if config.ar_stream == "query":
        close(filled, outputs.nar)


def test_the_three_position_conventions_are_three_models(batch):
    params = random_params(BASE)

    @functools.partial(jax.jit, static_argnums=0)
    def ar(convention):
        config = dataclasses.replace(BASE, ar_positions=convention)
        return Janus(config).apply({"params": params}, *batch, nar=False, aux=False).ar[:, 1:]

    code, figure, aligned = (ar(name) for name in ("code", "figure", "aligned"))
    for a, b in ((code, figure), (figure, aligned), (aligned, code)):
        assert np.abs(a - b).max() > 0.1


# What may flow where ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return random_params(BASE)


@pytest.fixture(scope="module")
def whole(params, batch):
    return forward(params, *batch, BASE)


def moved(before, after):
    """[.., T] bool: places whose logits changed; anything between rounding and a change is an error."""
    change = np.abs(np.asarray(before) - np.asarray(after)).max(-1)
    assert not ((change > 1e-5) & (change < 1e-4)).any()
    return change > 1e-5


def with_token(target, b, k):
    changed = target.copy()
    changed[b, k] = 5 + (target[b, k] - 4) % (BASE.vocab_size - 5)
    assert (changed != target).sum() == 1
    return changed


def test_a_token_reaches_only_the_later_places_of_p_ar(params, batch, whole):
    source, target, masked = batch
    n = target.shape[1]
    for k in range(1, n):
        changed = forward(params, source, with_token(target, 0, k), masked, BASE)
        assert moved(whole.ar, changed.ar)[0, 1:].tolist() == [t > k for t in range(1, n)]


def test_a_masked_true_token_reaches_p_aux_to_its_right_and_p_nar_nowhere(params, batch, whole):
    source, target, masked = batch
    in_m = np.flatnonzero(masked[0])
    for k in in_m:
        changed = forward(params, source, with_token(target, 0, k), masked, BASE)
        assert moved(whole.aux, changed.aux)[0, in_m].tolist() == [j > k for j in in_m]
        assert not moved(whole.nar, changed.nar).any()


def test_a_visible_token_reaches_p_nar_and_p_aux_on_both_sides(params, batch, whole):
    source, target, masked = batch
    changed = forward(params, source, with_token(target, 0, 4), masked, BASE)
    assert moved(whole.nar, changed.nar)[0].all()
    assert moved(whole.aux, changed.aux)[0, masked[0]].all()


def test_the_source_reaches_everything_and_no_sentence_reaches_another(params, batch, whole):
    source, target, masked = batch
    changed = forward(params, with_token(source, 0, 3), target, masked, BASE)
    for name in ("ar", "nar", "aux"):
        change = moved(getattr(whole, name), getattr(changed, name))
        assert change[0].all()
        assert not change[1:].any()
    assert moved(whole.length, changed.length).tolist() == [True, False, False]


def test_the_set_m_is_nothing_to_p_ar(params, batch, whole):
    source, target, masked = batch
    changed = forward(params, source, target, ~masked & (target >= 5), BASE)
    assert not moved(whole.ar, changed.ar).any()
    assert moved(whole.nar, changed.nar).all()


def test_each_distribution_alone_is_the_same(params, batch, whole):
    """The streams share a pass and nothing else."""

    @functools.partial(jax.jit, static_argnames=("ar", "nar", "aux"))
    def some(**streams):
        return Janus(BASE).apply({"params": params}, *batch, **streams)

    only_ar = some(ar=True, nar=False, aux=False)
    close(only_ar.ar, whole.ar)
    assert only_ar.nar is None
    assert only_ar.aux is None
    no_ar = some(ar=False, nar=True, aux=True)
    assert no_ar.ar is None
    close(no_ar.nar, whole.nar)
    close(no_ar.aux[batch[2]], whole.aux[batch[2]])


# Only what is read -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "asked"))
def read_and_gradient(params, source, target, masked, config, asked):
    """What a loss reads, {name: [B, T, V], zeros elsewhere}, and the gradient of some function of it."""
    options, rng = dict(asked), np.random.default_rng(2)
    n = target.shape[1]
    wanted = {
        "ar": (target != IDS.pad) & (jnp.arange(n) > 0),
        **dict.fromkeys(("nar", "aux"), masked),
    }
    direction = jnp.asarray(rng.normal(size=(len(target), n, config.vocab_size)), jnp.float32)

    def function(params):
        outputs = Janus(config).apply({"params": params}, source, target, masked, **options)
        found = {
            k: jnp.where(m[..., None], x, 0)
            for k, m in wanted.items()
            if (x := getattr(outputs, k)) is not None
        }
        return sum(jnp.sum(jnp.sin(x) * direction) for x in found.values()), found

    return jax.value_and_grad(function, has_aux=True)(params)


@pytest.mark.parametrize(
    ("name", "changes", "asked"),
    [
        ("base", {}, {"capacity": 0}),
        ("pre", {"scan_layers": True, "decoder_layers": 3, "remat": True}, {"capacity": 1}),
        ("apart", {"decoder_layers": 1}, {"capacity": 0, "ar": False}),
        ("base", {"remat": True}, {"nar": False, "aux": False}),
    ],
    ids=str,
)
def test_what_is_read_is_the_same_where_nothing_else_is_computed(batch, name, changes, asked):
    """`capacity`: as many slots as the row with most places in M needs, and so many more."""
    config = dataclasses.replace(BASE, **VARIANTS[name], **changes)
    params = random_params(config)
    source, target, masked = (x.copy() for x in batch)
    target[1, -2:], masked[1, -3:] = (IDS.eos, IDS.pad), False
    streams = {k: v for k, v in asked.items() if k != "capacity"}
    if "capacity" in asked:
        asked = asked | {"capacity": asked["capacity"] + int(masked.sum(1).max())}
    plain, ours = (
        read_and_gradient(params, source, target, masked, config, tuple(options.items()))
        for options in (streams, asked | {"prune": True})
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=3e-4), ours, plain)


def test_a_random_order_over_m_changes_who_sees_whom(params, batch, whole):
    """A true token reaches P_AUX where its turn is later, however the places in M are held."""
    source, target, masked = batch
    in_m = np.flatnonzero(masked[0])
    turn = np.zeros(masked.shape, np.int32)
    turn[0, in_m] = order = np.array([2, 0, 3, 1])
    turn[1, masked[1]] = [0, 1, 2]  # the order of the sentence

    @functools.partial(jax.jit, static_argnums=1)
    def aux(target, capacity):
        asked = {"turn": turn, "capacity": capacity, "prune": capacity is not None}
        return Janus(BASE).apply({"params": params}, source, target, masked, **asked).aux

    before = {capacity: aux(target, capacity) for capacity in (None, 4)}
    close(before[4][masked], before[None][masked])
    close(before[4][1, masked[1]], whole.aux[1, masked[1]])
    for k, mine in zip(in_m, order, strict=True):
        after = aux(with_token(target, 0, k), 4)
        assert moved(before[4], after)[0, in_m].tolist() == [other > mine for other in order]


def test_more_in_m_than_there_are_slots_is_not_passed_over(params, batch):
    """The row in question is NaN where it is read, so no loss can do without it; the others are well."""
    *_, masked = batch

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(capacity):
        return Janus(BASE).apply({"params": params}, *batch, capacity=capacity, prune=True)

    counts = masked.sum(1)
    assert counts[0] > counts[1]
    found, whole = outputs(int(counts[1])), outputs(int(counts[0]))
    for name in ("nar", "aux"):
        x = np.asarray(getattr(found, name))
        assert np.isnan(x[0, masked[0]]).any()
        assert np.isfinite(x[0, ~masked[0]]).all()
        np.testing.assert_allclose(x[1:], getattr(whole, name)[1:], rtol=1e-5, atol=1e-5)


# Padding ---------------------------------------------------------------------------------------------


def padded(x, after, before=0, value=IDS.pad):
    return np.pad(x, [(0, 0), (before, after)], constant_values=value)


def test_sixteen_more_slots_of_padding_change_nothing(params, batch, whole):
    source, target, masked = batch
    n = target.shape[1]
    wide = forward(params, padded(source, 16), padded(target, 16), padded(masked, 16, value=False), BASE)
    close(wide.length, whole.length)
    close(wide.ar[:, 1:n], whole.ar[:, 1:])
    close(wide.nar[:, :n], whole.nar)
    close(wide.aux[:, :n][masked], whole.aux[masked])


def test_a_source_may_be_padded_on_either_side(params, batch):
    source, target, masked = batch
    right, left = (
        forward(params, padded(source, *sides), target, masked, BASE) for sides in ((4, 0), (0, 4))
    )
    for name in ("ar", "nar", "aux", "length"):
        close(getattr(left, name), getattr(right, name))


def test_a_filler_row_is_finite(params, batch):
    source, target, masked = (x.copy() for x in batch)
    source[2] = target[2] = IDS.pad
    masked[2] = False
    outputs = forward(params, source, target, masked, BASE)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outputs))


TOKENS = jax.ShapeDtypeStruct((1, 5), jnp.int32)

# Errors ----------------------------------------------------------------------------------------------


def shapes(config, source, target, **streams):
    def apply():
        params = init_params(jax.random.key(0), config)
        tokens = [jnp.ones((1, n), jnp.int32) for n in (source, target)]
        return Janus(config).apply({"params": params}, *tokens, jnp.zeros((1, target), bool), **streams)

    return jax.eval_shape(apply)


def test_the_longest_length_is_the_table():
    assert shapes(BASE, 40, 40).ar.shape == (1, 40, BASE.vocab_size)


@pytest.mark.parametrize(("lengths", "what"), [((41, 9), "a source"), ((9, 41), "a target")])
def test_a_length_beyond_the_table_is_an_error(lengths, what):
    with pytest.raises(ValueError, match=f"{what} padded to 41 tokens .* model.max_positions = 40"):
        shapes(BASE, *lengths)
    unbounded = dataclasses.replace(BASE, positions="sinusoidal")
    assert shapes(unbounded, *lengths).nar.shape[1] == lengths[1]


def test_streams_that_need_others_say_so():
    with pytest.raises(ValueError, match="aux=True needs nar=True"):
        shapes(BASE, 5, 5, nar=False)
    with pytest.raises(ValueError, match="masked"):
        jax.eval_shape(
            lambda tokens: Janus(BASE).apply({"params": random_params(BASE)}, tokens, tokens), TOKENS
        )


# Parameters ------------------------------------------------------------------------------------------

LAYER = {
    "attention": {name: {"kernel": (8, 8), "bias": (8,)} for name in ("query", "key", "value", "out")},
    "attention_norm": {"scale": (8,), "bias": (8,)},
    "ffn": {"rise": {"kernel": (8, 12), "bias": (12,)}, "fall": {"kernel": (12, 8), "bias": (8,)}},
    "ffn_norm": {"scale": (8,), "bias": (8,)},
}
CROSS = {"cross": LAYER["attention"], "cross_norm": LAYER["attention_norm"]}


def stacked(layers, shapes):
    return {k: (layers, *v) if isinstance(v, tuple) else stacked(layers, v) for k, v in shapes.items()}


BASE_SHAPES = {
    "target_table": (19, 8),
    "length_table": (21, 8),
    "encoder": {"input": {"positions": (40, 8)}, "layers": stacked(1, LAYER)},
    "decoder": {"input": {"positions": (40, 8)}, "layers": stacked(2, LAYER | CROSS)},
}


def shapes_of(config):
    abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    assert {x.dtype for x in jax.tree.leaves(abstract)} == {np.dtype(np.float32)}
    return jax.tree.map(lambda x: x.shape, abstract)


def test_names_and_shapes_of_the_parameters():
    assert shapes_of(BASE) == BASE_SHAPES
    assert shapes_of(dataclasses.replace(BASE, ar_stream="content")) == BASE_SHAPES
    assert shapes_of(dataclasses.replace(BASE, dtype="bfloat16", scan_layers=True, remat=True)) == BASE_SHAPES


def test_options_add_parameters_and_take_them_away():
    norm = {"scale": (8,), "bias": (8,)}
    apart = {"source_table": (19, 8), "output_table": (19, 8), "output_bias": (19,)}
    sides = {
        side: {**BASE_SHAPES[side], "input": {"norm": norm}, "norm": norm} for side in ("encoder", "decoder")
    }
    config = dataclasses.replace(
        BASE,
        share_embeddings=False,
        tie_output=False,
        output_bias=True,
        embed_norm=True,
        norm="pre",
        positions="sinusoidal",
    )
    assert shapes_of(config) == BASE_SHAPES | apart | sides


def test_initialisation_is_berts():
    config = dataclasses.replace(BASE, dim=32, ffn=64, vocab_size=200)
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0, impl="rbg"), config)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in ("bias", "scale"):
            assert (x == (name == "scale")).all()
        else:
            assert 0.015 < x.std() < 0.025, path
            assert abs(x.mean()) < 0.004
    layers = params["decoder"]["layers"]["ffn"]["rise"]["kernel"]
    assert (layers[0] != layers[1]).all()


# Dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_on_exactly_when_a_key_is_given(params, batch, whole, rate):
    config = dataclasses.replace(BASE, **{rate: 0.5})

    @jax.jit
    def apply(key):
        rngs = None if key is None else {"dropout": key}
        return Janus(config).apply({"params": params}, *batch, nar=False, aux=False, rngs=rngs)

    one, again, other = (apply(jax.random.key(k)) for k in (0, 0, 1))
    for name in ("ar", "length"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
        assert (getattr(one, name) != getattr(other, name)).any()
        assert np.isfinite(getattr(one, name)).all()
    close(apply(None).ar[:, 1:], whole.ar[:, 1:])


def test_dropping_everything_leaves_nothing_and_no_nan(params, batch):
    config = dataclasses.replace(BASE, dropout=1.0)

    def total(params):
        outputs = Janus(config).apply({"params": params}, *batch, rngs={"dropout": jax.random.key(0)})
        return jnp.sum(outputs.ar) + jnp.sum(outputs.nar)

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(total))(params)))


def test_remat_that_keeps_products_draws_the_same_and_multiplies_no_more(batch):
    plain = dataclasses.replace(BASE, dropout=0.3, encoder_layers=1, decoder_layers=2, scan_layers=True)
    params = random_params(plain)

    def gradient_of(**changes):
        model = Janus(dataclasses.replace(plain, **changes))

        def total(params):
            rngs = {"dropout": jax.random.key(0)}
            return jnp.mean(jnp.sin(model.apply({"params": params}, *batch, rngs=rngs, aux=False).ar))

        return jax.grad(total)

    def products(gradient):
        return str(jax.make_jaxpr(gradient)(params)).count("dot_general[")

    without, kept = gradient_of(), gradient_of(remat=True, remat_keep="products")
    assert products(without) == products(kept) < products(gradient_of(remat=True))
    found, expected = (jax.jit(gradient)(params) for gradient in (kept, without))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)
