import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import batch, chunked, config, cost, hlo, losses, step
from janus_jax.generate import Generator
from janus_jax.models import init_params


def configuration(objective="janus", chunk=0, gather=True, **model):
    sizes = {
        "vocab_size": 120, "dim": 16, "ffn": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 3,
        "max_positions": 32, "max_length": 31, "dropout": 0.0,
    }  # fmt: skip
    return config.from_dict(
        {
            "batch": {"buckets": (12,), "tokens": 48},
            "model": {**sizes, **model},
            "loss": {"objective": objective, "chunk": chunk, "gather": gather},
            "decode": {"beam": 2, "candidates": 3, "iterations": 4},
        }
    )


def products(jaxpr):
    """FLOPs of all matrix products of a jaxpr, loops of known length counted as often as they run.

    A product of rows with rows is a reduction, its gradient no product at all.  Of branches the dearest
    counts: a step late in a long cache.  Of forms for several platforms, a CPU's.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (rows, _) = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            if contracted and len(out) > len(rows):
                total += 2 * math.prod(out) * math.prod(left[i] for i in contracted)
        if equation.params.get("branches_platforms"):  # a CPU's comes first
            total += products(equation.params["branches"][0].jaxpr)
            continue
        if equation.primitive.name == "cond":
            total += max(products(branch.jaxpr) for branch in equation.params["branches"])
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


def update(c, rows, length):
    shapes = batch.spec(rows, length).items()
    abstract = {k: jax.ShapeDtypeStruct(shape, dtype) for k, (shape, dtype) in shapes}
    state = jax.eval_shape(functools.partial(step.init_state, c))
    return functools.partial(step.train_step, config=c), state, abstract


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("objective", ["janus", "ar", "cmlm", "rdrop"])
def test_the_plain_update_has_exactly_these_products(objective, gather):
    c = configuration(objective, gather=gather)
    function, *arguments = update(c, 4, 12)
    counted = products(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert cost.train_step(c, 4, 12) == cost.Flops(counted, counted)


def test_the_classic_decoder_and_no_aux():
    for c in (configuration("ar", ar_stream="content"), no_aux(configuration())):
        function, *arguments = update(c, 4, 12)
        assert cost.train_step(c, 4, 12).model == products(jax.make_jaxpr(function)(*arguments).jaxpr)


def no_aux(c):
    values = c.to_dict()
    values["loss"] |= {"aux": 0.0, "kl_nar_aux": 0.0, "kl_ar_aux": 0.0}
    return config.from_dict(values)


def test_layers_under_remat_are_computed_once_more():
    plain, again = cost.train_step(configuration(), 4, 12), cost.train_step(configuration(remat=True), 4, 12)
    assert again.model == plain.model
    assert plain.model < again.executed < 4 / 3 * plain.model
    kept = cost.train_step(configuration(remat=True, remat_keep="products"), 4, 12)
    assert kept.executed == plain.executed


def test_xla_agrees_where_there_are_no_loops():
    c = configuration(dim=64, ffn=256, vocab_size=1000, encoder_layers=1, decoder_layers=1)
    function, *arguments = update(c, 4, 12)
    compiled = jax.jit(function).lower(*arguments).compile()
    counted = compiled.cost_analysis()
    assert 1 <= counted["flops"] / cost.train_step(c, 4, 12).model < 1.25  # XLA counts all arithmetic
    traffic = hlo.memory_bytes(hlo.parse(compiled.as_text()), hlo.Counts())
    assert 0.8 < traffic / counted["bytes accessed"] < 1.25


def test_the_chunked_loss_projects_what_it_reads():
    plain, chunked = configuration(), configuration(chunk=8)
    share = cost.masked_share(chunked.batch, chunked.model.ids, 12)
    walks = cost.loss_walks(chunked, 12)
    assert walks["loss_masked"] == cost.LossWalk(3, share * 12)
    assert walks["loss_unmasked"] == cost.LossWalk(1, 11 - share * 12)
    fewer = 3 * 12 - (3 * share * 12 + 11 - share * 12)
    difference = cost.train_step(plain, 4, 12).model - cost.train_step(chunked, 4, 12).model
    assert math.isclose(difference, 3 * 4 * fewer * 2 * 16 * 120)
    empty = cost.train_step(chunked, 4, 12, walks=4)  # a row for each walk
    assert empty.model == cost.train_step(chunked, 4, 12).model
    chunks = {n: math.ceil(walk.per_row / 8) * 8 for n, walk in walks.items()}
    computed = sum(chunks[n] * walks[n].streams for n in walks)
    needed = sum(walk.per_row * walk.streams for walk in walks.values())
    assert math.isclose(empty.executed - empty.model, 3 * 4 * (computed - needed) * 2 * 16 * 120)
    assert cost.loop_counts(chunked, 4, 12) == {
        "loss_masked": math.ceil(4 * share * 12 / 8),
        "loss_unmasked": math.ceil(4 * (11 - share * 12) / 8),
    }
    assert cost.loop_counts(plain, 4, 12) == {}
    whole, beyond = (cost.train_step(configuration(chunk=n), 4, 12) for n in (4 * 12, 1000))
    assert beyond == whole  # no chunk is larger than the slots that there are


@pytest.mark.parametrize(
    ("objective", "loops"),
    [("ar", {"loss_tokens": 6}), ("rdrop", {"loss_tokens": 6}), ("cmlm", {"loss_masked"})],
)
def test_loops_of_the_other_objectives(objective, loops):
    found = cost.loop_counts(configuration(objective, chunk=8), 4, 12)
    assert found.keys() == set(loops)
    if isinstance(loops, dict):
        assert found == loops


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ar": 0.0},
        {"nar": 0.0},
        {"nar": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0},
        {"aux": 0.0, "kl_ar_aux": 0.0, "kl_nar_aux": 0.0},
        {"aux": 0.0, "kl_ar_aux": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0},
        {"ar": 0.0, "kl_ar_aux": 0.0, "kl_ar_nar": 0.0},
    ],
)
def test_what_is_counted_is_what_the_chunked_loss_walks(changes):
    c = configuration("janus", chunk=8)
    c = dataclasses.replace(c, loss=dataclasses.replace(c.loss, **changes))
    walked = {f"loss_{walk.slots}": len(walk.streams) for walk in chunked._walks(c.loss)}
    assert {name: walk.streams for name, walk in cost.loss_walks(c, 12).items()} == walked


def test_the_share_of_masks_is_that_of_the_sampler():
    c = configuration()
    assert 0.4 < cost.masked_share(c.batch, c.model.ids, 48) < 0.6
    assert cost.masked_share(c.batch, c.model.ids, 48) == cost.masked_share(c.batch, c.model.ids, 48)


def test_decoding_against_the_products_of_its_steps():
    c = configuration()
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), c.model))
    source = jax.ShapeDtypeStruct((4, 12), jnp.int32)
    generator = Generator(c.model, c.decode)
    encode = products(jax.make_jaxpr(generator.remember)(params, source).jaxpr)
    whole = products(jax.make_jaxpr(generator.autoregressive)(params, source).jaxpr)  # loop body once
    assert cost.ar_decode(c, 4, 12, 7).model == encode + 7 * (whole - encode)

    def nar(generator):
        def decode(params, source):
            memory, lengths = generator.remember(params, source)
            return generator.non_autoregressive(params, memory, lengths, 12)

        return products(jax.make_jaxpr(decode)(params, source).jaxpr)

    whole = nar(generator)
    one = dataclasses.replace(c, decode=dataclasses.replace(c.decode, iterations=1))
    one_pass, four = (cost.nar_decode(x, 4, 12, 12).model - encode for x in (one, c))
    logits = (4 * one_pass - four) / 1.5  # the second to fourth pass read 3/4, 2/4 and 1/4 of the slots
    assert (
        whole - encode == one_pass - logits + logits / 4
    )  # bodies of loops count once, a quarter is read at once
    more = dataclasses.replace(c, decode=dataclasses.replace(c.decode, rescore=True))
    once = nar(Generator(more.model, more.decode)) - whole
    rescoring = cost.nar_decode(more, 4, 12, 12).model - cost.nar_decode(c, 4, 12, 12).model
    assert once == rescoring - logits + logits / 4


@pytest.mark.parametrize("branches", [0, 5])
def test_drafts_against_the_products_of_a_pass(branches):
    c = configuration()
    c = dataclasses.replace(c, decode=dataclasses.replace(c.decode, draft_block=4, draft_branches=branches))
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), c.model))
    source = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    generator = Generator(c.model, c.decode)
    encode = products(jax.make_jaxpr(generator.remember)(params, source).jaxpr)
    one = products(jax.make_jaxpr(generator.draft)(params, source).jaxpr) - encode  # loop body once
    assert cost.draft_decode(c, 2, 12, 5).model == encode + 5 * one


def test_slots_of_decoding_are_the_generator_s():
    c = configuration()
    assert cost.decode_slots(c, 12) == Generator(c.model, c.decode).slots(12)
    assert losses.streams_needed(c.loss) == dict.fromkeys(("ar", "nar", "aux"), True)
    assert np.isfinite(cost.nar_decode(c, 4, 12, 12).model)
