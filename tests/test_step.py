"""One update: what it must not depend on, what it refuses, and that every objective learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from janus_jax import batch as batches
from janus_jax import config, losses, mesh, optim, step

ROWS, LENGTH, WORDS = 16, 8, 20
BASE = config.from_dict(
    {
        "batch": {"buckets": [LENGTH], "tokens": ROWS * LENGTH, "mask_rate": 0.6},  # 5 slots hold M
        "model": {
            "vocab_size": WORDS,
            "dim": 16,
            "ffn": 32,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "max_positions": LENGTH,
            "max_length": 12,
            "dropout": 0.0,
        },
        # A large eps: with the usual one Adam makes a full step of rounding noise where a gradient is zero.
        "optim": {"lr": 0.02, "schedule": "constant", "warmup_steps": 0, "eps": 1e-3, "ema": 0.5},
        "loss": {"kl_ar_aux": 1.0},
    }
)
DROPOUT = {"dropout": 0.3}

init_state = jax.jit(step.init_state, static_argnums=0)
train_step = jax.jit(step.train_step, static_argnames="config")
eval_step = jax.jit(step.eval_step, static_argnames="config")


def changed(base=BASE, **sections):
    """`base` with {section: {key: value}} replaced."""
    return dataclasses.replace(
        base, **{name: dataclasses.replace(getattr(base, name), **keys) for name, keys in sections.items()}
    )


def copy_task(rows=ROWS, seed=0):
    """A batch whose targets are its sources, 4 to 8 tokens long, some of the inner tokens masked."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, LENGTH), np.int32)
    for row in tokens:
        words = rng.integers(5, WORDS, rng.integers(2, LENGTH - 1))
        row[: len(words) + 2] = [1, *words, 2]
    return batches.corrupted(
        np.arange(rows, dtype=np.int32), tokens, tokens, [rng] * rows, BASE.batch, BASE.model.ids
    )


@pytest.fixture(scope="module")
def batch():
    return copy_task()


@pytest.fixture(scope="module")
def start():
    """A state whose parameters are far enough from zero for every term to count."""
    state, rng = init_state(BASE), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), state.params)
    return state._replace(params=params, ema=params)


@pytest.fixture(scope="module")
def updated(start, batch):
    """(state, metrics) of one update of BASE: what the others are compared with."""
    return train_step(start, batch, BASE)


def test_the_length_loss_reaches_the_encoder_only_where_asked(start, batch):
    def gradient(config):
        part = jax.tree.map(jnp.asarray, batch)
        weights = losses.weights(part["target"], part["masked"], config.loss, config.model.ids)
        objective = functools.partial(step.objective, part=part, config=config, key=None, weights=weights)
        return jax.jit(jax.grad(lambda params: objective(params)[0]))(start.params)

    without = gradient(changed(loss={"length": 0.0}))
    table = []
    for reaches in (True, False):
        found = gradient(changed(model={"length_gradient": reaches}))
        table.append(found.pop("length_table"))
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, {k: without[k] for k in found})
        encoder = max(jax.tree.leaves(moved["encoder"]))
        assert (encoder > 1e-3) is reaches
        assert max(jax.tree.leaves(moved["decoder"])) < 1e-6
        if not reaches:
            assert max(jax.tree.leaves(moved)) < 1e-6
    np.testing.assert_allclose(*table, rtol=1e-5)
    assert float(jnp.abs(table[0]).max()) > 1e-3
    assert not without["length_table"].any()


def assert_same_update(ours, expected):
    """Same metrics, gradients (Adam's first moments) and parameters, to float tolerance."""
    (state, metrics), (other, others) = ours, expected
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-4, err_msg=name)
    gradients = [optax.tree_utils.tree_get(s.opt_state, "mu") for s in (state, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, other.params)


def assert_unchanged(before, after):
    jax.tree.map(np.testing.assert_array_equal, before, after)


# What an update does not depend on -------------------------------------------------------------------


def test_kl_weights_rise_over_the_first_updates(batch):
    loss = dataclasses.replace(BASE.loss, kl_warmup=0.5)
    config = dataclasses.replace(BASE, loss=loss, train=dataclasses.replace(BASE.train, steps=4))
    state = init_state(config)
    update = jax.jit(functools.partial(train_step, config=config))
    for at, scale in enumerate((0.0, 0.5, 1.0, 1.0)):
        state, metrics = update(state, batch)
        assert float(metrics["kl_scale"]) == scale, at
        total = sum(
            c * metrics[name] * (scale if name in losses.DIVERGENCES else 1)
            for name, c in losses.coefficients(loss).items()
        )
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_the_metrics_of_an_update(updated, start, batch):
    state, metrics = updated
    terms = {*losses.coefficients(BASE.loss), "nll_ar", "nll_nar", "nll_aux"}
    assert metrics.keys() == terms | {"loss", "grad_norm", "lr", "tokens", "masked", "ok", "skipped"}
    assert all(v.shape == () and v.dtype == jnp.float32 for v in metrics.values())
    total = sum(c * metrics[name] for name, c in losses.coefficients(BASE.loss).items())
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    real = batch["target"] != 0
    assert metrics["tokens"] == real.sum() - ROWS
    np.testing.assert_allclose(metrics["masked"], batch["masked"].sum() / (real.sum() - ROWS), rtol=1e-6)
    assert metrics["lr"] == np.float32(0.02)
    assert (metrics["ok"], metrics["skipped"], state.step, state.skipped) == (1, 0, 1, 0)
    mu = optax.tree_utils.tree_get(state.opt_state, "mu")
    np.testing.assert_allclose(metrics["grad_norm"], optim.global_norm(mu) / (1 - BASE.optim.b1), rtol=1e-4)
    np.testing.assert_array_equal(state.key, start.key)


def test_four_micro_batches_are_one_batch(start, batch, updated):
    """Although their parts hold different numbers of tokens and of masked tokens."""
    parts = batch["masked"].sum(1).reshape(-1, 4).sum(0)
    assert len(set(parts.tolist())) > 1
    assert_same_update(train_step(start, batch, changed(train={"microbatches": 4})), updated)


@pytest.mark.parametrize("objective", ["janus", "ar", "cmlm"])
def test_the_plain_version_is_the_same_update(start, batch, updated, objective):
    """Every stream at every place in every layer, and all logits at once."""
    chosen = changed(loss={"objective": objective})
    fast = updated if objective == "janus" else train_step(start, batch, chosen)
    assert batches.capacity(LENGTH, BASE.batch, BASE.model.ids) == 5
    assert_same_update(train_step(start, batch, changed(chosen, loss={"gather": False, "chunk": 0})), fast)


def test_more_masks_than_the_sampler_draws_are_refused(start, batch):
    full = batch | {"masked": batch["target"] > 2}
    assert full["masked"].sum(1).max() == 6
    after, metrics = train_step(start, full, BASE)
    assert metrics["ok"] == 0
    assert np.isnan(metrics["loss"])
    assert_unchanged(start.params, after.params)


LAYOUTS = [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}]


def on_devices(state, batch, chosen, layout):
    """One update with everything laid out on eight devices, compiled as training does."""
    devices = mesh.make_mesh(config.MeshConfig(**layout))
    shardings = mesh.state_shardings(devices, state)
    state, batch = jax.device_put(state, shardings), mesh.global_batch(devices, batch)
    update = jax.jit(
        functools.partial(step.train_step, config=chosen),
        out_shardings=(shardings, mesh.replicated(devices)),
    )
    with jax.set_mesh(devices):
        return update.lower(state, batch).compile()(state, batch)


@pytest.mark.parametrize(
    ("layout", "parts"), [*((layout, 1) for layout in LAYOUTS), (LAYOUTS[-1], 2)], ids=str
)
def test_eight_devices_are_one(start, batch, updated, layout, parts, capfd):
    state, metrics = on_devices(start, batch, changed(train={"microbatches": parts}), layout)
    assert_same_update((state, metrics), updated)
    kernel = state.params["decoder"]["layers"]["ffn"]["rise"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    pieces = layout.get("fsdp", 1) * layout.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * pieces == kernel.size
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("objective", ["ar", "cmlm", "rdrop"])
def test_every_objective_on_eight_devices_with_the_same_dropout(start, batch, objective):
    """(`janus` with dropout: tests/test_layouts.py.)"""
    chosen = changed(model=DROPOUT, loss={"objective": objective})
    assert_same_update(
        on_devices(start, batch, chosen, {"fsdp": 2, "tensor": 2}), train_step(start, batch, chosen)
    )


def test_filler_rows_are_nothing(start, updated):
    few = copy_task(rows=ROWS)
    empty = np.zeros((ROWS, LENGTH), np.int32)
    nobody = np.full(ROWS, batches.FILLER, np.int32)
    wide = batches.corrupted(nobody, empty, empty, [None] * ROWS, BASE.batch, BASE.model.ids)
    both = {name: np.concatenate([few[name], wide[name]]) for name in few}
    found, alone = eval_step(start.params, both, BASE), eval_step(start.params, few, BASE)
    for name, (value, weight) in found.items():
        np.testing.assert_allclose(value, alone[name][0], rtol=1e-5)
        assert weight == alone[name][1]
        np.testing.assert_allclose(losses.mean(found[name]), updated[1][name], rtol=1e-5)


# Random numbers --------------------------------------------------------------------------------------

NOISY = changed(model=DROPOUT, loss={"objective": "ar"})


def test_the_same_seed_gives_the_same_bits(start, batch):
    runs = []
    for _ in range(2):
        state, seen = start, []
        for _ in range(3):
            state, metrics = train_step(state, batch, NOISY)
            seen.append(metrics)
        runs.append((state, seen))
    assert_unchanged(*runs)
    other = init_state(dataclasses.replace(NOISY, seed=1))
    assert (other.key != start.key).any()
    assert (other.params["target_table"] != start.params["target_table"]).all()


def test_dropout_differs_by_step_and_by_key(start, batch):
    def loss(**replaced):
        return float(train_step(start._replace(**replaced), batch, NOISY)[1]["loss"])

    by_step = [loss(step=jnp.int32(n)) for n in (0, 1, 2, 1)]
    assert len(set(by_step)) == 3
    assert by_step[1] == by_step[3]
    assert loss(key=start.key + 1) not in by_step


def test_evaluation_has_no_dropout(start, batch):
    calm = eval_step(start.params, batch, changed(NOISY, model={"dropout": 0.0}))
    noisy = eval_step(start.params, batch, NOISY)
    for name in calm:
        np.testing.assert_allclose(noisy[name], calm[name], rtol=1e-6)


# Refused updates -------------------------------------------------------------------------------------


def test_an_exploded_update_is_not_applied(start, batch):
    strict = changed(loss={"objective": "ar"}, train={"max_grad_norm": 1e-3})
    after, metrics = train_step(start, batch, strict)
    assert (metrics["ok"], metrics["skipped"], after.skipped, after.step) == (0, 1, 1, 1)
    assert 1e-3 < metrics["grad_norm"] < 1e3
    for name in ("params", "opt_state", "ema", "key"):
        assert_unchanged(getattr(start, name), getattr(after, name))
    again, metrics = train_step(after, batch, strict)
    assert (metrics["skipped"], again.skipped, again.step) == (2, 2, 2)


def test_a_nan_goes_no_further(start, batch):
    poisoned = {**start.params, "length_table": start.params["length_table"].at[3].set(jnp.nan)}
    state = start._replace(params=poisoned)
    after, metrics = train_step(state, batch, BASE)
    assert metrics["ok"] == 0
    assert not np.isfinite(metrics["loss"])
    assert_unchanged(state.params, after.params)
    assert_unchanged(state.opt_state, after.opt_state)


def test_skipped_updates_count_neither_for_the_rate_nor_for_the_average(start, batch):
    rising = {"schedule": "constant", "warmup_steps": 8}
    strict = changed(loss={"objective": "ar"}, optim=rising, train={"max_grad_norm": 1e-3})
    good = changed(loss={"objective": "ar"}, optim=rising)
    state = start
    for _ in range(3):
        state, skipped = train_step(state, batch, strict)
    after, metrics = train_step(state, batch, good)
    _, first = train_step(start, batch, good)
    assert skipped["lr"] == metrics["lr"] == first["lr"]
    for name, value in after.params.items():
        jax.tree.map(np.testing.assert_array_equal, after.ema[name], value)


def test_a_good_update_ends_a_row_of_skipped_ones(start, batch):
    after, metrics = train_step(start._replace(skipped=jnp.int32(7)), batch, BASE)
    assert (metrics["ok"], metrics["skipped"], after.skipped) == (1, 0, 0)


# Learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", config.OBJECTIVES)
def test_every_objective_learns(start, batch, objective):
    chosen = changed(loss={"objective": objective}, model=DROPOUT if objective == "rdrop" else {})
    state, seen = start, []
    for _ in range(30):
        state, metrics = train_step(state, batch, chosen)
        assert metrics["ok"] == 1
        seen.append({name: float(value) for name, value in metrics.items()})
    first, last = seen[0], seen[-1]
    assert last["loss"] < 0.8 * first["loss"]
    for name in ("nll_ar", "nll_nar", "nll_aux", "length"):
        assert name not in first or last[name] < 0.8 * first[name], name
    if objective == "rdrop":
        assert all(s["kl_rdrop"] > 0 for s in seen)


def test_rdrop_without_dropout_is_plain_ar(start, batch):
    metrics = {}
    for objective in ("ar", "rdrop"):
        _, metrics[objective] = train_step(start, batch, changed(loss={"objective": objective}))
    assert metrics["rdrop"]["kl_rdrop"] == 0
    for name in ("loss", "ar", "nll_ar", "grad_norm", "tokens"):
        np.testing.assert_allclose(metrics["rdrop"][name], metrics["ar"][name], rtol=1e-4, err_msg=name)


def test_rdrop_is_evaluated_as_ar(start, batch):
    by = {o: eval_step(start.params, batch, changed(loss={"objective": o})) for o in ("ar", "rdrop")}
    assert by["rdrop"].keys() == by["ar"].keys() == {"ar", "nll_ar"}
    for name in by["ar"]:
        np.testing.assert_allclose(by["rdrop"][name], by["ar"][name])


def test_the_average_of_parameters(start, batch):
    chosen, state = changed(loss={"objective": "ar"}), start
    assert_unchanged(state.params, state.ema)
    history = []
    for _ in range(3):
        state, _ = train_step(state, batch, chosen)
        history.append(np.asarray(state.params["target_table"], np.float64))
    weights = np.array([0.25, 0.5, 1.0])  # decay ** age
    expected = np.tensordot(weights / weights.sum(), history, axes=1)
    np.testing.assert_allclose(state.ema["target_table"], expected, rtol=1e-4, atol=1e-6)


# Compilation -----------------------------------------------------------------------------------------


def test_one_compilation_per_shape_and_the_state_may_be_donated():
    chosen = changed(loss={"objective": "ar"})
    update = jax.jit(step.train_step, static_argnames="config", donate_argnums=0)
    state = init_state(chosen)  # a state of its own, to be donated
    for seed in range(3):
        state, _ = update(state, copy_task(seed=seed), config=chosen)
    assert update._cache_size() == 1
    assert state.step == 3


def test_the_state_is_a_function_of_the_configuration_alone():
    abstract = jax.eval_shape(functools.partial(step.init_state, changed(optim={"ema": 0.0})))
    assert abstract.ema is None
    assert (abstract.step.dtype, abstract.key.dtype) == (jnp.int32, jnp.uint32)
    assert_unchanged(init_state(BASE), init_state(BASE))
