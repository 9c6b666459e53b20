"""The same run on one device and on eight, laid out in three ways; checkpoints that go on anywhere."""

import itertools
import pathlib
import shutil

import pytest

from janus_jax import mesh, run, train
from janus_jax.config import MeshConfig
from tests.layouts import LAYOUTS, STEPS, assert_same_curve, config_of


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same run on one device and on eight, laid out in three ways: finished run directories."""
    folders = {}
    for name, layout in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        assert train.train(config_of(layout, data), folders[name]) == train.DONE
    return folders


@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_eight_devices_learn_as_one_does(runs, name):
    assert_same_curve(runs[name], runs["one device"])


# Each layout after another, and before another: a checkpoint does not tell by which it was written.
RING = list(itertools.pairwise([*LAYOUTS, next(iter(LAYOUTS))]))


@pytest.mark.parametrize(("before", "after"), RING, ids=str)
def test_a_checkpoint_goes_on_anywhere(runs, data, tmp_path, before, after):
    folder = tmp_path / "run"
    shutil.copytree(runs[before], folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    assert train.train(config_of(LAYOUTS[after], data), folder) == train.DONE
    assert_same_curve(folder, runs["one device"])


def test_a_mesh_that_does_not_fit_leaves_no_trace(data, tmp_path):
    with pytest.raises(mesh.MeshError, match=r"mesh\.data = 3"):
        train.train(config_of(MeshConfig(data=3), data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_run_on_the_same_folder_is_refused(data, tmp_path):
    config = config_of(MeshConfig(), data)
    with run.locked(tmp_path), pytest.raises(run.RunError, match="in use"):
        train.train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()
