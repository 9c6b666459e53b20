"""Programs compiled for GPUs that are not there: needs jax's plugin for CUDA.  `make topology` runs it.

Its name keeps it out of the main suite, which does without the plugin; nothing here is ever skipped.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from janus_jax import cli, compile, config, hlo
from janus_jax.models.transformer import layer_norm

# As in tests/test_compile.py: 251 is a factor of the vocabulary alone, 3 of numbers of slots alone.
VALUES = {
    "batch": {"buckets": (24,), "tokens": 24 * 48},
    "model": {
        "vocab_size": 502, "dim": 64, "ffn": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 2,
        "max_positions": 64, "dtype": "bfloat16",
    },
    "loss": {"chunk": 24},
    "decode": {"beam": 1, "iterations": 3, "candidates": 1, "tokens": 1},
}  # fmt: skip


def tiny(**axes):
    return config.from_dict({**VALUES, "mesh": axes})


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_the_update_on_a_host_moves_no_logits_and_keeps_no_whole_state(axes):
    machine = compile.find_machine("h200:8", 1)
    compiled = compile.build_and_compile(compile.build_train(tiny(**axes), machine))
    module = hlo.parse(compiled.executable.as_text())
    counts = hlo.Counts(compiled.program.loops)
    found = hlo.collectives(module, counts, devices=8)
    assert found
    assert not hlo.logits_moved(found, 502, 64)
    assert not counts.unknown
    if axes:
        assert compile.whole_arrays(compiled) == []


def test_hosts_exchange_over_the_slower_network():
    machine = compile.find_machine("h100:4", 2)
    program = compile.build_train(tiny(), machine)
    found = compile.describe(compile.build_and_compile(program), machine)
    moved = {(c["kind"], c["network"]): c["bytes"] for c in found["collectives"]}
    assert moved["all-reduce", "dcn"] > found["memory"]["parameters"]
    assert found["predicted"]["bound"] == "dcn"


def test_the_verb(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(cli.CACHE, "")
    path = tmp_path / "c.py"
    path.write_text(
        "from janus_jax import config\n"
        f"def get_config():\n    return config.to_config_dict(config.from_dict({VALUES!r}))\n"
    )
    to = tmp_path / "report.json"
    argv = ["compile", f"--config={path}", "--topology=h200:1", "--programs=ar,nar,draft", f"--json={to}"]
    assert cli.main(argv) == 0
    assert "waits of the host, of a pass" in capsys.readouterr().out
    found = json.loads(to.read_text())
    assert found["chip"]["name"] == "NVIDIA H200"
    assert found["programs"].keys() == {"ar", "nar", "draft"}
    for name, one in found["programs"].items():
        assert one["predicted"]["seconds"] > 0
        assert one["launches"]["kernels"] > one["launches"]["kernels_of_a_pass"] > 10
        # The host looks at nothing inside a pass, only whether there is another one, if it does not know.
        looks = 0 if name == "nar" else 1
        assert one["launches"]["waits_of_a_pass"] == looks
        assert one["launches"]["waits"] == looks * (one["shape"]["passes"] + 1)


def test_layer_norm_is_one_kernel_where_no_gradient_is_taken():
    device = compile.find_machine("h200:1", 1).devices[0]
    x = jax.ShapeDtypeStruct((48, 64), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    params = {
        name: jax.ShapeDtypeStruct((64,), jnp.float32, sharding=x.sharding) for name in ("scale", "bias")
    }
    norm = layer_norm(tiny().model)
    compiled = jax.jit(lambda p, x: norm.apply({"params": p}, x + 1)).lower(params, x).compile()
    assert hlo.launches(hlo.parse(compiled.as_text()), hlo.Counts()).kernels == 1


@pytest.mark.parametrize("name", ["a100", "a100-40gb", "h100"])
def test_other_models(name):
    machine = compile.find_machine(f"{name}:1", 1)
    found = compile.make_report(tiny(), machine, ["nar"])
    assert found["chip"]["name"].startswith(f"NVIDIA {name[:4].upper()}")
    assert found["programs"]["nar"]["launches"]["kernels"] > 10
