"""The chunked loss against the plain one: values, gradients, what it reads, what it keeps in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from janus_jax import chunked, losses, sharding
from janus_jax.config import OBJECTIVES, LossConfig, SpecialIds
from janus_jax.models import Outputs, Projection, project

IDS = SpecialIds()
B, T, D, V = 6, 9, 8, 23
NO_KL = {"kl_nar_aux": 0.0, "kl_ar_aux": 0.0, "kl_ar_nar": 0.0}
CONFIGS = {
    **{objective: LossConfig(objective=objective) for objective in OBJECTIVES},
    "without AUX": LossConfig(aux=0.0, kl_nar_aux=0.0, kl_ar_aux=0.0),
    "without KL": LossConfig(**NO_KL),
    "AR only in a KL": LossConfig(ar=0.0),
    "NAR and AUX": LossConfig(ar=0.0, kl_ar_aux=0.0, kl_ar_nar=0.0),
    "AR of janus": LossConfig(aux=0.0, nar=0.0, **NO_KL),
    "AR teaches": LossConfig(kl_learners="nar_aux"),
    "AR learns": LossConfig(kl_learners="ar"),
    "AUX is only tied to": LossConfig(aux=0.0, kl_learners="ar"),
    "AR is only tied to": LossConfig(ar=0.0, kl_learners="nar_aux"),
    "AR alone learns": LossConfig(nar=0.0, aux=0.0, kl_learners="ar"),
    "one way": LossConfig(kl_form="one_way"),
    "AUX teaches one way": LossConfig(kl_form="one_way", kl_learners="ar", kl_nar_aux=0.0, kl_ar_nar=0.0),
    "AUX is taught one way": LossConfig(kl_form="one_way", aux=0.0, kl_learners="nar_aux"),
    "no smoothing": LossConfig(label_smoothing=0.0),
}


@pytest.fixture(scope="module")
def batch():
    """(target, masked): rows of many lengths, one with nothing masked, and a filler row."""
    rng = np.random.default_rng(0)
    lengths = np.array([9, 9, 6, 3, 8, 0])
    target, place = rng.integers(5, V, (B, T)).astype(np.int32), np.arange(T)
    target[:, 0] = IDS.bos
    target[place == lengths[:, None] - 1] = IDS.eos
    target[place >= lengths[:, None]] = IDS.pad
    masked = (rng.random((B, T)) < 0.5) & (target >= 5)
    masked[1] = False
    assert masked.sum() > 5
    return jnp.asarray(target), jnp.asarray(masked)


def inputs(objective="janus", bias=True, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    rows = {"ar": 2 * B if objective == "rdrop" else B, "nar": B, "aux": B}
    states = {name: jnp.asarray(rng.normal(size=(n, T, D)), dtype) for name, n in rows.items()}
    table, offset = rng.normal(size=(V, D)), rng.normal(size=V)
    return states, Projection(
        jnp.asarray(table, jnp.float32), jnp.asarray(offset, jnp.float32) if bias else None
    )


@functools.partial(jax.jit, static_argnames="config")
def plain(states, projection, target, masked, config, scale=None):
    """((objective, sums), gradient) by way of all logits."""
    needed = losses.streams_needed(config)

    def loss(states, projection):
        logits = {n: project(projection, x) if needed[n] else None for n, x in states.items()}
        outputs = Outputs(**logits, length=jnp.zeros((target.shape[0], 4)))
        found = {k: v for k, v in losses.terms(outputs, target, masked, config, IDS).items() if k != "length"}
        total = sum(c * losses.mean(found[n]) for n, c in losses.scaled(config, scale).items() if n in found)
        return total, {name: value for name, (value, _) in found.items()}

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(states, projection)


@functools.partial(jax.jit, static_argnames="config")
def in_chunks(states, projection, target, masked, config, scale=None):
    needed = losses.streams_needed(config)

    def loss(states, projection):
        read = {name: x for name, x in states.items() if needed[name]}
        weights = losses.weights(target, masked, config, IDS)
        return chunked.objective(
            read, projection, project, target, masked, config, IDS, weights=weights, scale=scale
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(states, projection)


def assert_same(ours, expected, rtol=1e-5, atol=1e-6):
    (value, sums), gradient = ours
    (other, others), reference = expected
    assert sums.keys() == others.keys()
    np.testing.assert_allclose(value, other, rtol=rtol)
    for name in sums:
        np.testing.assert_allclose(sums[name], others[name], rtol=rtol, err_msg=name)
    assert jax.tree.structure(gradient) == jax.tree.structure(reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), gradient, reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_so_are_those_that_other_devices_compute(batch, name, off_the_cpu):
    config = dataclasses.replace(CONFIGS[name], chunk=4)
    states, projection = inputs(config.objective)
    states = {n: 3 * x for n, x in states.items()}  # distributions that are far apart, too
    expected = plain(states, projection, *batch, CONFIGS[name])
    forms = off_the_cpu()
    found = jax.jit(functools.partial(in_chunks.__wrapped__, config=config))(states, projection, *batch)
    assert forms
    assert_same(found, expected, atol=5e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_numbers_are_those_of_the_plain_loss(batch, name):
    config = dataclasses.replace(CONFIGS[name], chunk=4)
    states, projection = inputs(config.objective)
    assert_same(
        in_chunks(states, projection, *batch, config), plain(states, projection, *batch, CONFIGS[name])
    )


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_kl_terms_scaled(batch, scale):
    states, projection = inputs()
    config = LossConfig(chunk=4, kl_warmup=0.5)
    ours = in_chunks(states, projection, *batch, config, jnp.float32(scale))
    assert_same(ours, plain(states, projection, *batch, config, jnp.float32(scale)))


@pytest.mark.parametrize("chunk", [1, 7, 54, 1000])
def test_the_size_of_a_chunk_does_not_matter(batch, chunk):
    states, projection = inputs(bias=False)
    config = LossConfig(chunk=chunk)
    expected = plain(states, projection, *batch, LossConfig())
    assert_same(in_chunks(states, projection, *batch, config), expected)


@pytest.mark.parametrize("layout", [(2, 1, 1), (2, 1, 3), (3, 2, 1)], ids=str)
def test_the_number_of_shares_does_not_matter(batch, layout):
    """Though the shares have different numbers of masked slots, and a vocabulary cut by 3 is cut unevenly."""
    states, projection = inputs()
    config = LossConfig(chunk=2)
    expected = in_chunks(states, projection, *batch, config)
    devices = np.array(jax.devices()[: np.prod(layout)]).reshape(layout)
    with jax.set_mesh(Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)):
        assert_same(in_chunks(states, projection, *batch, config), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_slots_that_nobody_reads_count_for_nothing(batch, objective):
    """Neither in value nor in gradient: padding, BOS, and NAR and AUX outside M may hold anything finite."""
    target, masked = batch
    config = LossConfig(objective=objective, chunk=4)
    states, projection = inputs(objective)
    tokens = losses.items(target, IDS)[0] > 0
    read = {"ar": jnp.tile(tokens, (states["ar"].shape[0] // B, 1)), "nar": masked, "aux": masked}
    noisy = {name: jnp.where(read[name][..., None], x, 1e3) for name, x in states.items()}
    clean, noise = (in_chunks(s, projection, target, masked, config) for s in (states, noisy))
    jax.tree.map(np.testing.assert_array_equal, clean, noise)
    for name, gradient in clean[1][0].items():
        assert not np.asarray(gradient)[~np.asarray(read[name])].any(), name


def test_nothing_masked_costs_nothing(batch):
    target, masked = batch
    config = LossConfig(objective="cmlm", chunk=4)
    (value, sums), gradient = in_chunks(*inputs(), target, jnp.zeros_like(masked), config)
    assert value == 0
    assert all(x == 0 for x in sums.values())
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


def test_parts_of_a_batch_add_up_to_the_whole(batch):
    """With the weights of the whole, as micro-batches have it."""
    target, masked = batch
    config = LossConfig(chunk=4)
    states, projection = inputs()
    weights = losses.weights(target, masked, config, IDS)

    def loss(projection, first, last):
        rows = slice(first, last)
        part = {name: x[rows] for name, x in states.items()}
        return chunked.objective(
            part, projection, project, target[rows], masked[rows], config, IDS, weights=weights
        )

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    whole, *parts = (gradient(projection, *rows) for rows in ((0, 6), (0, 2), (2, 6)))
    total = jax.tree.map(jnp.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, total)


def test_the_gradient_follows_what_the_objective_is_multiplied_with(batch):
    config = LossConfig(chunk=4)
    states, projection = inputs()
    weights = losses.weights(*batch, config, IDS)

    def loss(projection, factor):
        value, sums = chunked.objective(states, projection, project, *batch, config, IDS, weights=weights)
        return factor * value + sum(sums.values())  # the sums carry no gradient

    gradient = jax.jit(jax.grad(loss))
    once, thrice = (gradient(projection, factor) for factor in (1.0, 3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)
    assert any(np.asarray(g).any() for g in jax.tree.leaves(once))


def test_bfloat16_states_get_bfloat16_gradients_and_the_table_float32_ones(batch):
    states, projection = inputs(dtype=jnp.bfloat16)
    (value, _), (by_states, by_projection) = in_chunks(states, projection, *batch, LossConfig(chunk=4))
    exact = in_chunks(*inputs(), *batch, LossConfig(chunk=4))
    assert {g.dtype for g in by_states.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {g.dtype for g in by_projection} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(value, exact[0][0], rtol=0.02)
    largest = np.abs(exact[1][1].table).max()
    np.testing.assert_allclose(by_projection.table, exact[1][1].table, atol=0.03 * largest)


def test_memory_is_that_of_a_chunk():
    """Four times the slots: the vocabulary-sized temporaries stay, those of the plain loss grow."""
    config, vocabulary = LossConfig(chunk=16), 2000

    def temporary(function, rows):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        states = {name: shape((rows, T, D)) for name in ("ar", "nar", "aux")}
        projection = Projection(shape((vocabulary, D)), None)
        target, masked = shape((rows, T), dtype=jnp.int32), shape((rows, T), dtype=jnp.bool_)
        compiled = function.lower(states, projection, target, masked, config=config).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_logit_array = 64 * T * vocabulary * 4
    assert temporary(plain, 64) - temporary(plain, 16) > 0.75 * one_logit_array
    ours = [temporary(in_chunks, rows) for rows in (16, 64)]
    assert ours[1] < 0.5 * one_logit_array
    assert ours[1] - ours[0] < 64 * T * D * 4 * 16  # states and gradients of states only
