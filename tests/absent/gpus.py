"""Programs compiled for GPUs that are not there: needs jax's plugin for CUDA.  `make topology` runs it.

Its name keeps it out of the main suite, which does without the plugin; nothing here is ever skipped.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from janus_jax import cli, compile, hlo
from janus_jax.models.transformer import layer_norm
from tests.absent import programs
from tests.absent.programs import tiny

# One sentence at a time.
ALONE = ("--config.decode.tokens=1", "--config.decode.beam=1", "--config.decode.candidates=1")


@pytest.mark.parametrize("axes", programs.MESHES, ids=str)
def test_the_update_on_a_host_moves_no_logits_and_keeps_no_whole_state(axes):
    programs.check_the_update("h200:8", 8, axes)


def test_hosts_exchange_over_the_slower_network():
    machine = compile.find_machine("h100:4", 2)
    program = compile.build_train(tiny(), machine)
    found = compile.describe(compile.build_and_compile(program), machine)
    moved = {(c["kind"], c["network"]): c["bytes"] for c in found["collectives"]}
    assert moved["all-reduce", "dcn"] > found["memory"]["parameters"]
    seconds = found["roofline_seconds"]
    assert found["predicted"]["bound"] == "launches"  # the model is tiny; after that:
    assert max(seconds.keys() - {"launches"}, key=seconds.get) == "dcn"


def test_the_verb(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(cli.CACHE, "")
    to = tmp_path / "report.json"
    argv = [
        "compile",
        f"--config={programs.write(tmp_path)}",
        "--topology=h200:1",
        "--programs=ar,nar,draft",
        f"--json={to}",
        *ALONE,
    ]
    assert cli.main(argv) == 0
    assert "waits of the host, of a pass" in capsys.readouterr().out
    found = json.loads(to.read_text())
    assert found["chip"]["name"] == "NVIDIA H200"
    assert found["programs"].keys() == {"ar", "nar", "draft"}
    for name, one in found["programs"].items():
        assert one["predicted"]["seconds"] == pytest.approx(sum(one["roofline_seconds"].values()))
        assert one["predicted"]["bound"] == "launches"  # one sentence of a tiny model
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
