import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from janus_jax import checkpoint
from janus_jax.checkpoint import CheckpointError, Checkpoints, MismatchError, NoCheckpointError


class State(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    key: jax.Array


def sharding(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    assert isinstance(mesh, Mesh)
    return NamedSharding(mesh, PartitionSpec())


def make_state(step=0, width=4, devices=1, ema=None, dtype=jnp.float32):
    rng = np.random.default_rng(step)
    params = {
        "encoder": {"kernel": jnp.asarray(rng.normal(size=(3, width)), dtype)},
        "bias": jnp.arange(float(width)) + step,
    }
    tx = optax.chain(optax.identity(), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    key = jax.random.key_data(jax.random.key(step))
    return jax.device_put(State(jnp.int32(step), params, tx.init(params), ema, key), sharding(devices))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def write(folder, steps=(1, 2, 3), **kwargs):
    with Checkpoints(folder, **kwargs) as checkpoints:
        for step in steps:
            assert checkpoints.save(
                step, make_state(step), {"bleu": -abs(step - 2.0), "loss": abs(step - 2.0)}
            )


def truncate(step_folder):
    """Cuts the largest file, which holds the arrays, in half."""
    largest = max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def remove_description(step_folder):
    (step_folder / "state" / "_METADATA").unlink()


def cut_description(step_folder):
    file = step_folder / "state" / "_METADATA"
    file.write_bytes(file.read_bytes()[:100])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def said():
    return []


def test_what_is_saved_comes_back(folder):
    state = make_state(7)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.save(7, state, {"bleu": 1.5})
        checkpoints.wait()
        restored, step = checkpoints.restore(abstract(state))
        assert checkpoints.metrics(7) == {"bleu": 1.5}
        assert checkpoints.metrics(8) == {}
    assert step == 7
    assert_same(restored, state)
    assert sum(p.is_file() for p in folder.rglob("*")) < 40


def test_the_arrays_may_be_donated_right_after_a_save(folder):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    values = np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32)
    state = {"params": jnp.asarray(values)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state)
        update(state)["params"].block_until_ready()
    np.testing.assert_array_equal(checkpoint.restore_params(folder), values)


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_another_number_of_devices(folder, before, after):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, make_state(3, devices=before))
    target = make_state(0, devices=after)
    with Checkpoints(folder) as checkpoints:
        restored, _ = checkpoints.restore(abstract(target))
    assert_same(restored, make_state(3))
    assert all(x.sharding == sharding(after) for x in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    ("metric", "mode", "kept"),
    [("bleu", "max", [2, 5, 6]), ("loss", "min", [2, 5, 6]), ("loss", "max", [5, 6]), (None, "max", [5, 6])],
)
def test_the_newest_and_the_best_are_kept(folder, metric, mode, kept):
    write(folder, range(1, 7), keep_last=2, best_metric=metric, best_mode=mode)
    assert checkpoint.list_steps(folder) == kept
    with Checkpoints(folder, 2, metric, mode) as checkpoints:  # and over a restart
        assert checkpoints.steps() == kept
        assert checkpoints.best() == {"bleu": 2, None: None}.get(metric, 2 if mode == "min" else 6)
        checkpoints.save(7, make_state(7))
    assert checkpoint.list_steps(folder) == [s for s in (2,) if s in kept] + [6, 7]


def test_metrics_that_are_missing_or_not_finite_are_never_the_best(folder):
    with Checkpoints(folder, keep_last=1, best_metric="bleu") as checkpoints:
        checkpoints.save(1, make_state(1), {"bleu": float("nan")})
        assert checkpoints.best() is None
        checkpoints.save(2, make_state(2), {"bleu": 3.0})
        checkpoints.save(3, make_state(3), {"loss": 1.0})
        checkpoints.save(4, make_state(4), {"bleu": float("inf")})
        assert checkpoints.best() == 2
    assert checkpoint.list_steps(folder) == [2, 4]


def test_a_step_is_saved_once(folder):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.save(5, make_state(5))
        assert not checkpoints.save(5, make_state(6))
        with pytest.raises(CheckpointError, match=r"holds step 5, newer than step 4 .* --workdir"):
            checkpoints.save(4, make_state(4))
    assert_same(checkpoint.restore_params(folder), jax.device_get(make_state(5).params))


@pytest.mark.parametrize("damage", [truncate, remove_description, cut_description])
def test_a_damaged_newest_step_is_passed_over_and_replaced(folder, said, damage):
    write(folder)
    damage(folder / "3")
    with Checkpoints(folder, keep_last=2, say=said.append) as checkpoints:
        restored, step = checkpoints.restore(abstract(make_state()))
        assert step == 2
        assert_same(restored, make_state(2))
        assert "3 is damaged" in said[0]
        assert "continuing from step 2" in said[1]
        assert (folder / "3").exists()  # nothing is deleted before there is something to put in its place
        assert checkpoints.save(3, make_state(33))
        assert checkpoints.restore(abstract(make_state()))[1] == 3
    assert len(said) == 2
    assert checkpoint.list_steps(folder) == [2, 3]


def test_damaged_steps_do_not_push_out_good_ones(folder):
    write(folder, range(1, 5))
    truncate(folder / "3")
    truncate(folder / "4")
    with Checkpoints(folder, keep_last=2, say=lambda _: None) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[1] == 2
        assert checkpoints.save(3, make_state(3))
    assert checkpoint.list_steps(folder) == [2, 3]


def test_nothing_restores(folder, said):
    write(folder, (1, 2))
    truncate(folder / "1")
    truncate(folder / "2")
    with Checkpoints(folder, say=said.append) as checkpoints:
        with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* \(1, 2\).*--workdir"):
            checkpoints.restore(abstract(make_state()))
        assert checkpoints.steps() == [1, 2]
    assert len(said) == 2


def test_one_step_and_no_other(folder):
    write(folder)
    truncate(folder / "3")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), step=1)[1] == 1
        with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged"):
            checkpoints.restore(abstract(make_state()), step=3)
        with pytest.raises(NoCheckpointError, match=r"no checkpoint of step 9 .* 1, 2, 3"):
            checkpoints.restore(abstract(make_state()), step=9)


def test_unreadable_scores_only_cost_the_step_its_rank(folder):
    write(folder, best_metric="bleu")
    for file in (folder / "2" / "scores").iterdir():
        file.write_bytes(b"{")
    with Checkpoints(folder, best_metric="bleu") as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        assert checkpoints.best() == 3
        assert checkpoints.restore(abstract(make_state()), step=2)[1] == 2


def test_a_checkpoint_of_another_model(folder):
    write(folder, (1,))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(MismatchError) as error:
            checkpoints.restore(abstract(make_state(width=5)))
        message = str(error.value)
        assert "checkpoints/1 was written with another model" in message
        assert "params/encoder/kernel: float32 (3, 4) saved, float32 (3, 5) wanted" in message
        assert "and 1 more" in message

        with pytest.raises(MismatchError, match=r"ema/w: nothing saved, float32 \(2,\) wanted"):
            checkpoints.restore(abstract(make_state(ema={"w": jnp.ones(2)})))
        with pytest.raises(MismatchError, match=r"params/encoder/kernel: float32 \(3, 4\) saved, bfloat16"):
            checkpoints.restore(abstract(make_state(dtype=jnp.bfloat16)))
        assert checkpoints.steps() == [1]


def test_parameters_alone(folder):
    write(folder, best_metric="bleu")
    for which, step in (("latest", 3), ("best", 2), (1, 1), ("1", 1)):
        assert checkpoint.find_step(folder, which) == step
        params = checkpoint.restore_params(folder, which)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(params))
        assert_same(params, jax.device_get(make_state(step).params))
    with pytest.raises(CheckpointError, match=r"holds no 'ema'; it holds .*params"):
        checkpoint.restore_params(folder, part="ema")
    with pytest.raises(NoCheckpointError, match="no checkpoint of step 4"):
        checkpoint.restore_params(folder, 4)


def test_reading_parameters_does_not_fall_back(folder):
    write(folder)
    truncate(folder / "3")
    with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged .* --checkpoint, of 1, 2, 3"):
        checkpoint.restore_params(folder)


def test_best_without_a_metric(folder):
    write(folder)
    with pytest.raises(NoCheckpointError, match=r"a dev metric .* 1, 2, 3"):
        checkpoint.restore_params(folder, "best")


def test_average(folder):
    write(folder, (1, 2, 4))
    expected = jax.tree.map(
        lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *(make_state(s).params for s in (2, 4))
    )
    average = checkpoint.average_params(folder, last=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, expected)
    assert {x.dtype for x in jax.tree.leaves(average)} == {np.dtype(np.float32)}
    for last in (0, 4):
        with pytest.raises(NoCheckpointError, match=rf"the last {last} .* which has 3: 1, 2, 4"):
            checkpoint.average_params(folder, last=last)


def test_average_is_taken_in_float32(folder):
    with Checkpoints(folder) as checkpoints:
        for step, value in ((1, 256.0), (2, 258.0), (3, 256.0)):  # neighbours in bfloat16
            checkpoints.save(step, {"params": {"w": jnp.full(2, value, jnp.bfloat16)}})
    average = checkpoint.average_params(folder, last=3)["w"]
    np.testing.assert_allclose(average, np.full(2, 770 / 3, np.float32))


def test_average_of_different_models(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(1, width=5))
        checkpoints.save(2, make_state(2))
    with pytest.raises(
        MismatchError, match=r"checkpoints/1 .*\n  bias: float32 \(5,\) saved, float32 \(4,\) wanted"
    ):
        checkpoint.average_params(folder, last=2)


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_a_checkpoint(folder, exists):
    if exists:
        folder.mkdir()
    remedy = rf"no checkpoint in {folder}; .*janus-jax train --workdir={folder.parent}"
    for read in (checkpoint.restore_params, checkpoint.find_step, lambda f: checkpoint.average_params(f, 1)):
        with pytest.raises(NoCheckpointError, match=remedy):
            read(folder)
    assert checkpoint.list_steps(folder) == []
    assert folder.exists() == exists
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(NoCheckpointError, match=remedy),
    ):
        checkpoints.restore(abstract(make_state()))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*file/checkpoints.*--workdir"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert (tmp_path / "file").read_text() == "in the way"


def run_alone(program, folder):
    """Runs `program` in a process of its own with one device, for what would upset this one."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "error", "-c", program, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


DISK_FULL = """
import resource, sys
import jax.numpy as jnp, numpy as np
from janus_jax.checkpoint import CheckpointError, Checkpoints

def largest_file(size):  # stands for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

large = {"params": jnp.asarray(np.random.default_rng(0).normal(size=200_000))}
with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"params": jnp.arange(3.0) + step})
    checkpoints.wait()
    largest_file(100_000)
    checkpoints.save(3, large)
    try:
        checkpoints.save(4, large)
    except CheckpointError as error:
        print(error)
    print(checkpoints.steps())
    largest_file(resource.RLIM_INFINITY)
    checkpoints.save(4, large)
"""


def test_a_full_disk_harms_no_earlier_checkpoint(folder):
    process = run_alone(DISK_FULL, folder)
    assert process.returncode == 0, process.stderr
    message, steps = process.stdout.splitlines()
    assert f"step 3 could not be written in {folder}: File too large; free space" in message
    assert "unharmed (1, 2)" in message
    assert steps == "[1, 2]"
    assert "orbax" not in process.stderr  # none of its tracebacks
    assert {p.name for p in folder.iterdir()} == {"2", "4"}  # with space again the run goes on
    np.testing.assert_array_equal(checkpoint.restore_params(folder, 2), np.arange(3.0) + 2)


KILLED_WHILE_SAVING = """
import os, signal, sys
import jax.numpy as jnp, numpy as np
from janus_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": jnp.arange(5.0)})
checkpoints.wait()
checkpoints.save(2, {"params": jnp.asarray(np.random.default_rng(0).normal(size=8_000_000), jnp.float32)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_during_a_save_leaves_the_last_whole_step(folder):
    process = run_alone(KILLED_WHILE_SAVING, folder)
    assert process.returncode == -9, process.stderr
    left = {p.name for p in folder.iterdir()}
    assert len(left) == 2  # step 1, and the half of step 2
    assert "1" in left
    np.testing.assert_array_equal(checkpoint.restore_params(folder), np.arange(5.0))
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, {"params": jnp.arange(6.0)})
    assert {p.name for p in folder.iterdir()} == {"1", "2"}


def test_bad_settings(folder):
    with pytest.raises(ValueError, match="keep_last"):
        Checkpoints(folder, keep_last=0)
    with pytest.raises(ValueError, match="best_mode"):
        Checkpoints(folder, best_mode="largest")
    assert not folder.exists()
