"""Trains, evaluates and reports every row of a table: launch/tables/SET.sh calls this.

  --scale=smoke|cpu|full   smoke: generated text, a tiny model, two minutes on two cores, the same figures
                           each time; cpu: hours on two cores; full: for GPUs
  --raw_dir=FOLDER         the raw files of the set
  --out=DIR                where everything goes (default: runs/tables/SET, with -smoke for that scale)
  --direction=ende|both    from and into which language; each has a table of its own
  --rows=ROW,...           rows, or base, ablations, all (default: all; smoke: six of them)
  --seeds=N                seeds 0 to N-1 of each row (default: 1)
  --jobs=N                 rows at a time on each device
  --config.KEY=VALUE       for all rows but those that are about this key
  --bench=yes|no           measure speeds at the end, one row after the other (default: yes; smoke: no)
  --dry-run                print the commands

Run directories are OUT/DIRECTION/ROW and OUT/DIRECTION/ROW-sSEED.  What is finished is not done again;
SIGTERM and Ctrl-C save and exit with code 75, and the same command goes on.  Where there are several GPUs,
each has rows of its own; rows side by side on CPU have cores of their own.  At the end `janus-jax report
OUT`.  A row that fails hides no other: exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).resolve().parent)]

from rows import ROWS, SETS, SMOKE_ROWS, Scale, Set, Settings  # noqa: E402

FAILED, USAGE, STOPPED, PIPE = 1, 2, 75, 141
DEV_PAIRS = 1000  # cut from train where a set has no dev of its own
SPEED_ROWS = ("ar", "cmlm", "janus")  # that `bench` measures
# Half the time of a smoke run is compiling: optimise little.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

Command = list[str]  # of janus-jax


class Misused(ValueError):
    """A command line, or data, that no table can be made of; one line that names the remedy."""


@dataclass
class Job:
    """One run: its commands, less those that are done."""

    folder: pathlib.Path
    row: str
    seed: int
    train: Command
    evaluate: dict[str, Command]  # by the name of the way
    settled: Any  # the configuration
    trained: bool = False
    missing: list[str] = field(default_factory=list)  # ways that are still to be evaluated
    updates: int = 0
    done: int = 0  # updates made before
    kind: str = ""  # what decides how long an update takes

    @property
    def commands(self) -> list[Command]:
        """What is left to do, in order."""
        ways = self.missing if self.trained else list(self.evaluate)
        return [*([] if self.trained else [self.train]), *(self.evaluate[way] for way in ways)]


# -- the command line ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Misused(f"{message} (--help tells the usage)")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options, with `settings` for all rows.

    Raises:
      Misused: anything that is not understood.
    """
    parser = _Parser(
        prog="launch/tables/SET.sh",
        usage="launch/tables/SET.sh --scale=smoke|cpu|full [OPTIONS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("set", choices=list(SETS), help=argparse.SUPPRESS)
    parser.add_argument("--scale", required=True, choices=("smoke", "cpu", "full"), help=argparse.SUPPRESS)
    for name in ("raw_dir", "out", "direction", "rows", "bench"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    for name in ("seeds", "jobs"):
        parser.add_argument(f"--{name}", type=_count, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)
    settings = {}
    rest = []
    for word in words:
        key, equals, value = word.removeprefix("--config.").partition("=")
        if word.startswith("--config."):
            if not equals:
                raise Misused(f"{word}: write it as --config.KEY=VALUE")
            if key.startswith("decode."):
                raise Misused(
                    f"{word}: rows are decoded in the ways of the table; janus-jax evaluate decodes a run in "
                    "any other way"
                )
            settings[key] = value
        else:
            rest.append(word)
    args = parser.parse_args(rest)
    args.settings = settings
    known: Set = SETS[args.set]
    smoke = args.scale == "smoke"
    if args.bench not in ("", "yes", "no"):
        raise Misused(f"--bench must be yes or no, got {args.bench!r}")
    args.bench = args.bench == "yes" or (not args.bench and not smoke)
    args.seeds = args.seeds or 1
    others = map(str, range(1, args.seeds))  # what is set is the seed of the first
    if settings.get("seed") in others:
        raise Misused(f"--config.seed={settings['seed']}: --seeds={args.seeds} has that seed already")
    args.jobs = args.jobs or known.scales[args.scale].jobs
    args.rows = _rows(args.rows, SMOKE_ROWS if smoke else tuple(ROWS))
    if args.direction not in ("", "both", *known.directions):
        raise Misused(f"--direction must be {', '.join(known.directions)} or both, got {args.direction!r}")
    chosen = known.directions if args.direction == "both" else (args.direction or known.directions[0],)
    args.directions = chosen
    args.out = pathlib.Path(args.out or f"runs/tables/{args.set}{'-smoke' if smoke else ''}")
    if smoke:
        args.raw_dir = ""
    elif known.raw and not args.raw_dir:
        raise Misused(f"--raw_dir=FOLDER is needed, with {known.raw}")
    if args.raw_dir and not pathlib.Path(args.raw_dir).is_dir():
        raise Misused(f"--raw_dir={args.raw_dir}: no such folder")
    return args


def _count(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text!r}")
    return int(text)


def _rows(text: str, default: tuple[str, ...]) -> tuple[str, ...]:
    if not text:
        return default
    groups = {
        "all": tuple(ROWS),
        "base": tuple(r for r in ROWS if ROWS[r].base),
        "ablations": tuple(r for r in ROWS if not ROWS[r].base),
    }
    chosen: list[str] = []
    for word in text.split(","):
        if word not in groups and word not in ROWS:
            near = difflib.get_close_matches(word, [*ROWS, *groups], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise Misused(f"--rows: unknown row {word!r}{hint}; there are {', '.join(ROWS)}")
        chosen += groups.get(word, (word,))
    return tuple(r for r in ROWS if r in chosen)  # in the order of the table


# -- what there is to do ------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Job]:
    """A job for each direction, seed and row, the first seed of all rows before the second.

    A row that changes what the configuration of the scale has anyway is left out, and said so.
    """
    scale = SETS[args.set].scales[args.scale]
    jobs: list[Job] = []
    for direction, seed, row in itertools.product(args.directions, range(args.seeds), args.rows):
        job = _job(args, scale, direction, row, seed)
        same = [j.row for j in jobs if (j.folder.parent, j.settled) == (job.folder.parent, job.settled)]
        if same:
            print(f"{job.folder}: at this scale {row} is {same[0]}: left out", file=sys.stderr)
        else:
            jobs.append(job)
    return jobs


def settings_of(args: argparse.Namespace, scale: Scale, direction: str, row: str, seed: int) -> Settings:
    """What the row changes of the configuration of its scale."""
    known, out = SETS[args.set], args.out.resolve()
    source, target = direction[:2], direction[2:]
    if args.scale == "smoke":  # the generated text has no French
        source, target = (lang.replace("fr", "ro") for lang in (source, target))
    raw = {}
    if known.cut and args.scale != "smoke":
        raw = {"data.raw_dir": str(out / "raw")}
    elif args.raw_dir:
        raw = {"data.raw_dir": str(pathlib.Path(args.raw_dir).resolve())}
    return {
        **scale.settings,
        "data.source": source,
        "data.target": target,
        "data.dir": str(out / "data"),
        **raw,
        **args.settings,
        **ROWS[row].settings,  # last: else the row would not be what its name says
        **({"seed": seed} if seed else {}),
    }


def _job(args: argparse.Namespace, scale: Scale, direction: str, row: str, seed: int) -> Job:
    from janus_jax import tables

    folder = args.out / direction / (f"{row}-s{seed}" if seed else row)
    settings = settings_of(args, scale, direction, row, seed)
    train = ["train", f"--config={_near(ROOT / scale.config)}", f"--workdir={folder}"]
    train += [f"--config.{key}={_written(value)}" for key, value in settings.items()]
    settled = _settled(train)
    ways = {way.name: way for way in tables.WAYS}
    evaluate = {}
    for name in tables.ways_of(settled.loss.objective):
        way = ways[name]
        options = [f"--{key}={_written(value)}" for key, value in way.how.options.items()]
        options += ["--true_length"] if way.true_length else []
        evaluate[name] = [
            "evaluate",
            f"--workdir={folder}",
            f"--split={settled.data.test_split}",
            f"--decode={way.how.decode}",
            *options,
            "--show=0",
        ]
    job = Job(folder, row, seed, train, evaluate, settled=settled)
    _look(job)
    return job


def _near(path: pathlib.Path) -> pathlib.Path:
    """Relative to where we are, if it lies below."""
    with contextlib.suppress(ValueError):
        return path.relative_to(pathlib.Path.cwd())
    return path


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settled(train: Command) -> Any:
    """The configuration that a command trains."""
    from janus_jax import cli

    args, overrides = cli.parse(train)
    return cli.resolve_config(args.config, None, overrides)


def _look(job: Job) -> None:
    """Notes what of the job is done: settings alike, the last checkpoint there, evaluations of the best."""
    from janus_jax import config, run, tables
    from janus_jax.results import read_run

    wanted = job.settled
    job.updates, job.missing = wanted.train.steps, list(job.evaluate)
    loss = wanted.loss
    aux = loss.objective == "janus" and (loss.aux or loss.kl_ar_aux or loss.kl_nar_aux)
    job.kind = f"{loss.objective} {wanted.model.ar_stream}{' with AUX' if aux else ''}"
    if not (job.folder / "config.json").is_file():
        return
    found = read_run(job.folder)
    if found.config is None:
        return  # train will say what is wrong with it
    job.done = min(found.updates, job.updates)
    same = all(run.free(key, wanted) for key in config.differences(found.config, wanted))
    job.trained = same and (job.folder / "checkpoints" / str(job.updates)).is_dir() and not found.faults
    fine = {
        one.name
        for one in found.evaluations
        if one.split == wanted.data.test_split
        and not one.fault
        and one.hypotheses is not None
        and not tables.stale(found, one)
    }
    if job.trained:
        job.missing = [way for way in job.evaluate if way not in fine]


def benches(args: argparse.Namespace, jobs: Sequence[Job]) -> list[Command]:
    """Speeds of the first seed of some rows, as far as they are not measured yet."""
    if not args.bench:
        return []
    return [
        ["bench", f"--workdir={job.folder}"]
        for job in jobs
        if job.row in SPEED_ROWS and not job.seed and not (job.folder / "bench.json").is_file()
    ]


# -- data ---------------------------------------------------------------------------------------------


def cut_dev(raw: pathlib.Path, to: pathlib.Path, languages: tuple[str, str], count: int = DEV_PAIRS) -> None:
    """`to`/train, val, test of a set that has train and valid alone, once.

    `valid` is the test set.  Dev are the `count` pairs whose text has the least hash: the same for
    everybody.  What is left of train has neither side of any of them, letter case aside.

    Raises:
      Misused: files are missing or do not match, or `to` was cut from others.
    """
    from janus_jax.data import lines

    try:
        found = {split: lines.find_pair(raw, split, languages) for split in ("train", "valid")}
        if missing := [split for split, files in found.items() if not files]:
            raise Misused(f"{raw / f'{missing[0]}.{languages[0]}'} (or .gz) is missing")
        pairs = {split: list(lines.read_pairs(files)) for split, files in found.items() if files}
    except lines.DataError as error:
        raise Misused(str(error)) from error
    text = "\n".join("\t".join(pair) for split in pairs.values() for pair in split)
    made = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "dev pairs": count}
    mark = to / "cut.json"
    if mark.is_file():
        if json.loads(mark.read_text(encoding="utf-8")) != made:
            raise Misused(f"{to} was cut from other files than are in {raw}: choose another --out")
        return
    if len(pairs["train"]) < 2 * count:
        raise Misused(f"{raw} has {len(pairs['train'])} training pairs, too few to cut {count} for dev")
    train = pairs["train"]
    order = sorted(range(len(train)), key=lambda i: hashlib.sha256("\t".join(train[i]).encode()).digest())
    dev = sorted(order[:count])
    taken = {side.lower() for i in dev for side in train[i]}
    rest = [pair for pair in train if not taken & {side.lower() for side in pair}]
    half = to.with_name(f"{to.name}.{os.getpid()}.tmp")
    half.mkdir(parents=True)
    for split, chosen in (("train", rest), ("val", [train[i] for i in dev]), ("test", pairs["valid"])):
        for side, lang in enumerate(languages):
            text = "".join(f"{pair[side]}\n" for pair in chosen)
            (half / f"{split}.{lang}").write_text(text, encoding="utf-8", newline="\n")
    (half / "cut.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    shutil.rmtree(to, ignore_errors=True)  # what a killed process left
    half.rename(to)
    print(f"dev cut from train: {len(dev)} pairs, {len(rest)} left to train on, in {to}", flush=True)


def share_vocabulary(jobs: Sequence[Job]) -> None:
    """Gives runs that have no vocabulary yet that of another one of their folder: one for all, made once."""
    for job in jobs:
        others = [
            j.folder for j in jobs if j.folder.parent == job.folder.parent and _has_vocabulary(j.folder)
        ]
        if others and not _has_vocabulary(job.folder):
            job.folder.mkdir(parents=True, exist_ok=True)
            for name in ("vocab.model", "vocab.json"):  # the second makes it whole
                shutil.copyfile(others[0] / name, job.folder / name)


def _has_vocabulary(folder: pathlib.Path) -> bool:
    return (folder / "vocab.model").is_file() and (folder / "vocab.json").is_file()


# -- cost ---------------------------------------------------------------------------------------------


def tell_cost(args: argparse.Namespace, jobs: Sequence[Job], slots: int) -> None:
    """Prints what is to be done and how long that will take."""
    known, left = SETS[args.set], [job for job in jobs if job.commands]
    print(
        f"{known.what}; {', '.join(args.directions)}; scale {args.scale}; in {args.out}\n"
        f"{len(jobs)} runs ({len(args.rows)} rows, seeds: {args.seeds}) of {jobs[0].updates:,} updates, "
        f"{sum(len(job.evaluate) for job in jobs)} evaluations",
        flush=True,
    )
    finished = len(jobs) - len(left)
    updates = {job.folder: 0 if job.trained else job.updates - job.done for job in left}
    ways = sum(len(job.commands) - (not job.trained) for job in left)
    if finished or sum(updates.values()) < sum(job.updates for job in left):
        print(f"finished: {finished} runs; left: {sum(updates.values()):,} updates and {ways} evaluations")
    if args.scale == "smoke":
        print("some two minutes on two cores", flush=True)
        return
    if args.dry_run or not any(updates.values()):
        return
    seconds: dict[str, tuple[float, str] | None] = {}  # by kind
    total = 0.0
    for job in left:
        if not updates[job.folder]:
            continue
        kind = job.kind
        if kind not in seconds:
            seconds[kind] = _seconds_an_update(job, [j for j in jobs if j.kind == kind])
        if found := seconds[kind]:
            hours = found[0] * updates[job.folder] / 3600
            total += hours
            told = f"{updates[job.folder]:>8,} updates of {found[0]:.3g} s ({found[1]}): {hours:.2f} h"
            print(f"  {job.folder.name:<16} {told}", flush=True)
        else:
            print(f"  {job.folder.name:<16} {updates[job.folder]:>8,} updates: could not be measured")
    side = (
        f", {slots} rows at a time, if they do not hold each other up: {total / slots:.1f} h"
        if slots > 1
        else ""
    )
    print(f"{total:.1f} h of updates{side}; compiling, dev, {ways} evaluations and speeds come on top: "
          "reckon with half as much again", flush=True)  # fmt: skip


def _seconds_an_update(job: Job, alike: Sequence[Job]) -> tuple[float, str] | None:
    """From what runs of this kind wrote down, else measured now in a process of its own."""
    from janus_jax import tables
    from janus_jax.results import read_run

    for other in alike:
        if other.done and (found := tables.update_seconds(read_run(other.folder))):
            return found, f"as {other.folder.name} took"
    print(f"measuring ten updates as {job.folder.name} makes them ...", flush=True)
    words = [word for word in job.train[1:] if not word.startswith("--workdir")]
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(words)], capture_output=True, text=True, env=_env()
    )
    with contextlib.suppress(ValueError, IndexError):
        return float(done.stdout.strip().splitlines()[-1]), "measured now"
    return None


def measure(words: Sequence[str]) -> int:
    """Prints the seconds of an update of a configuration, as its last line."""
    from janus_jax import bench, cli

    args, overrides = cli.parse(["bench", *words])
    print(bench.training(cli.resolve_config(args.config, None, overrides), None)["update s"])
    return 0


def cores(number: int) -> list[set[int]]:
    """The cores of this process in `number` parts, for jobs side by side; empty sets: let them share.

    Two rows that share two cores wait for each other's threads: an update takes a tenth longer.
    """
    if number < 2 or not hasattr(os, "sched_getaffinity"):
        return [set()] * number
    mine = sorted(os.sched_getaffinity(0))
    size = len(mine) // number
    return [set(mine[i * size : (i + 1) * size]) for i in range(number)]


# -- doing it -----------------------------------------------------------------------------------------


def devices() -> list[str]:
    """GPUs by their number; empty where there are none (a CPU, or TPUs, which one process takes whole)."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [d for d in told.split(",") if d and d != "-1"]
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.splitlines()
    found = [str(i) for i, line in enumerate(listed) if line.startswith("GPU ")]
    if found and not _jax_has_cuda():
        told = "there are GPUs, but jax has no CUDA, so rows run on the CPU: pip install -e '.[cuda]'"
        print(told, file=sys.stderr)
        return []
    return found


def _jax_has_cuda() -> bool:
    """Without asking jax, which would take most of a GPU's memory."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def work(commands: Sequence[Command], say: Any = print) -> int:
    """Runs commands of janus-jax in this process, one after the other, until one fails or is stopped."""
    from janus_jax import cli

    for command in commands:
        say(f"+ janus-jax {shlex.join(command)}", flush=True)
        code = cli.main(command)
        if code in (STOPPED, cli.EXIT_INTERRUPTED):
            return STOPPED
        if code:
            return code
    return 0


class _Stop:
    """Notes SIGTERM and Ctrl-C of the driver, and passes them on to what it has started."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.children: set[subprocess.Popen[bytes]] = set()

    def note(self, number: int, _: Any) -> None:
        first = not self.asked.is_set()
        self.asked.set()
        if first:
            print(f"{signal.Signals(number).name}: saving and stopping", file=sys.stderr, flush=True)
        for child in list(self.children):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM if first else signal.SIGKILL)


def run_jobs(jobs: Sequence[Job], slots: Sequence[str], stop: _Stop) -> dict[str, int]:
    """Exit codes by folder of what was run: a job for each slot at a time, each in a process of its own.

    Args:
      jobs: with something left to do.
      slots: the GPU of each slot, or "" for whatever there is; several of these share out the cores.
      stop: what ends it early.
    """
    waiting, codes, lock = list(jobs), {}, threading.Lock()
    slots = slots[: len(jobs)]
    shares = cores(len(slots)) if not any(slots) else [set()] * len(slots)

    def serve(device: str, share: set[int]) -> None:
        if share:
            os.sched_setaffinity(0, share)  # of this thread alone, and of the processes it starts
        while not stop.asked.is_set():
            with lock:
                if not waiting:
                    return
                job = waiting.pop(0)
            try:
                code = _run_apart(job.commands, job.folder, device, len(slots) > 1, stop)
            except OSError as error:  # in a thread it would be seen by nobody, and end the thread
                print(f"{job.folder}: could not be started: {error}", file=sys.stderr)
                code = FAILED
            if code not in (0, STOPPED):
                print(f"{job.folder}: failed (exit code {code}); see {_log(job.folder)}", file=sys.stderr)
            codes[str(job.folder)] = code

    threads = [threading.Thread(target=serve, args=each) for each in zip(slots, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # so that signals are handled
    return codes


def _log(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.log")


def _run_apart(
    commands: Sequence[Command], folder: pathlib.Path, device: str, shared: bool, stop: _Stop
) -> int:
    """`work` in a process of its own, its output in a log beside the run; `shared`: others are beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{folder}: {len(commands)} commands{f' on GPU {device}' if device else ''}, log {_log(folder)}",
        flush=True,
    )
    words = [sys.executable, __file__, "--work", json.dumps(commands)]
    with open(_log(folder), "ab") as log:
        child = subprocess.Popen(
            words, stdout=log, stderr=log, env=_env(device, shared), start_new_session=True
        )
        stop.children.add(child)
        if stop.asked.is_set():  # asked for in between
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        stop.children.discard(child)
    return STOPPED if stop.asked.is_set() and code < 0 else code


def _env(device: str = "", shared: bool = False) -> dict[str, str]:
    env = dict(os.environ)
    if device:
        env["CUDA_VISIBLE_DEVICES"] = device
    if shared:
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return env


def _interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(handler: Any) -> Iterator[None]:
    before = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def smoke(jobs: Sequence[Job]) -> dict[str, int]:
    """All jobs in this process: importing and compiling once is most of what a smoke run saves."""
    codes: dict[str, int] = {}
    with _handled(_interrupt):
        for job in jobs:
            try:
                code = work(job.commands)
            except KeyboardInterrupt:
                code = STOPPED
            codes[str(job.folder)] = code
            if code == STOPPED:
                break
            if code:
                print(f"{job.folder}: failed (exit code {code}); see above", file=sys.stderr)
    return codes


def main(words: Sequence[str]) -> int:
    """Does it all; returns 0, 1 where a row failed, 2 for a wrong command line, 75 if stopped."""
    start = time.monotonic()
    try:
        args = parse(words)
        if args.scale == "smoke":
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
        jobs = _plan(args)
        if args.dry_run:
            return dry_run(args, jobs)
        _make(args.out)
        if SETS[args.set].cut and args.scale != "smoke":
            languages = sorted((args.directions[0][:2], args.directions[0][2:]))
            cut_dev(pathlib.Path(args.raw_dir), args.out / "raw", (languages[0], languages[1]))
    except Misused as error:
        print(f"launch/tables: error: {error}", file=sys.stderr)
        return USAGE
    try:
        return perform(args, jobs, start)
    except KeyboardInterrupt:
        return STOPPED


def _make(out: pathlib.Path) -> None:
    from janus_jax import paths

    try:
        paths.make_writable(out)
    except OSError as error:
        raise Misused(f"--out={out}: {error.strerror}; name a folder that can be written") from error


def _plan(args: argparse.Namespace) -> list[Job]:
    from janus_jax import cli
    from janus_jax.config import ConfigError

    try:
        return plan(args)
    except (cli.UsageError, cli.ConfigFileError, ConfigError) as error:
        raise Misused(str(error)) from error


def dry_run(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Prints the cost in updates and every command that would be run."""
    tell_cost(args, jobs, 1)
    if SETS[args.set].cut and args.scale != "smoke":
        print(f"# cut {DEV_PAIRS} pairs for dev from train, into {args.out / 'raw'}")
    for command in [*(c for job in jobs for c in job.commands), *benches(args, jobs), report_of(args, jobs)]:
        print(f"janus-jax {shlex.join(command)}")
    return 0


def report_of(args: argparse.Namespace, jobs: Sequence[Job]) -> Command:
    """The command that writes the table; figures of a smoke run mean nothing, whatever the commit."""
    split = jobs[0].settled.data.test_split
    return ["report", str(args.out), f"--split={split}", *(["--any_commit"] if args.scale == "smoke" else [])]


def perform(args: argparse.Namespace, jobs: Sequence[Job], start: float) -> int:
    """Prepares, trains, evaluates, measures and reports."""
    gpus = devices()
    slots = [device for _ in range(args.jobs) for device in (gpus or [""])]
    tell_cost(args, jobs, len(slots) if gpus else 1)  # rows on the same cores gain next to nothing
    left = [job for job in jobs if job.commands]
    stop = _Stop()
    if args.scale == "smoke":
        codes: dict[str, int] = {}
        for job in left:
            share_vocabulary(jobs)
            codes |= smoke([job])
            if STOPPED in codes.values():
                break
    else:
        with _handled(stop.note):
            codes = _prepare(jobs, left, slots[0], stop) or run_jobs(left, slots, stop)
            if not stop.asked.is_set():
                for command in benches(args, [j for j in jobs if codes.get(str(j.folder), 0) == 0]):
                    folder = pathlib.Path(command[1].removeprefix("--workdir="))
                    codes[f"{folder} bench"] = _run_apart([command], folder, slots[0], False, stop)
    if STOPPED in codes.values() or stop.asked.is_set():
        print("stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    code = work([report_of(args, jobs)])
    print(f"done in {time.monotonic() - start:.0f} s")
    return FAILED if code or any(codes.values()) else 0


def _prepare(jobs: Sequence[Job], left: Sequence[Job], device: str, stop: _Stop) -> dict[str, int]:
    """Data and vocabulary by the first job of each direction, before others run; codes if that failed."""
    for job in left:
        share_vocabulary(jobs)
        if _has_vocabulary(job.folder):
            continue
        code = _run_apart([["prepare", *job.train[1:]]], job.folder, device, False, stop)
        if code:
            print(
                f"{job.folder}: preparing failed (exit code {code}); see {_log(job.folder)}", file=sys.stderr
            )
            return {str(job.folder): code}
    return {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        with _handled(_interrupt):
            try:
                sys.exit(work(json.loads(sys.argv[2])))
            except KeyboardInterrupt:
                sys.exit(STOPPED)
    if sys.argv[1:2] == ["--measure"]:
        sys.exit(measure(json.loads(sys.argv[2])))
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what we print has gone: `--dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE
    sys.exit(code)
