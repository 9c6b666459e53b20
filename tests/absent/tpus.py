"""Programs compiled for TPUs that are not there: needs libtpu.  `make topology` runs it.

Its name keeps it out of the main suite, which does without libtpu; nothing here is ever skipped.
"""

import json

import pytest

from janus_jax import cli, compile, config, hlo, mesh

# As in tests/test_compile.py: 251 is a factor of the vocabulary alone, 3 of numbers of slots alone.
VALUES = {
    "batch": {"buckets": (24,), "tokens": 24 * 48},
    "model": {
        "vocab_size": 502, "dim": 64, "ffn": 128, "heads": 2, "encoder_layers": 1, "decoder_layers": 1,
        "max_positions": 64, "dtype": "bfloat16", "scan_layers": True,
    },
    "loss": {"chunk": 24},
    "decode": {"beam": 2, "iterations": 3, "tokens": 384},
}  # fmt: skip


def tiny(**axes):
    return config.from_dict({**VALUES, "mesh": axes})


@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_the_update_on_a_slice_moves_no_logits_and_keeps_no_whole_state(axes):
    machine = compile.find_machine("v5e:4x4", 1)
    compiled = compile.build_and_compile(compile.build_train(tiny(**axes), machine))
    module = hlo.parse(compiled.executable.as_text())
    counts = hlo.Counts(compiled.program.loops)
    found = hlo.collectives(module, counts, devices=16)
    assert found
    assert not hlo.logits_moved(found, 502, 64)
    assert not counts.unknown
    assert not any(c.crosses for c in found)
    if axes:
        assert compile.whole_arrays(compiled) == []


def test_two_slices_reduce_inside_before_they_talk():
    machine = compile.find_machine("v5e:2x2", 2)
    program = compile.build_train(tiny(), machine)
    found = compile.describe(compile.build_and_compile(program), machine)
    moved = {(c["kind"], c["network"]): c["bytes"] for c in found["collectives"]}
    parameters = found["memory"]["parameters"]
    # Each of four chips sends at least its quarter of the gradient to the other slice.  (Small arrays, as
    # most are here, go whole.)
    assert parameters / 4 < moved["all-reduce", "dcn"] < 2 * parameters
    assert (
        moved["all-gather", "ici"] + moved.get(("reduce-scatter", "ici"), 0) + moved["all-reduce", "ici"] > 0
    )
    assert found["predicted"]["bound"] == "dcn"


def test_the_verb(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(cli.CACHE, "")
    path = tmp_path / "c.py"
    path.write_text(
        "from janus_jax import config\n"
        f"def get_config():\n    return config.to_config_dict(config.from_dict({VALUES!r}))\n"
    )
    argv = ["compile", f"--config={path}", "--topology=v5p:2x2x2", "--config.mesh.fsdp=2"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["chip"]["name"]) == (8, "TPU v5p")
    assert found["programs"].keys() == {"train", "ar", "nar", "draft"}
    assert all(p["predicted"]["seconds"] > 0 and "measured" not in p for p in found["programs"].values())


def test_what_does_not_fit(capsys, tmp_path):
    machine = compile.find_machine("v5e:2x2", 1, memory=3 * 2**20)
    config_ = tiny()
    memory = compile.describe(compile.build_and_compile(compile.build_train(config_, machine)), machine)[
        "memory"
    ]
    assert not memory["fits"]
    machine = compile.find_machine("v5e:2x2", 1, memory=0.97 * memory["total"])
    remedy = compile.nearest_that_fits(config_, machine)
    assert remedy
    assert remedy["memory"]["total"] <= machine.memory < memory["total"]


def test_shapes_that_no_slice_has():
    with pytest.raises(mesh.MeshError, match="choose one of 2x2, 2x4"):
        mesh.topology_devices("v5e:3x5")
