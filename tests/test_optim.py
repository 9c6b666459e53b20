import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from janus_jax import optim
from janus_jax.config import OptimConfig


def fairseq_inverse_sqrt(n, lr, init_lr, warmup):
    if n < warmup:
        return init_lr + n * (lr - init_lr) / warmup
    return lr * warmup**0.5 * n**-0.5


def fairseq_polynomial(n, lr, end_lr, warmup, power, total):  # its warm-up starts at 0
    if warmup > 0 and n <= warmup:
        return n / warmup * lr
    if n >= total:
        return end_lr
    return (lr - end_lr) * (1 - (n - warmup) / (total - warmup)) ** power + end_lr


COUNTS = (0, 1, 2, 99, 100, 101, 500, 999, 1000, 1001, 5000)


def test_inverse_sqrt_is_fairseqs():
    config = OptimConfig(lr=5e-4, init_lr=1e-7, warmup_steps=100)
    rate = optim.schedule(config, steps=1000)
    assert float(rate(0)) == pytest.approx(1e-7)  # the very first update
    for n in COUNTS:
        assert float(rate(n)) == pytest.approx(fairseq_inverse_sqrt(n, 5e-4, 1e-7, 100), rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 100])
def test_polynomial_is_fairseqs(power, warmup):
    config = OptimConfig(
        lr=1e-4, schedule="polynomial", init_lr=0.0, end_lr=1e-6, power=power, warmup_steps=warmup
    )
    rate = optim.schedule(config, steps=1000)
    for n in COUNTS:
        assert float(rate(n)) == pytest.approx(
            fairseq_polynomial(n, 1e-4, 1e-6, warmup, power, 1000), rel=1e-4
        )


def test_constant_rises_then_stays():
    rate = optim.schedule(OptimConfig(lr=2e-3, schedule="constant", init_lr=1e-3, warmup_steps=10), steps=50)
    np.testing.assert_allclose(
        [rate(n) for n in (0, 5, 10, 49, 70)], [1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["inverse_sqrt", "polynomial", "constant"])
def test_no_warmup_starts_at_the_peak_and_stays_finite(kind):
    rate = optim.schedule(OptimConfig(lr=3e-4, schedule=kind, warmup_steps=0), steps=10)
    values = np.array([rate(n) for n in range(20)])
    assert values[0] == pytest.approx(3e-4)
    assert np.isfinite(values).all()
    assert (np.diff(values) <= 0).all()


def test_schedules_are_compilable_with_integer_counts():
    rate = optim.schedule(OptimConfig(warmup_steps=10), steps=100)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(rate))(jnp.arange(30)), [rate(n) for n in range(30)], rtol=1e-6
    )


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"optim\.schedule.*'cosine'"):
        optim.schedule(OptimConfig(schedule="cosine"), steps=10)


def tree(rng):
    return {"a": {"kernel": rng.normal(size=(3, 4))}, "bias": rng.normal(size=5)}


def adam_with_decay(params, grads, config, rates):
    """Plain numpy, float64, one array: fairseq's update rule."""
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        m = config.b1 * m + (1 - config.b1) * g
        v = config.b2 * v + (1 - config.b2) * g * g
        corrected = m / (1 - config.b1**t) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        params = params - lr * config.weight_decay * params - lr * corrected
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
def test_adam_with_decay_agrees_with_numpy(clip_norm):
    config = OptimConfig(lr=1e-2, init_lr=1e-3, warmup_steps=3, weight_decay=0.1, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    start, grads = tree(rng), [tree(rng) for _ in range(5)]
    norms = [math.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(t))) for t in grads]
    assert min(norms) > 1.5  # so that clipping, where asked for, does something
    rates = [fairseq_inverse_sqrt(n, 1e-2, 1e-3, 3) for n in range(5)]

    tx = optim.optimizer(config, steps=5)
    params = jax.tree.map(jnp.float32, start)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)

    scales = [clip_norm / n if clip_norm else 1.0 for n in norms]
    for path in (("a", "kernel"), ("bias",)):
        pick = lambda t, path=path: t[path[0]][path[1]] if len(path) > 1 else t[path[0]]  # noqa: E731
        expected = adam_with_decay(
            pick(start), [s * pick(g) for s, g in zip(scales, grads, strict=True)], config, rates
        )
        np.testing.assert_allclose(pick(params), expected, atol=1e-6)


def test_state_has_one_structure_whatever_the_settings():
    params = {"w": jnp.ones(3)}
    plain = optim.optimizer(OptimConfig(weight_decay=0.0), 10).init(params)
    config = OptimConfig(clip_norm=1.0, weight_decay=0.1, schedule="polynomial")
    assert jax.tree.structure(plain) == jax.tree.structure(optim.optimizer(config, 10).init(params))


def test_global_norm_is_of_all_entries_in_float32():
    assert float(optim.global_norm({"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]])}})) == 5.0
    big = optim.global_norm([jnp.full(4, 300.0, jnp.float16)])  # its square overflows float16
    assert big.dtype == jnp.float32
    assert float(big) == 600.0
    assert float(optim.global_norm({})) == 0.0


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_ema_is_the_exact_weighted_mean(decay):
    rng = np.random.default_rng(1)
    history = [rng.normal(size=4) for _ in range(7)]
    ema = {"w": jnp.full(4, 100.0)}  # an initial value that must be forgotten at once
    for step, p in enumerate(history, start=1):
        ema = optim.ema_update(ema, {"w": jnp.float32(p)}, decay, jnp.int32(step))
    weights = decay ** np.arange(len(history))[::-1]
    np.testing.assert_allclose(ema["w"], np.average(history, axis=0, weights=weights), atol=2e-5)
