"""Parameters laid out for decoding: the same numbers, each layer's by itself, cast where they would be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import DecodeConfig, ModelConfig
from janus_jax.generate import Generator
from janus_jax.models import apart, init_params
from janus_jax.models.apart import each_layer

MODEL = ModelConfig(
    vocab_size=40, dim=16, ffn=24, heads=2, encoder_layers=2, decoder_layers=3,
    max_positions=24, max_length=20, norm="pre", tie_output=False, share_embeddings=False, output_bias=True,
)  # fmt: skip
BFLOAT16 = dataclasses.replace(MODEL, dtype="bfloat16")
DECODE = DecodeConfig(beam=2, iterations=3, candidates=2, rescore=True, max_length_b=4)


@pytest.fixture(scope="module")
def params():
    drawn = init_params(jax.random.key(3), MODEL)
    return jax.tree.map(lambda x: np.asarray(x) * 9, drawn)  # so that nothing is close to being equal


def test_layers_are_taken_apart_and_stay_so(params):
    found = apart(params, MODEL)
    assert list(found["decoder"]["layers"]) == ["0", "1", "2"]
    assert len(found["encoder"]["layers"]) == 2
    kernel = params["decoder"]["layers"]["ffn"]["rise"]["kernel"]
    np.testing.assert_array_equal(found["decoder"]["layers"]["2"]["ffn"]["rise"]["kernel"], kernel[2])
    assert found["target_table"] is params["target_table"]
    assert np.shares_memory(found["decoder"]["layers"]["2"]["ffn"]["rise"]["kernel"], kernel)  # a view
    assert jax.tree.structure(apart(found, MODEL)) == jax.tree.structure(found)
    before, after = (each_layer(p["encoder"]["layers"]) for p in (params, found))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_what_is_cast_wherever_it_is_read_is_cast(params):
    found = apart(params, BFLOAT16)
    layer = found["decoder"]["layers"]["1"]
    cast = layer["ffn"]["fall"], layer["cross"]["query"], found["source_table"], found["output_table"]
    kept = layer["ffn_norm"], found["decoder"]["norm"], found["length_table"], found["output_bias"]
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(apart(params, MODEL))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("model", [MODEL, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["autoregressive", "draft", "non_autoregressive"])
def test_they_decode_as_those_of_training_do(params, model, way):
    """Bit for bit: the same numbers go into the same operations."""
    generate = Generator(model, DECODE)
    source = np.array([[1, 9, 12, 30, 2, 0], [1, 8, 2, 0, 0, 0]], np.int32)

    def decode(params):
        if way != "non_autoregressive":
            return getattr(generate, way)(params, source)
        memory, lengths = generate.remember(params, source)
        return generate.non_autoregressive(params, memory, lengths, generate.slots(source.shape[1]) + 1)

    program = jax.jit(decode)
    found = program(apart(params, model))
    jax.tree.map(np.testing.assert_array_equal, found, program(params))


def test_no_layer_is_copied_in_the_loop(params):
    """Out of a stack, every step would copy every layer: a fifth of the time of greedy search at batch 1."""
    generate = Generator(MODEL, dataclasses.replace(DECODE, beam=1))
    source = jnp.asarray([[1, 9, 12, 30, 2, 0]])

    def bodies(params):
        """The parts of the program that loops repeat."""
        jaxpr = jax.make_jaxpr(generate.autoregressive)(params, source)
        return "\n".join(str(e.params["body_jaxpr"]) for e in jaxpr.eqns if e.primitive.name == "while")

    for laid_out in (params, apart(params, MODEL)):
        text = bodies(laid_out)
        assert "dot_general" in text
        assert "f32[3,16,24]" not in text  # a stack of kernels
