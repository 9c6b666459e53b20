"""The launchers, with programs on the PATH that stand in for gcloud, SLURM, kubectl and janus-jax."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
TRAIN = ("--", "train", "--config=configs/wmt14_ende.py", "--workdir=gs://bucket/run")

RECORD = r"""#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >>"$FAKE/calls"
"""
# A TPU VM of two workers, each with a home of its own, on which commands really run.
GCLOUD = r"""
kind=$3 action=$4
for word; do case $word in --worker=*) who=${word#*=} ;; --command=*) command=${word#*=} ;; esac; done
case "$kind $action" in
  *" describe")
    file=$FAKE/state; [ "$kind" = tpu-vm ] || file=$FAKE/queue
    [ -e "$file" ] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
    cat "$file"
    if [ "$kind" = queued-resources ]; then echo READY >"$FAKE/state"; mkdir -p "$FAKE"/hosts/{0,1}; fi ;;
  "queued-resources create") echo WAITING_FOR_RESOURCES >"$FAKE/queue" ;;
  "queued-resources delete") rm -rf "$FAKE"/{queue,state,hosts} ;;
  "tpu-vm create")
    [ ! -e "$FAKE/no_capacity" ] || { rm "$FAKE/no_capacity"; echo "no capacity" >&2; exit 1; }
    echo READY >"$FAKE/state"; mkdir -p "$FAKE"/hosts/{0,1} ;;
  "tpu-vm delete") rm -rf "$FAKE"/{state,hosts} ;;
  "tpu-vm scp") for host in "$FAKE"/hosts/*; do cp "$5" "$host"; done ;;
  "tpu-vm ssh")
    for host in "$FAKE"/hosts/$([ "$who" = all ] && echo '*' || echo "$who"); do
      [ "$(cat "$FAKE/state")" = READY ] || exit 255
      (cd "$host" && HOME=$host WORKER=${host##*/} bash -c "$command") || exit
    done ;;
esac
"""
# Makes a virtual environment whose janus-jax is the test's program.
PYTHON = r"""
mkdir -p .venv/bin
printf '#!/usr/bin/env bash\necho "pip $*" >>"$FAKE/pip"\n' >.venv/bin/python
chmod +x .venv/bin/python
ln -s "$FAKE/bin/program" .venv/bin/janus-jax
"""
SBATCH = r"""
wrap="${@: -1}"
for ((starts = 0; ; starts++)); do
  rm -f "$FAKE/requeued"
  SLURM_JOB_ID=7 SLURM_RESTART_COUNT=$starts bash -c "echo \$\$ >$FAKE/job; ${wrap#--wrap=}"
  echo $? >"$FAKE/job_code"
  [ -e "$FAKE/requeued" ] || exit 0
done
"""
SRUN = r"""
highest=0
for word; do case $word in --ntasks=*) count=${word#*=} ;; esac; done
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < count; i++)); do SLURM_JOB_ID=7 SLURM_PROCID=$i WORKER=$i "$@" & done
for job in $(jobs -p); do wait "$job" || { code=$?; ((code > highest)) && highest=$code; }; done
exit $highest
"""
SCONTROL = 'touch "$FAKE/requeued"\n'
KUBECTL = 'cat >"$FAKE/manifest"\nexit "${KUBECTL_CODE:-0}"\n'
# What every program of the tests begins with: who it is, and its how many-th start this is.
PROGRAM = r"""#!/usr/bin/env bash
for word; do case $word in --process_id=*) WORKER=${word#*=} ;; esac; done
echo start >>"$FAKE/starts.$WORKER"
start=$(wc -l <"$FAKE/starts.$WORKER")
echo "$*" >>"$FAKE/arguments.$WORKER"
echo "worker $WORKER start $start"
# Until all of N workers have come to this line.
together() { touch "$FAKE/here.$start.$WORKER"
  for _ in {1..200}; do
    here=("$FAKE"/here.$start.*); ((${#here[@]} < $1)) || return 0; sleep 0.05
  done; exit 99; }
# Until SIGTERM.
work() { trap "$1" TERM; echo working; touch "$FAKE/working.$WORKER"
  for _ in {1..200}; do sleep 0.1; done; exit 98; }
"""


class Machine:
    """A place to run launchers in: a copy of them in a repository, and the stand-ins."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder / "fake"
        self.root = folder / "repository"
        (self.folder / "bin").mkdir(parents=True)
        shutil.copytree(LAUNCH, self.root / "launch")
        (folder / "home").mkdir()
        self.environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
            "FAKE": str(self.folder),
            "JANUS_JAX_PAUSE": "0",
            "JANUS_JAX_POLL": "0.05",
            "JANUS_JAX": "program",
        }
        fakes = {"gcloud": GCLOUD, "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "kubectl": KUBECTL}
        for name, body in fakes.items():
            self.write(name, RECORD + body)
        self.write("python3.13", f"#!/usr/bin/env bash\n{PYTHON}")
        self.program("exit 0")

    def write(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text, "utf-8")
        path.chmod(0o755)

    def program(self, body: str) -> None:
        self.write("program", f"{PROGRAM}{body}\n")

    def start(self, script: str, *words: str, **environment: str) -> subprocess.Popen:
        # Where the tests run in the background Ctrl-C is ignored, and a shell cannot change that.
        return subprocess.Popen(
            ["env", "--default-signal=INT", f"launch/{script}", *words],
            cwd=self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return finish(self.start(script, *words, **environment))

    def calls(self, *beginning: str) -> list[list[str]]:
        """The recorded calls that begin with these words."""
        path = self.folder / "calls"
        found = [shlex.split(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
        return [call for call in found if call[: len(beginning)] == list(beginning)]

    def actions(self) -> list[str]:
        """What was asked of gcloud, in short, looks at the state left out."""
        short = []
        for call in self.calls("gcloud", "compute", "tpus"):
            command = next((w for w in call if w.startswith("--command=")), "")
            inner = re.search(r"tpu_worker.sh (\w+)", command)
            short.append(f"{call[3]} {call[4]}" + (f" {inner[1]}" if inner else ""))
        return [action.removeprefix("tpu-vm ") for action in short if not action.endswith("describe")]

    def starts(self, worker: int) -> int:
        path = self.folder / f"starts.{worker}"
        return len(path.read_text("utf-8").splitlines()) if path.exists() else 0

    def arguments(self, worker: int) -> str:
        return (self.folder / f"arguments.{worker}").read_text("utf-8")

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} never came"
            time.sleep(0.02)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# -- all of them ----------------------------------------------------------------------------------

POD = ("tpu_pod.sh", "pod", "us-central2-b", "v4-16")
GKE = ("gke.sh", "run1", "registry.example/janus-jax:1", "tpu-v5-lite-podslice", "4x8")


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "slurm_gpu.sh", "gke.sh"])
def test_usage(machine, script):
    """The comment at the head is the usage: asked for on stdout, else on stderr with exit code 2."""
    asked, missing = machine.run(script, "--help"), machine.run(script)
    assert (asked.returncode, missing.returncode) == (0, 2)
    assert f"launch/{script}" in asked.stdout
    assert asked.stdout == missing.stderr
    assert "--dry-run" in asked.stdout
    assert "set -e" not in asked.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("local.sh", "x", *TRAIN), "N must be a whole number from 1 up, got 'x'"),
        (("local.sh", "0", *TRAIN), "N must be a whole number from 1 up, got '0'"),
        (("local.sh", "2", "--restarts=-1", *TRAIN), "--restarts must be a whole number from 0 up, got '-1'"),
        (("local.sh", "2", "--devises=2", *TRAIN), "unknown option '--devises=2'"),
        (("local.sh", "2", "train"), "unknown option 'train'"),
        (("local.sh", "2", "--"), "give the command after --"),
        (("local.sh", "2"), "give the command after --"),
        (("local.sh", "2", "--", "demo"), "only train and evaluate run in several processes, got 'demo'"),
        (("tpu_pod.sh", "Pod", "us-central2-b", "v4-8", *TRAIN), "NAME must be lower-case letters"),
        (
            ("tpu_pod.sh", "pod", "v4-8", "us-central2-b", *TRAIN),
            "ZONE must be like us-central2-b, got 'v4-8'",
        ),
        (("tpu_pod.sh", "pod", "us-central2-b", "v4", *TRAIN), "TYPE must be like v4-64, got 'v4'"),
        ((*POD, "--run=a b", *TRAIN), "--run must be letters, digits"),
        ((*POD, "--extras=[tpu]", *TRAIN), "--extras must be names"),
        ((*POD, "--spott", *TRAIN), "unknown option '--spott'"),
        (("slurm_gpu.sh", "--per=host", *TRAIN), "--per must be gpu or node, got 'host'"),
        (("slurm_gpu.sh", "--nodes=two", *TRAIN), "--nodes must be a whole number from 1 up, got 'two'"),
        (("slurm_gpu.sh", "-N2", *TRAIN), "unknown option '-N2'"),
        ((*GKE[:4], "4by8", *TRAIN), "TOPOLOGY must be like 4x8 or 4x4x8, got '4by8'"),
        ((*GKE, "--chips=5", *TRAIN), "--chips=5 must divide the 32 chips of topology 4x8"),
        ((*GKE, "--namespace=A B", *TRAIN), "--namespace must be a Kubernetes name, got 'A B'"),
        ((*GKE, *TRAIN, "a\nb"), "an argument holds a control character"),
    ],
)
def test_wrong_command_line(machine, words, message):
    done = machine.run(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not machine.calls()


@pytest.mark.parametrize(
    "words",
    [
        ("local.sh", "2", "--devices=2"),
        (*POD, "--spot", "--delete"),
        (*POD, "--queued"),
        ("slurm_gpu.sh", "--nodes=2", "--gpus=4"),
        GKE,
    ],
    ids=lambda words: " ".join((words[0], *words[5:])),
)
def test_dry_run_runs_nothing(machine, words):
    before = set(machine.root.parent.rglob("*"))
    done = machine.run(*words, "--dry-run", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    assert set(machine.root.parent.rglob("*")) == before


def test_documented_dry_runs():
    """The blocks of docs/launching.md are what the launchers print."""
    text = (ROOT / "docs" / "launching.md").read_text("utf-8")
    blocks = re.findall(r"^```console\n\$ (.*?[^\\])\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ran = []
    for command, output in blocks:
        words = shlex.split(command.replace("\\\n", " "))
        assert "--dry-run" in words
        done = subprocess.run(
            words, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30
        )
        assert done.stdout == output, f"docs/launching.md, {command}"
        ran.append(words[0].removeprefix("launch/"))
    assert set(ran) == {"local.sh", "tpu_pod.sh", "slurm_gpu.sh", "gke.sh"}


# -- local.sh -------------------------------------------------------------------------------------


def test_local_starts_all_processes(machine, tmp_path):
    machine.program('together 3\necho "$NPROC $JAX_PLATFORMS $XLA_FLAGS"')
    logs = f"--logs={tmp_path / 'logs'}"
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"
    done = machine.run("local.sh", "3", "--devices=4", logs, "--", "train", "--x=a  b", XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "worker 0 start 1\n24 cpu --xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=4\n"
    )
    assert (tmp_path / "logs" / "0.log").read_text() == done.stdout
    assert (tmp_path / "logs" / "2.log").read_text().startswith("worker 2 start 1\n")
    ports = set()
    for i in range(3):
        pattern = rf"train --x=a  b --coordinator=localhost:(\d+) --processes=3 --process_id={i}\n"
        ports.add(re.fullmatch(pattern, machine.arguments(i))[1])
    assert len(ports) == 1


def test_local_names_the_first_failure_and_kills_stragglers(machine, tmp_path):
    machine.program(
        """together 3
        case $WORKER in
          0) trap '' TERM; touch "$FAKE/hung"; sleep 60 & wait; exit 0 ;;
          1) until [ -e "$FAKE/hung" ]; do sleep 0.05; done; echo 'no space left'; exit 3 ;;
          2) until [ -e "$FAKE/hung" ]; do sleep 0.05; done; sleep 0.4; exit 4 ;;
        esac"""
    )
    began = time.monotonic()
    done = machine.run("local.sh", "3", "--grace=1", f"--logs={tmp_path / 'logs'}", "--restarts=3", *TRAIN)
    assert time.monotonic() - began < 15
    assert done.returncode == 3
    assert "killing what has not ended: process 0" in done.stderr
    assert f"process 1 of 3 failed with exit code 3; the end of {tmp_path / 'logs' / '1.log'}:" in done.stderr
    assert "  | no space left" in done.stderr
    assert "process 2" not in done.stderr
    assert machine.starts(1) == 1


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 75), 75), ((75, 75), 75), ((75, 6), 6), ((0, 5), 5), ((0, 0), 0)]
)
def test_local_exit_code(machine, codes, expected):
    machine.program(f"together 2; codes=({' '.join(map(str, codes))}); exit ${{codes[WORKER]}}")
    assert machine.run("local.sh", "2", *TRAIN).returncode == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(machine, number):
    machine.program('work "echo saved; exit 75"')
    process = machine.start("local.sh", "2", "--restarts=5", *TRAIN)
    machine.wait_for("working.0", "working.1")
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 75
    assert "saved\n" in done.stdout
    assert f"{number.name}: passed on to all" in done.stderr
    assert "the same command goes on" in done.stderr
    assert (machine.starts(0), machine.starts(1)) == (1, 1)


def test_local_second_signal_kills(machine):
    machine.program('work ""')
    process = machine.start("local.sh", "2", *TRAIN)
    machine.wait_for("working.0", "working.1")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 137


def test_local_restarts_what_was_saved(machine, tmp_path):
    machine.program("together 2; ((start > 2)) || exit 75")
    done = machine.run("local.sh", "2", "--restarts=2", f"--logs={tmp_path / 'logs'}", *TRAIN)
    assert done.returncode == 0
    assert done.stdout == "worker 0 start 1\nworker 0 start 2\nworker 0 start 3\n"
    assert "starting again (2 of at most 2)" in done.stderr
    (machine.folder / "starts.0").unlink()
    (machine.folder / "starts.1").unlink()
    assert machine.run("local.sh", "2", "--restarts=1", *TRAIN).returncode == 75


def test_local_needs_the_program(machine):
    done = machine.run("local.sh", "2", *TRAIN, JANUS_JAX="no-such-program")
    assert done.returncode == 1
    assert "no-such-program is not on the path" in done.stderr


# -- tpu_pod.sh -----------------------------------------------------------------------------------


@pytest.fixture
def pod(machine):
    """Two workers, and a repository with a commit to send."""
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], cwd=machine.root, env=machine.environment, check=True, timeout=30)
    return machine


ONE_RUN = ["scp", "ssh", "ssh install", "ssh start", "ssh follow", "ssh result"]


def test_pod_creates_installs_and_runs(pod):
    pod.program("together 2")
    done = pod.run(*POD, "--spot", "--project=p", *TRAIN, "--x=a 'b'")
    assert done.returncode == 0, done.stderr
    assert "worker 0 start 1\n" in done.stdout
    assert "worker 1 start" not in done.stdout
    assert pod.actions() == ["create", *ONE_RUN]
    (create,) = pod.calls("gcloud", "compute", "tpus", "tpu-vm", "create")
    assert create[5:] == [
        "pod",
        "--zone=us-central2-b",
        "--project=p",
        "--accelerator-type=v4-16",
        "--version=tpu-ubuntu2204-base",
        "--spot",
    ]
    for i in range(2):
        assert pod.arguments(i) == f"{' '.join(TRAIN[1:])} --x=a 'b' --distributed\n"
        log = pod.folder / "hosts" / str(i) / "janus_jax" / "runs" / "run" / "log"
        assert log.read_text() == f"worker {i} start 1\n"
    assert (pod.folder / "pip").read_text() == "pip -m pip install --quiet .[tpu]\n" * 2
    assert (pod.folder / "state").exists()  # deleted on request only

    again = pod.run(*POD, "--delete", *TRAIN)
    assert again.returncode == 0, again.stderr
    assert pod.actions()[7:] == [*ONE_RUN, "delete"]
    assert (pod.folder / "pip").read_text().count("\n") == 2  # this commit is installed already


def test_pod_waits_in_the_queue(pod):
    done = pod.run(*POD, "--queued", "--delete", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "pod: WAITING_FOR_RESOURCES" in done.stderr
    assert pod.actions() == ["queued-resources create", *ONE_RUN, "queued-resources delete"]
    (delete,) = pod.calls("gcloud", "compute", "tpus", "queued-resources", "delete")
    assert delete[5:] == ["pod", "--zone=us-central2-b", "--force", "--quiet"]


def test_pod_starts_again_after_a_preemption(pod):
    pod.program(
        """together 2
        ((start == 1)) || exit 0
        [ "$WORKER" = 1 ] || { touch "$FAKE/no_capacity"; echo PREEMPTED >"$FAKE/state"; }
        exit 1"""
    )
    done = pod.run(*POD, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert [a for a in pod.actions() if a in ("create", "delete")] == ["create", "delete", "create", "create"]
    assert (pod.starts(0), pod.starts(1)) == (2, 2)
    assert "the TPU is PREEMPTED: starting again (1 of at most 20)" in done.stderr
    assert "worker 0 start 2" in done.stdout


@pytest.mark.parametrize(
    ("body", "words", "expected", "starts"),
    [
        ("exit 3", (), 3, 1),
        ("[ $WORKER = 0 ] || exit 4", (), 4, 1),  # another worker than the one whose log is shown
        ("((start > 1)) || exit 75", (), 0, 2),
        ("exit 75", ("--restarts=1",), 75, 2),
        ("[ $WORKER = 0 ] || { trap '' TERM; sleep 60; }", ("--grace=0",), 137, 1),
    ],
)
def test_pod_exit_code(pod, body, words, expected, starts):
    pod.program(f"together 2; {body}")
    done = pod.run(*POD, *words, "--delete", *TRAIN)
    assert done.returncode == expected, done.stderr
    assert pod.starts(0) == starts
    assert pod.actions().count("create") == 1
    assert pod.actions().count("delete") == 1
    assert f"ended with exit code {expected}" in done.stderr


def test_pod_stops_on_request(pod):
    pod.program('work "echo saved; exit 75"')
    process = pod.start(*POD, *TRAIN)
    pod.wait_for("working.0", "working.1")
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 75, done.stderr
    assert "saved" in done.stdout
    assert (pod.starts(0), pod.starts(1)) == (1, 1)
    assert "delete" not in pod.actions()


def test_pod_follows_a_run_that_goes_on(pod):
    """The launcher went away without a word; its command line again finds the run."""
    pod.program(
        'together 2; touch "$FAKE/working"; until [ -e "$FAKE/finish" ]; do sleep 0.05; done; echo done'
    )
    first = pod.start(*POD, *TRAIN)
    pod.wait_for("working")
    os.killpg(first.pid, signal.SIGKILL)
    finish(first)
    second = pod.start(*POD, *TRAIN)
    while not len(pod.calls("gcloud", "compute", "tpus", "tpu-vm", "ssh")) > 7:
        time.sleep(0.05)
        assert second.poll() is None
    (pod.folder / "finish").touch()
    done = finish(second)
    assert done.returncode == 0, done.stderr
    assert "run runs already" in done.stdout
    assert "done" in done.stdout
    assert pod.starts(0) == 1


def test_pod_that_cannot_be_created(pod):
    (pod.folder / "no_capacity").touch()
    done = pod.run(*POD, *TRAIN)
    assert done.returncode == 1
    assert "no capacity" in done.stderr
    assert "the TPU could not be created" in done.stderr


# -- slurm_gpu.sh ---------------------------------------------------------------------------------


def test_slurm_submits_and_runs(machine):
    machine.program('together 4; echo "devices ${JAX_LOCAL_DEVICE_IDS:-}"')
    words = ("--nodes=2", "--gpus=2", "--time=1:00:00", "--partition=a b", "--notice=60")
    done = machine.run("slurm_gpu.sh", *words, *TRAIN, "--x=a 'b'")
    assert done.returncode == 0, done.stderr
    (sbatch,) = machine.calls("sbatch")
    assert sbatch[1:-1] == [
        *("--job-name=janus-jax", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=8"),
        *("--gpus-per-node=2", "--requeue", "--open-mode=append", "--signal=TERM@60"),
        *("--output=slurm-logs/%x-%j.log", "--time=1:00:00", "--partition=a b"),
    ]
    assert len(machine.calls("srun")) == 1
    assert (machine.folder / "job_code").read_text() == "0\n"
    assert "worker 0 start 1\ndevices \n" in done.stdout
    assert "worker 1" not in done.stdout
    log = machine.root / "slurm-logs" / "janus-jax-7.1.log"
    assert log.read_text() == "worker 1 start 1\ndevices \n"
    assert machine.arguments(3) == f"{' '.join(TRAIN[1:])} --x=a 'b' --distributed\n"
    assert not machine.calls("scontrol")


def test_slurm_one_process_for_each_node(machine):
    machine.program('together 2; echo "devices $JAX_LOCAL_DEVICE_IDS"')
    done = machine.run("slurm_gpu.sh", "--nodes=2", "--gpus=4", "--per=node", *TRAIN)
    assert "devices 0,1,2,3\n" in done.stdout
    assert {"--ntasks=2", "--ntasks-per-node=1", "--gpus-per-node=4"} <= set(machine.calls("sbatch")[0])


@pytest.mark.parametrize(
    ("body", "words", "expected", "starts"),
    [
        ("((start > 1)) || exit 75", (), 0, 2),
        ("exit 75", ("--restarts=2",), 75, 3),
        ("[ $WORKER = 0 ] && exit 3; sleep 0.3; exit 75", (), 3, 1),  # srun tells but the highest
        ("[ $WORKER = 0 ] && exit 3; sleep 0.3; exit 5", (), 3, 1),
        ('kill -KILL "$PPID"', (), 137, 1),
        ('[ $WORKER = 1 ] || kill "$(cat "$FAKE/job")"; exit 75', (), 75, 1),  # cancelled
    ],
)
def test_slurm_requeues_what_was_saved(machine, body, words, expected, starts):
    machine.program(f"together 2; {body}")
    done = machine.run("slurm_gpu.sh", "--gpus=2", *words, *TRAIN)
    assert ("process 0 of 2 failed first; its log: slurm-logs/janus-jax-7.log" in done.stderr) == (
        expected == 3
    )
    assert (machine.folder / "job_code").read_text() == f"{expected}\n"
    assert machine.starts(0) == starts
    assert machine.calls("scontrol") == [["scontrol", "requeue", "7"]] * (starts - 1)


def test_slurm_notice_ahead_of_the_time_limit(machine):
    """SIGTERM to every process of the step, this script's and janus-jax, but not to the job's script."""
    machine.program('((start == 1)) || exit 0; echo $$ $PPID >"$FAKE/ids.$WORKER"; work "exit 75"')
    process = machine.start("slurm_gpu.sh", "--gpus=2", *TRAIN)
    machine.wait_for("working.0", "working.1")
    for worker in range(2):
        for number in (machine.folder / f"ids.{worker}").read_text().split():
            os.kill(int(number), signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 0, done.stderr
    assert (machine.folder / "job_code").read_text() == "0\n"
    assert machine.calls("scontrol") == [["scontrol", "requeue", "7"]]


# -- gke.sh ---------------------------------------------------------------------------------------


def test_gke_applies_the_manifest(machine):
    words = ("--slices=2", "--restarts=7", "--service-account=writer", "--namespace=team")
    done = machine.run(*GKE, *words, *TRAIN, '--x=a "b" \\ {{NAME}} $(HOME)')
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [["kubectl", "apply", "-f", "-"]]
    text = (machine.folder / "manifest").read_text()
    found = yaml.safe_load(text)
    assert "gke-spot" not in text
    assert (found["kind"], found["metadata"]["name"], found["metadata"]["namespace"]) == (
        "JobSet",
        "run1",
        "team",
    )
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    (slices,) = found["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (8, 8, "Indexed")
    assert job["backoffLimit"] == 0
    evicted, failed = job["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Count"
    assert failed["action"] == "FailJob"
    assert 75 not in failed["onExitCodes"]["values"]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["serviceAccountName"] == "writer"
    (container,) = pod["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert container["args"] == [*TRAIN[1:], '--x=a "b" \\ {{NAME}} $$(HOME)', "--distributed"]
    assert container["image"] == "registry.example/janus-jax:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}, "requests": {"google.com/tpu": 4}}


def test_gke_on_spot_nodes(machine):
    done = machine.run(*GKE, "--spot", "--chips=8", "--dry-run", *TRAIN)
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert not machine.calls()


def test_gke_passes_kubectls_exit_code(machine):
    assert machine.run(*GKE, *TRAIN, KUBECTL_CODE="9").returncode == 9
