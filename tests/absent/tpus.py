"""Programs compiled for TPUs that are not there: needs libtpu.  `make topology` runs it.

Its name keeps it out of the main suite, which does without libtpu; nothing here is ever skipped.
"""

import json

import pytest

from janus_jax import cli, compile, mesh
from tests.absent import programs
from tests.absent.programs import tiny


@pytest.mark.parametrize("axes", programs.MESHES, ids=str)
def test_the_update_on_a_slice_moves_no_logits_and_keeps_no_whole_state(axes):
    programs.check_the_update("v5e:4x4", 16, axes)


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
    argv = ["compile", f"--config={programs.write(tmp_path)}", "--topology=v5p:2x2x2", "--config.mesh.fsdp=2"]
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
