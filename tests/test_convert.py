"""Weights of others: what is not as expected is named, never dropped or guessed."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from janus_jax.config import SpecialIds
from janus_jax.convert import ConvertError, fairseq, load_bart, load_fairseq
from janus_jax.models import init_params

V, D, F, POSITIONS, CLASSES = 11, 4, 6, 9, 7
DEPTH = {"encoder": 1, "decoder": 2}


def layers(prefix="", *, pre=False, embed_norm=False):
    """What both kinds have below encoder and decoder, (out, in), every number different."""
    shapes = {}
    for side, depth in DEPTH.items():
        shapes[f"{side}.embed_positions.weight"] = (POSITIONS + 2, D)
        for i in range(depth):
            at = f"{side}.layers.{i}"
            for kind in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                for name in "qkv":
                    shapes[f"{at}.{kind}.{name}_proj.weight"] = (D, D)
                    shapes[f"{at}.{kind}.{name}_proj.bias"] = (D,)
                shapes[f"{at}.{kind}.out_proj.weight"] = (D, D)
                shapes[f"{at}.{kind}.out_proj.bias"] = (D,)
                shapes |= {f"{at}.{kind}_layer_norm.{x}": (D,) for x in ("weight", "bias")}
            shapes |= {f"{at}.fc1.weight": (F, D), f"{at}.fc1.bias": (F,)}
            shapes |= {f"{at}.fc2.weight": (D, F), f"{at}.fc2.bias": (D,)}
            shapes |= {f"{at}.final_layer_norm.{x}": (D,) for x in ("weight", "bias")}
        if pre:
            shapes |= {f"{side}.layer_norm.{x}": (D,) for x in ("weight", "bias")}
        if embed_norm:
            shapes |= {f"{side}.layernorm_embedding.{x}": (D,) for x in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {prefix + k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def fairseq_state(*, shared=True, tied=True, **kinds):
    rng = np.random.default_rng(1)
    tables = rng.normal(size=(3, V, D)).astype(np.float32)
    return {
        **layers(**kinds),
        "decoder.embed_tokens.weight": tables[0],
        "encoder.embed_tokens.weight": tables[0 if shared else 1],
        "decoder.output_projection.weight": tables[0 if tied else 2],
        "decoder.embed_length.weight": rng.normal(size=(CLASSES, D)).astype(np.float32),
        "encoder.version": np.ones(1, np.float32),
    }


@pytest.fixture
def save(tmp_path):
    """Saves a state dict as .npz and returns where."""

    def write(state):
        np.savez(tmp_path / "model.npz", **state)
        return tmp_path / "model.npz"

    return write


def assert_loadable(config, params):
    """Names and shapes are those of the model."""
    expected = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, expected)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


# fairseq ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({}, {"norm": "post", "share_embeddings": True, "tie_output": True, "embed_norm": False}),
        ({"pre": True}, {"norm": "pre"}),
        ({"embed_norm": True, "shared": False}, {"embed_norm": True, "share_embeddings": False}),
        ({"tied": False}, {"tie_output": False}),
    ],
)
def test_the_state_dict_tells_the_configuration(save, kinds, expected):
    config, params = load_fairseq(save(fairseq_state(**kinds)), heads=2)
    expected |= {"dim": D, "ffn": F, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "vocab_size": V}
    expected |= {"max_positions": POSITIONS, "max_length": CLASSES - 1}
    expected |= {"ids": SpecialIds(pad=1, bos=0, eos=2, unk=3, mask=3, start=0)}
    assert {name: getattr(config, name) for name in expected} == expected
    assert_loadable(config, params)


def test_a_linear_weight_is_turned_and_layers_are_stacked(save):
    state = fairseq_state()
    _, params = load_fairseq(save(state), heads=2)
    layer = params["decoder"]["layers"]
    for i in range(2):
        at = f"decoder.layers.{i}"
        np.testing.assert_array_equal(layer["ffn"]["rise"]["kernel"][i], state[f"{at}.fc1.weight"].T)
        np.testing.assert_array_equal(
            layer["cross"]["key"]["kernel"][i], state[f"{at}.encoder_attn.k_proj.weight"].T
        )
        np.testing.assert_array_equal(layer["ffn_norm"]["scale"][i], state[f"{at}.final_layer_norm.weight"])
    positions = params["encoder"]["input"]["positions"]
    np.testing.assert_array_equal(positions, state["encoder.embed_positions.weight"][2:])


def test_names_may_carry_a_prefix_and_other_arrays_are_then_left_alone(save):
    state = fairseq_state()
    prefixed = {f"w/{k}": v for k, v in state.items()} | {"in/target": np.zeros(3), "note": np.zeros(2)}
    _, plain = load_fairseq(save(state), heads=2)
    _, params = load_fairseq(save(prefixed), heads=2)
    jax.tree.map(np.testing.assert_array_equal, plain, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.layers.1.fc1.bias": None}, "no weight named 'decoder.layers.1.fc1.bias'"),
        ({"decoder.embed_length.weight": None}, "no weight named 'decoder.embed_length.weight'"),
        ({"decoder.adapter.weight": np.zeros(3)}, "no place in the model: decoder.adapter.weight"),
        (
            {"encoder.layers.0.fc2.weight": np.zeros((D, D))},
            r"encoder.layers.0.fc2.weight .*\(4, 4\).*\(4, 6\)",
        ),
        ({"encoder.embed_tokens.weight": np.zeros((V + 1, D))}, r"encoder.embed_tokens.weight .*\(12, 4\)"),
        ({"encoder.layers.2.fc1.weight": np.zeros((F, D))}, "encoder.layers.0, 1, ... .* not contiguous"),
    ],
)
def test_a_weight_that_is_missing_left_over_or_misshapen_is_named(save, change, message):
    state = fairseq_state() | change
    path = save({k: v for k, v in state.items() if v is not None})
    with pytest.raises(ConvertError, match=message) as raised:
        load_fairseq(path, heads=2)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "holds values that are no finite numbers"), (1, "is of type int64, not floating-point")],
)
def test_a_weight_that_holds_no_numbers_of_use_is_named(save, value, message):
    path = save(fairseq_state() | {"encoder.layers.0.fc1.bias": np.full(F, value)})
    with pytest.raises(ConvertError, match=rf"encoder.layers.0.fc1.bias {message}"):
        load_fairseq(path, heads=2)


def test_a_file_that_is_not_whole_is_named(save, tmp_path):
    path = save(fairseq_state())
    for name, data in (("cut", path.read_bytes()[:-100]), ("empty", b""), ("text", b"no weights\n")):
        broken = tmp_path / f"{name}.npz"
        broken.write_bytes(data)
        with pytest.raises(ConvertError, match=rf"{broken} is not a whole .npz of arrays"):
            load_fairseq(broken, heads=2)


def test_heads_must_be_told_and_must_divide(save):
    path = save(fairseq_state())
    with pytest.raises(ConvertError, match=r"heads must be a whole number, got 2.5"):
        load_fairseq(path, heads=2.5)
    with pytest.raises(ConvertError, match="number of heads; pass heads="):
        load_fairseq(path)
    with pytest.raises(ConvertError, match=r"3 heads do not divide the width 4"):
        load_fairseq(path, heads=3)


def test_an_activation_that_the_model_does_not_have_is_named(save):
    path = save(fairseq_state())
    assert load_fairseq(path, heads=2, activation="gelu")[0].activation == "gelu"
    with pytest.raises(ConvertError, match=r"activation 'gelu_fast' .* relu, gelu"):
        load_fairseq(path, heads=2, activation="gelu_fast")


def test_a_pt_file_without_torch_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import raises ImportError
    with pytest.raises(ConvertError, match=r"checkpoint_best.pt: no such file"):
        load_fairseq(tmp_path / "checkpoint_best.pt")
    (tmp_path / "checkpoint_best.pt").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"checkpoint_best.pt: .* pip install 'janus-jax\[torch\]'"):
        load_fairseq(tmp_path / "checkpoint_best.pt")


@pytest.mark.parametrize("layout", ["args", "cfg"])
def test_a_pt_file_tells_what_an_npz_cannot(tmp_path, monkeypatch, layout):
    values = {"decoder_attention_heads": 2, "activation_fn": "gelu", "no_scale_embedding": True}
    tensors = {
        k: SimpleNamespace(float=lambda v=v: SimpleNamespace(numpy=lambda: v))
        for k, v in fairseq_state().items()
    }
    arguments = {"args": SimpleNamespace(**values)} if layout == "args" else {"cfg": {"model": values}}
    fake = SimpleNamespace(load=lambda path, **_: {"model": tensors, **arguments})
    monkeypatch.setitem(sys.modules, "torch", fake)
    (tmp_path / "model.pt").write_bytes(b"")
    config, params = load_fairseq(tmp_path / "model.pt")
    assert (config.heads, config.activation, config.scale_embeddings) == (2, "gelu", False)
    assert_loadable(config, params)
    assert (
        load_fairseq(tmp_path / "model.pt", heads=4, activation="relu", scale_embeddings=True)[0].heads == 4
    )


class Mapping:
    """As omegaconf's: no dict, and its attributes are not its values."""

    def __init__(self, **values):
        self._content = values

    def get(self, name, otherwise=None):
        return self._content.get(name, otherwise)


@pytest.mark.parametrize("kind", [SimpleNamespace, dict, Mapping])
def test_arguments_of_every_kind(kind, tmp_path):
    found = fairseq._arguments(
        kind(encoder_attention_heads=2, decoder_attention_heads=2, activation_fn="gelu"), tmp_path
    )
    assert found == {"heads": 2, "activation": "gelu", "scale_embeddings": True}
    with pytest.raises(ConvertError, match=r"differ in attention heads \(2 and 4\)"):
        fairseq._arguments(kind(encoder_attention_heads=2, decoder_attention_heads=4), tmp_path)
    with pytest.raises(ConvertError, match="cross_self_attention"):
        fairseq._arguments(kind(cross_self_attention=True), tmp_path)


# BART ------------------------------------------------------------------------------------------------

BART = {
    "model_type": "bart",
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "max_position_embeddings": POSITIONS,
    "activation_function": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def bart_state():
    rng = np.random.default_rng(2)
    return {
        **layers("model.", embed_norm=True),
        "model.shared.weight": rng.normal(size=(V, D)).astype(np.float32),
        "final_logits_bias": rng.normal(size=(1, V)).astype(np.float32),
    }


@pytest.fixture
def load(tmp_path):
    """Saves a BART with some changes and loads it."""

    def saved(config=None, state=None, **options):
        weights, settings = tmp_path / "model.safetensors", tmp_path / "config.json"
        state = {k: v for k, v in (bart_state() | (state or {})).items() if v is not None}
        save_file(state, weights)
        settings.write_text(json.dumps({k: v for k, v in (BART | (config or {})).items() if v is not None}))
        return load_bart(weights, settings, **options)

    return saved


def test_bart_becomes_a_model_that_predicts_from_the_content_stream(load):
    config, params = load()
    assert (config.ar_stream, config.embed_norm, config.output_bias, config.norm) == (
        "content",
        True,
        True,
        "post",
    )
    assert config.ids == SpecialIds(pad=1, bos=0, eos=2, unk=3, mask=V - 1, start=2)
    assert not config.scale_embeddings
    assert_loadable(config, params)
    assert not params["length_table"].any()
    assert load(mask=4)[0].ids.mask == 4


def test_copies_of_the_tied_table_may_be_stored_and_must_be_copies(load):
    table = bart_state()["model.shared.weight"]
    names = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    load(state={name: table.copy() for name in names})
    for name in names:
        with pytest.raises(ConvertError, match=f"{name} differs from model.shared.weight"):
            load(state={name: table + 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5', expected 'bart'"),
        ({"decoder_attention_heads": 4}, "differ in attention heads"),
        ({"decoder_ffn_dim": 9}, "differ in ffn width"),
        ({"activation_function": "gelu_new"}, "activation 'gelu_new' .* relu, gelu"),
        ({"d_model": None}, "config.json: no key 'd_model'"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "3 heads do not divide the width 4"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused(load, config, message):
    with pytest.raises(ConvertError, match=message):
        load(config)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.decoder.layers.1.fc2.bias": None}, "no weight named 'model.decoder.layers.1.fc2.bias'"),
        ({"model.extra": np.zeros(2, np.float32)}, "no place in the model: model.extra"),
        ({"final_logits_bias": np.zeros((1, 3), np.float32)}, r"final_logits_bias .*\(1, 3\).*\(1, 11\)"),
    ],
)
def test_bart_weights_are_all_accounted_for(load, state, message):
    with pytest.raises(ConvertError, match=message):
        load(state=state)
