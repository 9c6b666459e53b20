"""Every term of every objective against a plain loop over docs/method.md section 4."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import losses
from janus_jax.config import LossConfig, SpecialIds

IDS = SpecialIds()
B, T, V, C = 5, 8, 11, 7
TERMS = ("ar", "nll_ar", "nar", "nll_nar", "aux", "nll_aux", "length", *losses.DIVERGENCES)


@pytest.fixture(scope="module")
def batch():
    """(target, masked): lengths 8, 8, 5, 3 and a filler row; nothing masked in the second."""
    rng = np.random.default_rng(0)
    lengths = np.array([8, 8, 5, 3, 0])
    target = rng.integers(5, V, (B, T)).astype(np.int32)
    place = np.arange(T)
    target[:, 0] = IDS.bos
    target[place == lengths[:, None] - 1] = IDS.eos
    target[place >= lengths[:, None]] = IDS.pad
    masked = np.zeros((B, T), bool)
    masked[0, [1, 3, 4, 6]] = masked[2, [2, 3]] = masked[3, 1] = True
    assert not (masked & (target < 5)).any()
    return jnp.asarray(target), jnp.asarray(masked)


@pytest.fixture(scope="module")
def outputs():
    rng = np.random.default_rng(1)
    shapes = {"ar": (B, T, V), "nar": (B, T, V), "aux": (B, T, V), "length": (B, C)}
    return SimpleNamespace(**{k: jnp.asarray(rng.normal(size=s) * 2, jnp.float32) for k, s in shapes.items()})


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain_smoothed(log_p, truth, eps):
    uniform = sum(-log_p[v] for v in range(len(log_p))) / len(log_p)
    return (1 - eps) * -log_p[truth] + eps * uniform


def plain_kl(log_p, log_q):
    kl = sum(np.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
    back = sum(np.exp(b) * (b - a) for a, b in zip(log_p, log_q, strict=True))
    return (kl + back) / 2


def plain_terms(outputs, target, masked, eps):
    """{term: list of the value of each item}, row by row and place by place."""
    target, masked = np.asarray(target), np.asarray(masked)
    log_p = {name: log_softmax(getattr(outputs, name)) for name in ("ar", "nar", "aux", "length")}
    found = {name: [] for name in TERMS}
    for b in range(B):
        n = int((target[b] != IDS.pad).sum())
        if n == 0:
            continue
        found["length"].append(-log_p["length"][b, min(n, C - 1)])
        for t in range(1, n):
            for name in ("ar", "nar", "aux"):
                if name == "ar" or masked[b, t]:
                    row = log_p[name][b, t]
                    found[name].append(plain_smoothed(row, target[b, t], eps))
                    found[f"nll_{name}"].append(-row[target[b, t]])
            if masked[b, t]:
                for name, (p, q) in losses.DIVERGENCES.items():
                    found[name].append(plain_kl(log_p[p][b, t], log_p[q][b, t]))
    return found


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_every_term_of_janus(outputs, batch, eps):
    found = losses.terms(outputs, *batch, LossConfig(label_smoothing=eps), IDS)
    expected = plain_terms(outputs, *batch, eps)
    assert found.keys() == expected.keys()
    for name, items in expected.items():
        assert len(items) == {"length": 4, "ar": 20, "nll_ar": 20}.get(name, 7)
        np.testing.assert_allclose(found[name][0], sum(items), rtol=1e-5, err_msg=name)
        assert found[name][1] == len(items), name
        np.testing.assert_allclose(losses.mean(found[name]), np.mean(items), rtol=1e-5)


def test_the_total_is_the_sum_of_the_coefficients_times_the_means(outputs, batch):
    config = LossConfig(ar=0.7, nar=0.3, aux=0.2, length=0.05, kl_nar_aux=1.5, kl_ar_aux=2.5, kl_ar_nar=0.4)
    total = losses.total(losses.terms(outputs, *batch, config, IDS), config)
    means = {name: np.mean(items) for name, items in plain_terms(outputs, *batch, 0.1).items()}
    expected = sum(getattr(config, name) * means[name] for name in TERMS if "nll" not in name)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({"kl_warmup": 0.25}, {0: 0.0, 10: 0.4, 25: 1.0, 99: 1.0}),
        ({"kl_decay": 0.5}, {0: 1.0, 10: 0.8, 50: 0.0, 99: 0.0}),
        ({"kl_warmup": 0.25, "kl_decay": 0.5}, {0: 0.0, 10: 0.32, 25: 0.5, 40: 0.2, 50: 0.0, 99: 0.0}),
    ],
    ids=["rise", "fall", "both"],
)
def test_the_weights_of_the_kl_terms_change(outputs, batch, changes, scales):
    config = LossConfig(**changes)
    found = losses.terms(outputs, *batch, config, IDS)
    means = {name: float(losses.mean(found[name])) for name in losses.coefficients(config)}
    for step, scale in scales.items():
        at = losses.kl_scale(config, jnp.int32(step), 100)
        np.testing.assert_allclose(at, scale, rtol=1e-6, atol=1e-7)
        expected = sum(
            c * means[name] * (scale if name in losses.DIVERGENCES else 1)
            for name, c in losses.coefficients(config).items()
        )
        np.testing.assert_allclose(losses.total(found, config, at), expected, rtol=1e-5)
    for other in (LossConfig(), LossConfig(kl_warmup=0.5, objective="rdrop")):
        assert losses.kl_scale(other, jnp.int32(0), 100) is None


def test_the_kl_terms_of_one_way(outputs, batch):
    """The side that sees more is what the other is measured against."""
    config = LossConfig(kl_form="one_way")
    found = losses.terms(outputs, *batch, config, IDS)
    both = losses.terms(outputs, *batch, LossConfig(), IDS)
    log_p = {name: log_softmax(getattr(outputs, name)) for name in ("ar", "nar", "aux")}
    masked = np.asarray(batch[1])
    for name, (p, q) in {
        "kl_nar_aux": ("aux", "nar"), "kl_ar_aux": ("aux", "ar"), "kl_ar_nar": ("ar", "nar")
    }.items():  # fmt: skip
        expected = np.sum(np.exp(log_p[p]) * (log_p[p] - log_p[q]), axis=-1)[masked].sum()
        np.testing.assert_allclose(found[name][0], expected, rtol=1e-5, err_msg=name)
        assert abs(expected - both[name][0]) > 1e-2
        assert found[name][1] == both[name][1]
    for name in set(found) - set(losses.DIVERGENCES):
        np.testing.assert_array_equal(found[name][0], both[name][0])


@pytest.mark.parametrize(
    ("learners", "moved"), [("all", "ar nar aux"), ("nar_aux", "nar aux"), ("ar", "ar")], ids=str
)
def test_the_kl_terms_teach_whom_they_are_to(outputs, batch, learners, moved):
    """Their values and the other terms stay; only gradients of the KL terms go to `moved` alone."""
    plain, config = LossConfig(), LossConfig(kl_learners=learners)
    before, after = (losses.terms(outputs, *batch, c, IDS) for c in (plain, config))
    jax.tree.map(np.testing.assert_array_equal, before, after)

    def ties(streams, config):
        found = losses.terms(SimpleNamespace(**streams, length=outputs.length), *batch, config, IDS)
        return sum(getattr(config, name) * losses.mean(found[name]) for name in losses.DIVERGENCES)

    streams = {name: getattr(outputs, name) for name in losses.CROSS_ENTROPIES}
    both, ours = (jax.grad(ties)(streams, c) for c in (plain, config))
    for name in streams:
        assert np.abs(both[name]).max() > 1e-3
        expected = both[name] if name in moved.split() else np.zeros((B, T, V))
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_what_padding_and_fillers_predict_does_not_count(outputs, batch):
    target, masked = batch
    rng = np.random.default_rng(2)
    noise = jnp.asarray(rng.normal(size=(B, T, V)) * 9, jnp.float32)
    nothing_there = (target == IDS.pad) | (jnp.arange(T) == 0)
    changed = SimpleNamespace(
        ar=jnp.where(nothing_there[..., None], noise, outputs.ar),
        nar=jnp.where(masked[..., None], outputs.nar, noise),
        aux=jnp.where(masked[..., None], outputs.aux, noise),
        length=outputs.length.at[4].add(3.0),
    )
    before, after = (losses.terms(o, *batch, LossConfig(), IDS) for o in (outputs, changed))
    for name in before:
        np.testing.assert_allclose(before[name], after[name], rtol=1e-6)


@pytest.mark.parametrize("objective", ["janus", "cmlm"])
def test_nothing_masked_costs_nothing(outputs, batch, objective):
    target, masked = batch
    config = LossConfig(objective=objective)

    def loss(logits):
        found = losses.terms(SimpleNamespace(**logits), target, jnp.zeros_like(masked), config, IDS)
        return losses.total(found, config), found

    (total, found), gradient = jax.value_and_grad(loss, has_aux=True)(vars(outputs))
    assert np.isfinite(total)
    for name, term in found.items():
        if name.removeprefix("nll_") not in ("ar", "length"):
            assert (float(term[0]), float(term[1]), float(losses.mean(term))) == (0, 0, 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert not gradient["nar"].any()
    assert not gradient["aux"].any()


def test_a_batch_of_fillers_costs_nothing(outputs, batch):
    target, masked = (jnp.zeros_like(x) for x in batch)
    config = LossConfig()
    assert losses.total(losses.terms(outputs, target, masked, config, IDS), config) == 0


def test_weights_are_counted_once_over_the_whole_batch(outputs, batch):
    """Sums of parts over the weight of the whole: long and short rows together, as in one batch."""
    config = LossConfig()
    whole = losses.terms(outputs, *batch, config, IDS)
    halves = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = SimpleNamespace(**{k: v[rows] for k, v in vars(outputs).items()})
        halves.append(losses.terms(part, *(x[rows] for x in batch), config, IDS))
    for name, (value, weight) in whole.items():
        np.testing.assert_allclose(halves[0][name][0] + halves[1][name][0], value, rtol=1e-5)
        assert halves[0][name][1] + halves[1][name][1] == weight
    assert {k: float(v) for k, v in losses.weights(*batch, config, IDS).items()} == {
        name: float(whole[name][1]) for name in losses.coefficients(config)
    }


# Objectives ------------------------------------------------------------------------------------------


def test_coefficients_of_the_objectives():
    assert losses.coefficients(LossConfig()) == {
        "ar": 1.0,
        "nar": 0.5,
        "aux": 0.5,
        "length": 0.1,
        "kl_nar_aux": 1.0,
        "kl_ar_aux": 3.0,
        "kl_ar_nar": 1.0,
    }
    odd = LossConfig(ar=9.0, nar=9.0, length=0.2, rdrop_alpha=3.0)
    by_name = {o: losses.coefficients(dataclasses.replace(odd, objective=o)) for o in ("ar", "cmlm", "rdrop")}
    assert by_name == {
        "ar": {"ar": 1.0},
        "cmlm": {"nar": 1.0, "length": 0.2},
        "rdrop": {"ar": 1.0, "kl_rdrop": 1.5},
    }


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (LossConfig(), "ar nar aux"),
        (LossConfig(aux=0.0, kl_nar_aux=0.0, kl_ar_aux=0.0), "ar nar"),
        (LossConfig(aux=0.0, kl_nar_aux=0.0), "ar nar aux"),
        (LossConfig(nar=0.0, kl_ar_nar=0.0, kl_nar_aux=0.0), "ar nar aux"),  # AUX attends NAR content
        (LossConfig(aux=0.0, nar=0.0, kl_nar_aux=0.0, kl_ar_aux=0.0, kl_ar_nar=0.0), "ar"),
        (LossConfig(ar=0.0, kl_ar_aux=0.0, kl_ar_nar=0.0), "nar aux"),
        (LossConfig(ar=0.0, kl_ar_aux=0.0), "ar nar aux"),
        (LossConfig(objective="ar"), "ar"),
        (LossConfig(objective="rdrop"), "ar"),
        (LossConfig(objective="cmlm"), "nar"),
    ],
)
def test_only_the_streams_that_are_read_are_needed(config, needed):
    found = losses.streams_needed(config)
    assert {name for name, yes in found.items() if yes} == set(needed.split())
    assert found.keys() == {"ar", "nar", "aux"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LossConfig(), "ar nar aux"),
        (LossConfig(aux=0.0, kl_nar_aux=0.0, kl_ar_aux=0.0), "ar nar"),
        (LossConfig(nar=0.0, kl_ar_nar=0.0, kl_nar_aux=0.0), "ar aux"),  # NAR is there, untaught
        (LossConfig(nar=0.0), "ar nar aux"),
        (LossConfig(nar=0.0, kl_learners="ar"), "ar aux"),
        (LossConfig(ar=0.0, kl_learners="nar_aux"), "nar aux"),
        (LossConfig(objective="ar"), "ar"),
        (LossConfig(objective="rdrop"), "ar"),
        (LossConfig(objective="cmlm"), "nar"),
    ],
)
def test_what_some_term_teaches(config, expected):
    assert losses.taught(config) == set(expected.split())


def test_without_aux_its_logits_may_be_missing(outputs, batch):
    config = LossConfig(aux=0.0, kl_nar_aux=0.0, kl_ar_aux=0.0)
    bare = SimpleNamespace(**{**vars(outputs), "aux": None})
    found = losses.terms(bare, *batch, config, IDS)
    assert found.keys() == {"ar", "nll_ar", "nar", "nll_nar", "length", "kl_ar_nar"}
    full = losses.terms(outputs, *batch, LossConfig(), IDS)
    for name, term in found.items():
        np.testing.assert_allclose(term, full[name])


def test_rdrop_reads_two_passes(outputs, batch):
    target, masked = batch
    second = jnp.asarray(np.random.default_rng(3).normal(size=(B, T, V)), jnp.float32)
    config = LossConfig(objective="rdrop", rdrop_alpha=4.0)
    both = SimpleNamespace(
        ar=jnp.concatenate([outputs.ar, second]), nar=None, aux=None, length=outputs.length
    )
    found = losses.terms(both, target, masked, config, IDS)
    items = [
        plain_terms(SimpleNamespace(**{**vars(outputs), "ar": ar}), target, masked, 0.1)
        for ar in (outputs.ar, second)
    ]
    for name in ("ar", "nll_ar"):
        np.testing.assert_allclose(
            losses.mean(found[name]), np.mean(items[0][name] + items[1][name]), rtol=1e-5
        )
    p, q = log_softmax(outputs.ar), log_softmax(second)
    kl = [plain_kl(p[b, t], q[b, t]) for b, t in np.ndindex(B, T) if t > 0 and target[b, t] != IDS.pad]
    np.testing.assert_allclose(losses.mean(found["kl_rdrop"]), np.mean(kl), rtol=1e-5)
    expected = np.mean(items[0]["ar"] + items[1]["ar"]) + 4.0 / 2 * np.mean(kl)
    np.testing.assert_allclose(losses.total(found, config), expected, rtol=1e-5)


# Pieces ----------------------------------------------------------------------------------------------


def test_symmetric_kl_by_its_definition():
    rng = np.random.default_rng(4)
    p, q = (log_softmax(rng.normal(size=(3, 4, V)) * 3) for _ in range(2))
    ours = losses.symmetric_kl(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    expected = [[plain_kl(p[i, j], q[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.symmetric_kl(q, p), expected, rtol=1e-5)
    assert (losses.symmetric_kl(p, p) == 0).all()


def test_both_sides_of_a_kl_learn(outputs):
    """Against finite differences of the definition."""
    p, q = (np.asarray(x[0, 1], np.float64) for x in (outputs.ar, outputs.aux))

    def kl(a, b):
        return losses.symmetric_kl(jax.nn.log_softmax(a), jax.nn.log_softmax(b))

    left, right = jax.grad(kl, (0, 1))(outputs.ar[0, 1], outputs.aux[0, 1])

    def numeric(f, x, h=1e-6):
        return [(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(V)]

    np.testing.assert_allclose(
        left, numeric(lambda x: plain_kl(log_softmax(x), log_softmax(q)), p), atol=1e-4
    )
    np.testing.assert_allclose(
        right, numeric(lambda x: plain_kl(log_softmax(p), log_softmax(x)), q), atol=1e-4
    )
    assert np.abs(left).max() > 1e-2
    assert np.abs(right).max() > 1e-2


def test_smoothing_spreads_over_the_whole_vocabulary():
    """Specials and the truth itself included, and no eps / (V - 1)."""
    log_p = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    smoothed, nll = losses.label_smoothed(log_p, jnp.asarray([1]), 0.2)
    np.testing.assert_allclose(nll, [2 * np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(smoothed, [(0.8 * 2 + 0.2 * (1 + 2 + 3 + 3) / 4) * np.log(2)], rtol=1e-6)


def test_a_target_longer_than_the_table_is_its_last_class(outputs, batch):
    target, masked = batch
    config = LossConfig(objective="cmlm")
    sharp = jnp.full((B, C), -50.0).at[:, C - 1].set(50.0)
    two = SimpleNamespace(ar=None, nar=outputs.nar[:2], aux=None, length=sharp[:2])
    found = losses.terms(two, target[:2], masked[:2], config, IDS)
    assert losses.mean(found["length"]) == 0  # both have 8 tokens, the table ends at 6
