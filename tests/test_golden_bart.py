"""Parity with Hugging Face BART, float32: `golden/bart_tiny*`, conventions in its README.

BART predicts from the content stream: the classic decoder, our `ar_stream = content`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import losses
from janus_jax.config import LossConfig
from janus_jax.convert import load_bart
from janus_jax.decode.beam import BeamOptions, beam_search, greedy_search
from janus_jax.models import ArCache, Janus, empty_cache

MAX_LENGTH = 23  # symbols after the start symbol
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ref(golden):
    with np.load(golden / "bart_tiny.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def loaded(golden):
    config, params = load_bart(golden / "bart_tiny.safetensors", golden / "bart_tiny_config.json")
    return config, jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnames="config")
def forward(params, source, target, config):
    model, variables = Janus(config), {"params": params}
    outputs = model.apply(variables, source, target, nar=False, aux=False)
    return model.apply(variables, source, method="encode")[0], outputs


@pytest.fixture(scope="module")
def results(ref, loaded):
    """(target, encoded, outputs): AR is fed the start symbol, then the labels, and predicts the labels."""
    config, params = loaded
    pad = config.ids.pad
    labels = np.where(ref["labels"] < 0, pad, ref["labels"])
    np.testing.assert_array_equal(ref["decoder_input_ids"][:, 1:], labels[:, :-1])
    target = np.concatenate([np.full_like(labels[:, :1], config.ids.bos), labels], axis=1)
    return target, *jax.tree.map(np.asarray, forward(params, ref["input_ids"], target, config))


def close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_the_source_mask_is_the_padding(ref, loaded):
    np.testing.assert_array_equal(ref["input_ids"] != loaded[0].ids.pad, ref["attention_mask"])


def test_encoder(ref, results):
    real = ref["attention_mask"].astype(bool)
    close(results[1][real], ref["encoder_out"][real])


def test_logits(ref, results):
    """All rows: padding on the right is a symbol like any other to a causal decoder."""
    close(results[2].ar[:, 1:], ref["logits"])


def test_the_other_distributions_are_not_computed(results):
    assert results[2].nar is None
    assert results[2].aux is None


def test_loss(ref, loaded, results):
    target, _, outputs = results
    loss = LossConfig(objective="ar", label_smoothing=0.0)
    target, nothing = jnp.asarray(target), jnp.zeros(target.shape, bool)
    found = losses.terms(outputs, target, nothing, loss, loaded[0].ids)
    assert found["ar"][1] == (ref["labels"] >= 0).sum()
    np.testing.assert_allclose(losses.total(found, loss), ref["loss"], rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("config", "options", "greedy"))
def decode(params, source, config, options, greedy=False):
    model, variables = Janus(config), {"params": params}
    memory = model.apply(variables, source, method="remember")

    def step(tokens, index, cache):
        return model.apply(variables, tokens, index, cache, memory, method="ar_step")

    cache = empty_cache(config, source.shape[0], options.beam, options.max_length)
    limits = jnp.full(source.shape[0], options.max_length)
    if greedy:
        return greedy_search(step, cache, limits, options)
    return beam_search(step, cache, limits, options, reorder=ArCache.reorder)


def options(config, **changed):
    """Nothing is forbidden there, </s> may come first, and as the last symbol it is free."""
    return BeamOptions(config.ids, max_length=MAX_LENGTH, min_length=0, forced_eos="free", **changed)


def test_greedy(ref, loaded):
    config, params = loaded
    found = decode(params, ref["input_ids"], config, options(config, beam=1), greedy=True)
    assert (ref["greedy_sequences"][:, 0] == config.ids.start).all()
    np.testing.assert_array_equal(found.tokens[:, 0], ref["greedy_sequences"][:, 1:])
    close(found.log_probs[:, 0], ref["greedy_logprobs"])


@pytest.mark.parametrize(("early_stop", "run"), [(True, "beam4_es1"), (False, "beam4_es0")])
def test_beam_4(ref, loaded, early_stop, run):
    config, params = loaded
    chosen = options(config, beam=4, early_stop=early_stop, displace=True)
    found = decode(params, ref["input_ids"], config, chosen)
    np.testing.assert_array_equal(found.tokens, ref[f"{run}_sequences"][..., 1:])
    close(found.scores, ref[f"{run}_scores"])


def test_the_two_stop_rules_differ_here(ref):
    assert (ref["beam4_es1_sequences"] != ref["beam4_es0_sequences"]).any()
