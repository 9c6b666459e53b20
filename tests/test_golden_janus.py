"""Parity with the reference JANUS, float32: `golden/janus_small.npz`, conventions in its README.

The reference reorders the target into [visible, mask symbols, true tokens]; its rows are mapped back to
our original order through `in/nar_content_p`, `in/nar_content_m` and `in/nar_query_p`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import losses, masks, step
from janus_jax.config import Config, LossConfig
from janus_jax.convert import load_fairseq
from janus_jax.decode.beam import BeamOptions, beam_search, greedy_search
from janus_jax.decode.mask_predict import MaskPredictOptions, candidate_lengths, mask_predict
from janus_jax.models import ArCache, Janus, empty_cache, streams

PAD, UNK = 1, 3
LOGITS = 1e-4  # absolute
HEADS = 4


@pytest.fixture(scope="module")
def ref(golden):
    """Every array of the file by name."""
    with np.load(golden / "janus_small.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture(scope="module")
def loaded(golden):
    """(model configuration, parameters) as converted."""
    config, params = load_fairseq(golden / "janus_small.npz", heads=HEADS)
    return config, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def batch(ref):
    """source, target, masked."""
    return tuple(jnp.asarray(ref[f"in/{name}"]) for name in ("src_tokens", "target", "nar_mask"))


@functools.partial(jax.jit, static_argnames="config")
def forward(params, batch, config):
    """Encoder states, outputs, and the logits of the true-token content stream, which nobody reads."""
    source, target, masked = batch

    def truths(model):
        encoded, source_mask = model.encode(source)
        slots = streams.lay_out(target, masked, config, model._target_rows, ar=False, nar=True, aux=True)
        x = model.decoder(slots.rows, slots.positions, slots.plan, encoded, source_mask)
        start, end = slots.read["nar"][1], slots.read["aux"][0]
        return encoded, model.logits(x[:, start:end])

    model, variables = Janus(config), {"params": params}
    encoded, truth = model.apply(variables, method=truths)
    return encoded, model.apply(variables, source, target, masked), truth


@functools.partial(jax.jit, static_argnames=("config", "loss"))
def loss_and_gradient(params, batch, config, loss):
    """((total, {term: (sum, weight)}), gradients) as training computes them."""
    part = dict(zip(("source", "target", "masked"), batch, strict=True))
    weights = losses.weights(part["target"], part["masked"], loss, config.ids)
    whole = Config(model=config, loss=loss)

    def objective(params):
        total, sums = step.objective(params, part, whole, None, weights)
        return total, {name: (x, weights[name.removeprefix("nll_")]) for name, x in sums.items()}

    return jax.value_and_grad(objective, has_aux=True)(params)


@pytest.fixture(scope="module")
def results(loaded, batch):
    config, params = loaded
    return jax.tree.map(np.asarray, forward(params, batch, config))


@pytest.fixture(scope="module", params=[0, 16], ids=["plain", "chunked"])
def janus(request, loaded, batch):
    """((total, terms), gradients) of the JANUS objective with the reference's weights, the defaults."""
    config, params = loaded
    return loss_and_gradient(params, batch, config, LossConfig(chunk=request.param))


def close(ours, theirs, tolerance=LOGITS):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# Conversion ------------------------------------------------------------------------------------------


def test_the_configuration_is_read_from_the_weights(ref, loaded):
    config, _ = loaded
    expected = {
        "dim": "dim",
        "ffn": "ffn",
        "heads": "heads",
        "encoder_layers": "enc_layers",
        "decoder_layers": "dec_layers",
        "max_positions": "max_positions",
        "vocab_size": "vocab",
    }
    for ours, theirs in expected.items():
        assert getattr(config, ours) == ref[f"cfg/{theirs}"], ours
    assert (config.norm, config.embed_norm, config.share_embeddings, config.tie_output) == (
        "post",
        False,
        True,
        True,
    )


def test_every_weight_finds_its_place(ref, loaded):
    """As many numbers as the state dict holds, less copies and rows without a position."""
    _, params = loaded
    theirs = {n: a for n, a in ref.items() if n.startswith("w/") and not n.endswith("version")}
    copies = ("w/encoder.embed_tokens.weight", "w/decoder.output_projection.weight")
    size = sum(a.size for n, a in theirs.items() if n not in copies)
    unused = 2 * 2 * int(ref["cfg/dim"])  # two rows before the first position, on both sides
    assert sum(x.size for x in jax.tree.leaves(params)) == size - unused
    ours = np.sort(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    kept = [a[2:] if "embed_positions" in n else a for n, a in theirs.items() if n not in copies]
    np.testing.assert_array_equal(ours, np.sort(np.concatenate([np.ravel(a) for a in kept])))


# Forward ---------------------------------------------------------------------------------------------


def test_encoder(ref, results):
    real = ~ref["out/encoder_padding_mask"]
    close(results[0][real], ref["out/encoder_out"][real])


def test_ar_logits(ref, results):
    real = ref["in/ar_target"] != PAD
    assert real.sum() == ref["in/ntokens"] - len(real)
    close(results[1].ar[:, 1:][real], ref["out/ar_logits"][real])


def test_nar_logits_of_mask_symbols_and_visible_tokens(ref, results):
    """And the true-token rows of the same stream, on which only AUX depends."""
    tokens, place, outside = (ref[f"in/nar_content_{x}"] for x in "wpm")
    checked = 0
    for b in range(len(tokens)):
        n_masked = int(ref["in/nar_mask"][b].sum())
        n_visible = int((ref["in/target"][b] != PAD).sum()) - n_masked
        assert (~outside[b]).sum() == n_masked
        for row in range(n_visible + 2 * n_masked):
            truth = row >= n_visible + n_masked
            ours = (results[2] if truth else results[1].nar)[b, place[b, row]]
            close(ours, ref["out/nar_content_logits"][b, row])
            checked += 1
    assert checked == (tokens != PAD).sum()


def test_aux_logits(ref, results):
    b, row = np.nonzero(ref["in/nar_query_w"] != PAD)
    assert len(b) == ref["in/nar_mask"].sum()
    close(results[1].aux[b, ref["in/nar_query_p"][b, row]], ref["out/aux_query_logits"][b, row])


def test_length_logits(ref, results):
    close(results[1].length, ref["out/length_logits"])


def test_attention_masks_are_the_reference_ones_in_another_order(ref, batch):
    _, target, masked = batch
    real, length = target != PAD, target.shape[1]
    content = np.broadcast_to(masks.padding_mask(real), (*real.shape, length))
    content = np.concatenate([content, np.zeros_like(content)], axis=-1)
    truth, query = (np.asarray(f(masked, real)) for f in (masks.true_content_mask, masks.aux_query_mask))
    for b in range(len(real)):
        n_masked = int(masked[b].sum())
        n_symbols = int(real[b].sum())  # visible tokens, then mask symbols
        place = ref["in/nar_content_p"][b, : n_symbols + n_masked]
        columns = place + np.where(np.arange(len(place)) >= n_symbols, length, 0)
        ours = [(truth if row >= n_symbols else content)[b, p] for row, p in enumerate(place)]
        ours += [query[b, p] for p in ref["in/nar_query_p"][b, :n_masked]]
        theirs = [*ref["out/attn_block_content"][b][: len(place)], *ref["out/attn_block_query"][b][:n_masked]]
        for mine, hidden in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine[columns], ~hidden[: len(place)])
            assert mine.sum() == (~hidden).sum()  # nothing is seen besides


# Losses and gradients --------------------------------------------------------------------------------

COMPONENTS = {
    "ar": "ar_ls",
    "nll_ar": "ar_nll",
    "nar": "nar_ls",
    "nll_nar": "nar_nll",
    "aux": "aux_ls",
    "nll_aux": "aux_nll",
    "length": "length",
    "kl_ar_nar": "kl_ar_nar",
    "kl_nar_aux": "kl_nar_aux",
    "kl_ar_aux": "kl_ar_aux",
}


def test_every_loss_component(ref, janus):
    (_, found), _ = janus
    assert found.keys() == COMPONENTS.keys()
    for ours, theirs in COMPONENTS.items():
        np.testing.assert_allclose(losses.mean(found[ours]), ref[f"loss/{theirs}"], rtol=1e-5, err_msg=ours)


def test_the_totals(ref, janus, loaded, batch):
    (total, found), _ = janus
    np.testing.assert_allclose(total, ref["loss/janus_total"], rtol=1e-5)
    parts = {
        name: weight * losses.mean(found[name]) for name, weight in losses.coefficients(LossConfig()).items()
    }
    ar_part = sum(parts[name] for name in ("ar", "kl_ar_nar", "kl_ar_aux"))
    np.testing.assert_allclose(ar_part, ref["loss/janus_ar_part"], rtol=1e-5)
    np.testing.assert_allclose(total - ar_part, ref["loss/janus_nar_part"], rtol=1e-5)


@pytest.mark.parametrize("objective", ["ar", "cmlm"])
def test_the_baselines(ref, loaded, batch, objective, results):
    config, _ = loaded
    loss = LossConfig(objective=objective)
    found = losses.terms(results[1], *batch[1:], loss, config.ids)
    np.testing.assert_allclose(losses.total(found, loss), ref[f"loss/{objective}_total"], rtol=1e-5)


@pytest.fixture(scope="module")
def reference_gradient(ref, tmp_path_factory):
    """The stored gradients as our tree: the converter that maps weights maps their gradients too."""
    state = {name.removeprefix("grad/"): a for name, a in ref.items() if name.startswith("grad/")}
    table = state["encoder.embed_tokens.weight"]  # the sum over its three uses, stored once
    state |= dict.fromkeys(("decoder.embed_tokens.weight", "decoder.output_projection.weight"), table)
    for side in ("encoder", "decoder"):
        assert not state[f"{side}.embed_positions.weight"][:2].any()  # the rows that conversion drops
    path = tmp_path_factory.mktemp("gradient") / "gradient.npz"
    np.savez(path, **state)
    return load_fairseq(path, heads=HEADS)[1]


def assert_gradients_close(ours, theirs):
    """1e-4 of the largest entry of each parameter, layer by layer, + 1e-6."""

    def check(path, mine, other):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = zip(mine, other, strict=True) if "/layers/" in name else [(mine, other)]
        for i, (a, b) in enumerate(layers):
            tolerance = 1e-4 * np.abs(b).max() + 1e-6
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=f"{name}, layer {i}")

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def test_the_gradient_of_every_parameter(janus, reference_gradient):
    assert_gradients_close(janus[1], reference_gradient)


@pytest.mark.parametrize(
    "option",
    [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True, "remat_keep": "products"}],
    ids=["scan_layers", "remat", "remat but for products"],
)
def test_scanned_and_rematerialised_layers_give_the_same_numbers(
    loaded, batch, janus, reference_gradient, option
):
    config, params = loaded
    config = dataclasses.replace(config, **option)
    (total, found), gradient = loss_and_gradient(params, batch, config, LossConfig())
    assert_gradients_close(gradient, reference_gradient)
    np.testing.assert_allclose(total, janus[0][0], rtol=1e-6)
    for name, term in found.items():
        np.testing.assert_allclose(losses.mean(term), losses.mean(janus[0][1][name]), rtol=1e-5)


def test_bfloat16_stays_near(ref, loaded, batch, results):
    config, params = loaded
    config = dataclasses.replace(config, dtype="bfloat16")
    outputs = jax.jit(lambda params, batch: Janus(config).apply({"params": params}, *batch))(params, batch)
    for name in ("ar", "nar", "aux", "length"):
        ours, exact = np.asarray(getattr(outputs, name)), getattr(results[1], name)
        assert ours.dtype == np.float32
        error = np.abs(ours - exact)[: 3 if name != "length" else None, :9]  # real slots
        assert 0 < error.mean() < 0.03 * exact.std(), name
    found = losses.terms(outputs, *batch[1:], LossConfig(), config.ids)
    np.testing.assert_allclose(losses.total(found, LossConfig()), ref["loss/janus_total"], rtol=0.02)


# Mask-predict ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "candidates", "options"))
def refine(params, source, config, candidates, options):
    model, variables = Janus(config), {"params": params}
    memory = model.apply(variables, source, method="remember")
    lengths = candidate_lengths(memory.length_logits, candidates, min_length=2, max_length=config.max_length)

    def look(canvas, memory):
        return model.apply(variables, canvas, memory, method="nar_pass")

    def project(states):
        return model.apply(variables, states, method="logits")

    return lengths, mask_predict(look, project, memory, lengths, options)


def run_nar(ref, loaded, batch, name, params):
    """Our decode laid out as the reference's: (lengths, tokens, log-probs, canvases after re-masking)."""
    config, _ = loaded
    passes, rows, slots = ref[f"{name}/filled_tokens"].shape
    options = MaskPredictOptions(
        config.ids, max_length=slots, iterations=passes, banned=(), early_stop=False, history=True
    )
    lengths, result = refine(params, batch[0], config, rows // len(batch[0]), options)
    h = jax.tree.map(lambda x: np.asarray(x).reshape(passes, rows, slots), result.history)
    return np.asarray(lengths).reshape(-1), h.tokens, h.log_probs, np.where(h.remasked, UNK, h.tokens)[:-1]


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("max_iter", [0, 4, 10])
def test_mask_predict_makes_the_reference_history(ref, loaded, batch, max_iter, candidates):
    name = f"nar/it{max_iter}_b{candidates}"
    lengths, tokens, log_probs, canvases = run_nar(ref, loaded, batch, name, loaded[1])
    assert len(tokens) == max_iter + 1 == ref[f"{name}/n_passes"]
    np.testing.assert_array_equal(lengths, (ref[f"{name}/init_tokens"] != PAD).sum(-1))
    np.testing.assert_array_equal(tokens, ref[f"{name}/filled_tokens"])
    close(log_probs, ref[f"{name}/filled_scores"])
    np.testing.assert_array_equal(canvases, ref[f"{name}/remasked_tokens"])

    # The reference's rule counts BOS and EOS, at 0; ours does not: from the same log-probabilities.
    np.testing.assert_array_equal(lengths, ref[f"{name}/cand_len"])
    scores = log_probs[-1].sum(-1) / lengths
    close(scores, ref[f"{name}/cand_score"])
    best = scores.reshape(-1, candidates).argmax(1)
    np.testing.assert_array_equal(best, ref[f"{name}/best_index"])
    chosen = np.arange(len(best)) * candidates + best
    width = ref[f"{name}/tokens"].shape[1]
    np.testing.assert_array_equal(tokens[-1][chosen, :width], ref[f"{name}/tokens"])
    close(log_probs[-1][chosen, :width], ref[f"{name}/pos_scores"])


@pytest.mark.parametrize("run", ["it4_b1", "it10_b3"])
def test_mask_predict_where_the_model_predicts_the_mask_symbol(ref, loaded, batch, run):
    """With other token rows it often predicts <unk>, the mask symbol, and <pad>.

    Rows in which it never predicted <pad> are the reference's; a predicted <pad> is a quirk that ours
    does not share (docs/parity.md).
    """
    name = f"nar_special/{run}"
    params = loaded[1] | {"target_table": jnp.asarray(ref["nar_special/embed_tokens"])}
    lengths, tokens, log_probs, canvases = run_nar(ref, loaded, batch, name, params)
    theirs = ref[f"{name}/filled_tokens"]
    padded = ((theirs == PAD) & (ref[f"{name}/init_tokens"] != PAD)).any((0, 2))
    keep = ~padded & (lengths > 2)
    assert padded.any()
    assert keep.sum() >= 2
    assert (theirs[:, keep] == UNK).any()
    np.testing.assert_array_equal(tokens[:, keep], theirs[:, keep])
    close(log_probs[:, keep], ref[f"{name}/filled_scores"][:, keep])
    np.testing.assert_array_equal(canvases[:, keep], ref[f"{name}/remasked_tokens"][:, keep])


# Left to right ---------------------------------------------------------------------------------------

MAX_LENGTH = 31  # a sentence ends at step 30, counted from 0


@functools.partial(jax.jit, static_argnames=("config", "options", "search"))
def decode(params, source, config, options, search):
    model, variables = Janus(config), {"params": params}
    memory = model.apply(variables, source, method="remember")

    def step(tokens, index, cache):
        return model.apply(variables, tokens, index, cache, memory, method="ar_step")

    cache = empty_cache(config, source.shape[0], options.beam, options.max_length)
    limits = jnp.full(source.shape[0], options.max_length)
    return search(step, cache, limits, options)


BEAM = functools.partial(beam_search, reorder=ArCache.reorder)


@pytest.mark.parametrize(
    ("run", "beam", "search"),
    [("full_b1", 1, BEAM), ("full_b1", 1, greedy_search), ("full_b5", 5, BEAM)],
    ids=["beam 1", "greedy", "beam 5"],
)
def test_ar_decoding_finds_the_reference_hypotheses(ref, loaded, batch, run, beam, search):
    config, params = loaded
    # <s> and <unk> are allowed there, </s> not as the first symbol.
    options = BeamOptions(config.ids, beam=beam, max_length=MAX_LENGTH, banned=(PAD,), min_length=1)
    found = jax.tree.map(np.asarray, decode(params, batch[0], config, options, search))
    theirs = {k: ref[f"ar/{run}/{k}"] for k in ("tokens", "len", "score", "pos_scores", "num_hypos")}
    assert (theirs["num_hypos"] == beam).all()
    width = theirs["tokens"].shape[-1]
    assert (found.tokens[..., width:] == PAD).all()
    np.testing.assert_array_equal(found.tokens[..., :width], theirs["tokens"])
    np.testing.assert_array_equal(found.lengths, theirs["len"])
    close(found.scores, theirs["score"])
    close(found.log_probs[..., :width], theirs["pos_scores"])


@functools.partial(jax.jit, static_argnames="config")
def teacher_forced(params, source, target, config):
    """Logits [B, T, V] in one pass, and token by token through the cache."""
    model, variables = Janus(config), {"params": params}
    memory = model.apply(variables, source, method="remember")
    rows, length = target.shape

    def step(cache, at):
        index, tokens = at
        logits, cache = model.apply(variables, tokens, index, cache, memory, method="ar_step")
        return cache, logits

    fed = target.at[:, 0].set(config.ids.start).T[..., None]  # [T, B, 1]
    cache = empty_cache(config, rows, 1, length)
    _, stepped = jax.lax.scan(step, cache, (jnp.arange(length), fed))
    whole = model.apply(variables, target[:, None], memory, method="ar_pass")
    whole = model.apply(variables, whole, method="logits")
    return whole[:, 0], jnp.moveaxis(stepped[:, :, 0], 0, 1)


def test_step_by_step_and_in_one_pass_are_the_same(ref, loaded, batch):
    config, params = loaded
    source, target, _ = batch
    whole, stepped = (np.asarray(x) for x in teacher_forced(params, source, target, config))
    whole, stepped = whole[:, 1:], stepped[:, :-1]  # by the place predicted, by the place fed
    real = ref["in/ar_target"] != PAD
    close(whole[real], ref["out/ar_logits"][real])
    close(stepped[real], ref["out/ar_logits"][real])
    # The reference's own cache counts keys twice; ours is on the side of its training.
    assert np.abs(stepped - ref["out/ar_logits_cached"])[real].max() > 0.1
