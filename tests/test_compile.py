import dataclasses
import functools
import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from janus_jax import chips, cli, compile, config, hlo, mesh, report, sharding
from janus_jax.decode import reading

TABLE = pathlib.Path(__file__).parents[1] / "launch" / "tables" / "scaling.py"

# The vocabulary has a prime factor (251) that no other axis has, and no number of slots divides dim: so a
# collective over logits can be told from one over a table (`hlo.logits_moved`).
SIZES = {
    "vocab_size": 502, "dim": 16, "ffn": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1,
    "max_positions": 64,
}  # fmt: skip
CHIP = chips.Chip("made up", 1e12, 2**30, 1e11, 1e11, 4, 1e9)


def tiny(data=-1, fsdp=1, tensor=1, **model):
    return config.from_dict(
        {
            "batch": {"buckets": (12, 24), "tokens": 24 * 48},
            "model": {**SIZES, **model},
            "loss": {"chunk": 24},
            "decode": {"beam": 2, "iterations": 3, "tokens": 384},
            "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        }
    )


MESHES = {"data=8": tiny(), "fsdp=8": tiny(fsdp=8), "2x2x2": tiny(fsdp=2, tensor=2)}


@pytest.fixture
def machine():
    return compile.Machine("local", 1, None, CHIP, None)


@functools.cache
def update(name):
    made = compile.build_train(MESHES[name], compile.Machine("local", 1, None, CHIP, None))
    return compile.build_and_compile(made)


def collectives(compiled):
    module = hlo.parse(compiled.executable.as_text())
    return hlo.collectives(module, hlo.Counts(compiled.program.loops), devices=8)


# -- what the compiled update must not contain --------------------------------------------------


@pytest.mark.parametrize("name", MESHES)
def test_no_update_moves_logits(name):
    found = collectives(update(name))
    assert found  # gradients at least
    assert not hlo.logits_moved(found, SIZES["vocab_size"], SIZES["dim"])


def test_the_check_finds_logits_that_are_moved():
    m = mesh.make_mesh(tiny().mesh)
    rows, whole = mesh.batch_sharding(m), mesh.replicated(m)
    logits = jax.jit(lambda x, t: jnp.einsum("btd,vd->btv", x, t), out_shardings=whole)
    states = jax.ShapeDtypeStruct((48, 24, 16), jnp.float32, sharding=rows)
    table = jax.ShapeDtypeStruct((502, 16), jnp.float32, sharding=whole)
    text = logits.lower(states, table).compile().as_text()
    found = hlo.logits_moved(hlo.collectives(hlo.parse(text), hlo.Counts(), devices=8), 502, 16)
    assert [c.kind for c in found] == ["all-gather"]


def test_the_state_is_cut_under_fsdp():
    whole, cut, both = (update(name) for name in MESHES)
    assert {p.split("/")[0] for p in compile.whole_arrays(whole)} == {"params", "opt_state"}
    assert compile.whole_arrays(cut) == compile.whole_arrays(both) == []
    for compiled, share in ((cut, 8), (both, 4)):
        for part in ("parameters", "optimizer"):
            # not all is cut over tensor, and small arrays are not cut at all
            assert compiled.program.state[part] < 1.5 * whole.program.state[part] / share
        argument = compiled.executable.memory_analysis().argument_size_in_bytes
        assert argument < 1.5 * sum(whole.program.state.values()) / share + 48 * 24 * 9


def test_adam_keeps_two_numbers_for_each_parameter():
    state = update("data=8").program.state
    assert math.isclose(state["optimizer"], 2 * state["parameters"], rel_tol=0.01)


# -- the report -----------------------------------------------------------------------------------


def test_the_report_of_what_is_here(capsys, tmp_path, machine, monkeypatch):
    monkeypatch.setattr(compile, "find_machine", lambda *_: machine)
    monkeypatch.setattr(compile, "RUNS", 2)
    path = tmp_path / "report.json"
    assert compile.run(tiny(), "local", to=str(path), say=lambda _: None) == 0
    found = json.loads(path.read_text())
    assert found["fits"]
    assert found["devices"] == 8
    assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert found["programs"].keys() == {"train", "ar", "nar", "draft"}
    for name, one in found["programs"].items():
        assert one["measured"]["seconds"] > 0
        assert one["predicted"]["seconds"] >= one["predicted"]["seconds_if_overlapped"] > 0
        assert one["predicted"]["bound"] in ("compute", "memory", "ici", "dcn")
        assert one["memory"]["total"] >= one["memory"]["parameters"] > 0
        assert one["flops"]["executed"] >= one["flops"]["model"] > 0
        assert one["hbm_traffic_bytes"] > one["memory"]["parameters"]
        assert one["loops"]["counted_once"] == []
        assert bool(one["collectives"]) == (name == "train")  # decoding needs no other device
    assert found["programs"]["train"]["shape"] == {"rows": 48, "length": 24, "microbatches": 1}
    moved = {c["kind"]: c["bytes"] for c in found["programs"]["train"]["collectives"]}
    gradients = found["programs"]["train"]["memory"]["parameters"]
    assert gradients < moved["all-reduce"] < 4 * gradients
    out = capsys.readouterr().out
    assert "MEASURED" in out
    assert "predicted, not measured" in out


def test_json_on_standard_output(capsys, machine, monkeypatch):
    monkeypatch.setattr(compile, "find_machine", lambda *_: machine)
    monkeypatch.setattr(compile, "RUNS", 1)
    assert compile.run(tiny(), "local", programs=["train"], to="-", say=lambda _: None) == 0
    assert json.loads(capsys.readouterr().out)["programs"].keys() == {"train"}


def test_what_does_not_fit_and_the_nearest_setting_that_does(capsys, monkeypatch):
    limit = (
        0.9 * compile.describe(update("data=8"), compile.Machine("x", 1, None, CHIP, None))["memory"]["total"]
    )
    small = compile.Machine("local", 1, None, CHIP, limit)
    monkeypatch.setattr(compile, "find_machine", lambda *_: small)
    monkeypatch.setattr(compile, "_measure", lambda _: 1.0)
    said = []
    code = compile.run(tiny(), "local", programs=["train"], say=said.append)
    out = capsys.readouterr().out
    assert code == compile.DOES_NOT_FIT == 1
    assert "--config.train.microbatches=2" in out
    assert said[-1] == "does not fit; trying --config.train.microbatches=2 ..."


def test_when_nothing_helps(machine, monkeypatch):
    hopeless = compile.Machine("local", 1, None, CHIP, 1000.0)
    monkeypatch.setattr(compile, "build_and_compile", lambda _: pytest.fail("need not be compiled"))
    assert compile.nearest_that_fits(tiny(), hopeless) is None


def test_logits_of_nar_are_read_in_ever_fewer_turns(machine):
    """Three passes over 1 x 3 x 24 slots, 18 at a time: four turns, and two thirds of them on average."""
    config_ = tiny()
    decode = dataclasses.replace(config_.decode, tokens=1)
    program = compile.build("nar", dataclasses.replace(config_, decode=decode), machine)
    counts = hlo.Counts(program.loops)
    module = hlo.parse(compile.build_and_compile(program).executable.as_text())
    loops = [v.instruction for v in hlo.walk(module, counts) if v.instruction.opcode == "while"]
    assert program.loops == {reading.IN_TURN: 4 * 2 / 3, "": 3}
    assert [reading.IN_TURN in loop.op_name for loop in loops][:2] == [False, True]
    assert not counts.unknown


def test_the_order_of_what_is_tried(machine):
    found = list(compile.candidates(tiny(), machine))
    assert found[:4] == [
        {"train.microbatches": 2},
        {"train.microbatches": 4},
        {"model.remat": True},
        {"train.microbatches": 4, "model.remat": True},
    ]
    assert found[4] == {"mesh.fsdp": 2, "mesh.data": -1}
    assert found[-1] == {"mesh.fsdp": 8, "mesh.data": -1, "train.microbatches": 4, "model.remat": True}


def test_what_the_compiler_says_of_memory(machine):
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    program = update("data=8").program
    found = compile.describe(compile.Compiled(program, None, 1.0, words), machine)
    assert found["memory"]["total"] == 20.5 * 2**30
    assert not found["memory"]["fits"]


def test_the_batch_with_most_slots():
    assert compile.batch_shape(tiny(), 8) == (48, 24)
    with pytest.raises(compile.CompileError, match=r"does not hold 96 rows .* raise it to 2304"):
        compile.batch_shape(tiny(), 96)


@pytest.fixture
def cache():
    """Asking for a topology switches the compilation cache off; the tests after this one want it."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


# -- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("v5e:16x15x2x2", "v5e:16x16"),
        ("v5:4x4", r"did you mean 'v5[ep]:"),
        ("tpu", "Write GENERATION:SHAPE"),
        ("", "v6e:{2x2"),
        ("h200", "did you mean .h[12]00:[1248]"),
        ("h200:9", r"h200:\{1,2,4,8\}"),
        ("h20:8", "did you mean 'h[12]00:8'"),
    ],
)
def test_topologies_that_there_are_not(name, remedy):
    with pytest.raises(mesh.MeshError, match=f"there is no topology.*{remedy}"):
        mesh.topology_devices(name)


@pytest.mark.parametrize(
    ("name", "error", "extra"),
    [
        ("v5e:4x4", RuntimeError("JAX TPU support not installed; cannot generate TPU topology."), "tpu"),
        ("h200:8", NotImplementedError("topology not implemented for cuda"), "compilers"),
    ],
)
def test_without_a_compiler(name, error, extra, monkeypatch, cache):
    def missing(**_):
        raise error

    monkeypatch.setattr(mesh.topologies, "get_topology_desc", missing)
    with pytest.raises(mesh.MeshError, match=rf"pip install 'janus-jax\[{extra}\]'"):
        mesh.topology_devices(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:3x5", r"'v5e:3x5' is no slice of v5e: .*not divisible; choose one of 2x2"),
        ("h200:2", r"cannot describe h200:2: INVALID_ARGUMENT: not divisible$"),
    ],
)
def test_what_the_compiler_refuses(name, said, monkeypatch, cache):
    def refused(**_):
        raise RuntimeError("INVALID_ARGUMENT: not divisible\nmore")

    monkeypatch.setattr(mesh.topologies, "get_topology_desc", refused)
    with pytest.raises(mesh.MeshError, match=said):
        mesh.topology_devices(name)


def test_hosts_of_gpus_are_asked_for(monkeypatch, cache):
    asked = {}

    class Described:
        devices = ("a GPU",)

    monkeypatch.setattr(
        mesh.topologies, "get_topology_desc", lambda **words: asked.update(words) or Described
    )
    assert mesh.topology_devices("a100:4", 2) == ["a GPU"]
    assert (asked["platform"], asked["topology"]) == ("cuda", "2x1x4")
    assert "core_count: 108" in asked["target_config"]


def test_slices_of_what_is_here():
    with pytest.raises(compile.CompileError, match="locally there is one"):
        compile.find_machine("local", 2)


def test_from_the_command_line(capsys, tmp_path, monkeypatch):
    path = tmp_path / "c.py"
    path.write_text("from janus_jax import config\ndef get_config():\n    return config.to_config_dict()\n")
    seen = {}
    monkeypatch.setattr(compile, "run", lambda *a, **k: seen.update(args=a, **k) or 0)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    argv = [
        "compile",
        f"--config={path}",
        "--topology=v5e:4x4",
        "--slices=2",
        "--programs=train,ar",
        "--memory=8",
    ]
    assert cli.main([*argv, "--json"]) == 0
    assert seen["args"][1:] == ("v5e:4x4", 2)
    assert (seen["programs"], seen["memory"], seen["to"]) == (["train", "ar"], 8 * 2**30, "-")
    assert cli.main([*argv[:-1], "--memory=none"]) == 2
    assert "must be a number above 0" in capsys.readouterr().err


def test_without_an_ar_side_nothing_is_scored_again(machine):
    def flops(objective, rescore):
        c = tiny()
        loss = dataclasses.replace(c.loss, objective=objective)
        decode = dataclasses.replace(c.decode, rescore=rescore)
        return compile.build("nar", dataclasses.replace(c, loss=loss, decode=decode), machine).flops

    assert flops("cmlm", True) == flops("cmlm", False) == flops("janus", False)
    assert flops("janus", True).executed > flops("janus", False).executed


def test_unknown_programs(machine):
    with pytest.raises(compile.CompileError, match="no program 'trian'; there are train, ar, nar, draft"):
        compile.make_report(tiny(), machine, ["trian"])


def test_figures_of_a_chip_that_the_table_does_not_have():
    found = compile.find_machine("local", 1)
    assert found.chip.measured
    assert found.chip.flops > 1e8
    assert found.memory is None


def test_rows_stay_with_their_devices():
    program = update("2x2x2").program
    state, batch = program.arguments
    assert batch["target"].sharding == NamedSharding(program.mesh, PartitionSpec(sharding.ROWS))
    assert state.params["target_table"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_the_table_of_several_reports(tmp_path, capsys, machine):
    table = runpy.run_path(str(TABLE))
    two = compile.Machine("local", 1, None, CHIP, 2**30)
    found = compile.make_report(tiny(), two, [])
    found["programs"]["train"] = compile.describe(update("data=8"), dataclasses.replace(two, devices=[]))
    large = json.loads(json.dumps(found))
    large["programs"]["train"]["predicted"]["tokens_per_s"] *= 0.5
    too_large = json.loads(json.dumps(found))
    del too_large["programs"]["train"]["predicted"]
    paths = []
    for i, one in enumerate((found, large, too_large)):
        paths.append(str(tmp_path / f"{i}.json"))
        report.write_json(tmp_path / f"{i}.json", one)
    assert table["main"](paths) == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == 20
    assert [line.count("|") for line in lines] == [20] * 3
    assert lines[0].endswith("| 100% |")
    assert lines[1].endswith("| 50% |")
    assert "does not fit" in lines[2]
    assert table["main"]([]) == 2
