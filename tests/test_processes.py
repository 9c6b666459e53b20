"""Several processes compute what one does, stop together, and lose each other without hanging.

Real processes with virtual CPU devices, started as a user starts them.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from janus_jax import checkpoint, cli, processes, train
from janus_jax.config import Config, InitConfig, MeshConfig
from tests.layouts import HALF, HEARTBEAT, LAYOUTS, LIMIT, STEPS, assert_same_curve, config_of

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> pathlib.Path:
    """The run of one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    assert train.train(config_of(LAYOUTS["one device"], data), folder) == train.DONE
    return folder


def environment(devices: int) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "NPROC": "16", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def config_file(config: Config, folder: pathlib.Path) -> pathlib.Path:
    """A configuration file that gives `config`."""
    path = folder / "experiment.py"
    path.write_text(
        "from janus_jax.config import from_dict, to_config_dict\n"
        f"def get_config():\n    return to_config_dict(from_dict({config.to_dict()!r}))\n",
        encoding="utf-8",
    )
    return path


def start(count: int, folder: pathlib.Path, config: Config, devices: int = 8) -> list[subprocess.Popen]:
    """`janus-jax train` as `count` processes that share `devices` devices; their words go to FOLDER/I.log."""
    port = free_port()
    file = config_file(config, folder)
    started = []
    for i in range(count):
        words = ["train", f"--config={file}", f"--workdir={folder / 'run'}"]
        words += [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process_id={i}"]
        with open(folder / f"{i}.log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "janus_jax", *words],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(devices // count),
                    cwd=ROOT,
                )
            )
    return started


def finish(started: list[subprocess.Popen], seconds: float = LIMIT) -> list[int]:
    """Exit codes; whoever hangs is killed, and that is a failure."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in started]
    finally:
        for p in started:
            p.kill()
            p.wait()


def wait_for_step(folder: pathlib.Path, step: int, started: list[subprocess.Popen]) -> None:
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and f'"step": {step}, "kind": "train"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in started), [log(folder, i) for i in range(len(started))]
        time.sleep(0.01)


def log(folder: pathlib.Path, i: int) -> str:
    return (folder / f"{i}.log").read_text(encoding="utf-8", errors="replace")


# One result ------------------------------------------------------------------------------------------


def test_two_processes_from_the_launcher_train_and_evaluate(alone, data, tmp_path):
    """`launch/local.sh`, then the same run evaluated by two processes and by one."""
    folder = tmp_path / "run"
    file = config_file(config_of(LAYOUTS["cube"], data), tmp_path)
    launcher = [str(ROOT / "launch" / "local.sh"), "2", "--devices=4", f"--logs={tmp_path}", "--"]
    env = environment(4) | {"JANUS_JAX": f"{sys.executable} -m janus_jax"}

    def launch(*words: str) -> str:
        done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=env, timeout=LIMIT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = launch("train", f"--config={file}", f"--workdir={folder}")
    assert "process 0 of 2" in said
    assert "4 of 8 devices" in said
    assert "8 x cpu (data 2 x fsdp 2 x tensor 2)" in said
    assert said.count("decoder/layers/cross/query/kernel") == 1  # the table of shardings
    assert_same_curve(folder, alone)
    assert "objective" not in log(tmp_path, 1)  # process 0 alone speaks of the run

    together, by_one = tmp_path / "together", tmp_path / "by_one"
    words = ["evaluate", f"--workdir={folder}", "--decode=ar,nar", "--limit=13", "--checkpoint=latest"]
    assert "exact match" in launch(*words, f"--output_dir={together}")
    assert cli.main([*words, f"--output_dir={by_one}"]) == 0
    names = sorted(path.name for path in by_one.iterdir())
    assert names == sorted(path.name for path in together.iterdir())
    for name in names:
        if name.endswith(".hyp"):
            assert (together / name).read_bytes() == (by_one / name).read_bytes()
            assert len((by_one / name).read_text("utf-8").splitlines()) == 13
        else:
            ours, theirs = (json.loads((place / name).read_text("utf-8")) for place in (together, by_one))
            assert ours["scores"] == theirs["scores"]
            assert (ours["processes"], theirs["processes"]) == (2, 1)
            assert ours["passes_per_sentence"] == theirs["passes_per_sentence"]


# Stopping and losing each other ----------------------------------------------------------------------


def test_sigterm_to_one_of_four_stops_all_and_any_number_goes_on(alone, data, tmp_path):
    config = config_of(LAYOUTS["cube"], data)
    four = start(4, tmp_path, config)
    wait_for_step(tmp_path, 2, four)
    four[3].send_signal(signal.SIGTERM)
    assert finish(four) == [train.STOPPED] * 4, [log(tmp_path, i) for i in range(4)]
    saved = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    assert 2 <= saved[-1] < STEPS
    assert f"saved step {saved[-1]} and stopped" in log(tmp_path, 0)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    assert finish(start(2, tmp_path, config)) == [0, 0], log(tmp_path, 0) + log(tmp_path, 1)
    assert f"resuming from step {saved[-1]}" in log(tmp_path, 0)
    assert_same_curve(tmp_path / "run", alone)
    assert train.train(config_of(LAYOUTS["one device"], data), tmp_path / "same") == train.DONE
    assert_same_curve(tmp_path / "same", alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_ends_the_other_which_says_so(alone, data, tmp_path, victim):
    config = config_of(LAYOUTS["fsdp 8"], data)
    two = start(2, tmp_path, config)
    wait_for_step(tmp_path, HALF + 1, two)
    two[victim].kill()
    killed_at = time.monotonic()
    codes = finish(two)
    assert time.monotonic() - killed_at < 3 * HEARTBEAT + 10
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] not in (0, train.STOPPED)
    said = log(tmp_path, 1 - victim)
    if victim == 1:
        assert re.search(r"unhealthy \(stopped sending heartbeats\):\n1\n", said), said
    else:
        assert "leader task was preempted/died" in said, said
    assert train.train(config, tmp_path / "run") == train.DONE  # one process, eight devices
    assert_same_curve(tmp_path / "run", alone)


# What goes wrong before anything begins --------------------------------------------------------------


def one(tmp_path: pathlib.Path, *words: str, timeout: int = 3) -> subprocess.CompletedProcess[str]:
    """`janus-jax train` as one process of several that never come."""
    config = config_of(MeshConfig(), tmp_path / "data")
    layout = dataclasses.replace(config.mesh, startup_timeout=timeout)
    file = config_file(dataclasses.replace(config, mesh=layout), tmp_path)
    command = [
        sys.executable,
        "-m",
        "janus_jax",
        "train",
        f"--config={file}",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, env=environment(1), timeout=LIMIT, cwd=ROOT
    )
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in done.stderr
    return done


def test_a_coordinator_that_cannot_be_reached(tmp_path):
    port = free_port()
    done = one(tmp_path, f"--coordinator=localhost:{port}", "--processes=2", "--process_id=1")
    assert re.search(rf"process 1 waited 3 s .*localhost:{port}: it cannot be reached", done.stderr)


def test_processes_that_do_not_come(tmp_path):
    port = free_port()
    done = one(tmp_path, f"--coordinator=localhost:{port}", "--processes=2", "--process_id=0")
    assert re.search(r"process 0 waited 3 s .*not all of the 2 processes have come", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1234", None, None), "go together"),
        (("localhost:1234", 2, 2), "it counts from 0"),
        (("localhost", 2, 1), "must be HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(arguments, message):
    with pytest.raises(processes.ProcessesError, match=message):
        processes.join(*arguments)


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(processes.ProcessesError, match=rf"port {port} cannot be opened here"):
            processes.join(f"localhost:{port}", 2, 0)


# Without others --------------------------------------------------------------------------------------


def test_alone_everything_is_simple():
    assert (processes.index(), processes.count(), processes.is_main(), processes.several()) == (
        0,
        1,
        True,
        False,
    )
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.main_first(lambda: 3) == 3
    assert not processes.is_loss(ValueError("Gloo all-reduce failed"))
    assert processes.leave(1) == 1


def test_arrays_of_this_process_stay_as_they_are():
    tree = {"x": jax.numpy.arange(3), "y": np.ones(2)}
    assert processes.to_host(tree) == tree


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with processes.stop_requests() as stop:
        assert stop(1) is None
        os.kill(os.getpid(), number)
        assert stop(2) == number.name
    assert signal.getsignal(number) is before


def test_two_processes_start_from_another_run(alone, data, tmp_path):
    config = config_of(LAYOUTS["cube"], data)
    config = dataclasses.replace(
        config,
        init=InitConfig(str(alone), "latest"),
        train=dataclasses.replace(config.train, steps=1),
        optim=dataclasses.replace(config.optim, lr=0.0, init_lr=0.0),
    )
    assert finish(start(2, tmp_path, config)) == [0, 0], [log(tmp_path, i) for i in range(2)]
    wanted, found = (checkpoint.restore_params(place / "checkpoints") for place in (alone, tmp_path / "run"))
    assert jax.tree.all(jax.tree.map(np.array_equal, wanted, found))
    assert log(tmp_path, 0).count("starting from") == 1
    assert "starting from" not in log(tmp_path, 1)
