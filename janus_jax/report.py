"""What a run tells the world: metric files, progress, tables and stopwatches; pictures are in plots.

  numbers     MetricsWriter, read_metrics, comparable, write_json, commit, versions, peak_memory
  terminal    progress, table, refinement_text
  stopwatch   Timer

A metrics file `metrics.jsonl` has one row per line,

  {"step": 50, "kind": "train", "metrics": {"loss": 7.25, ...}, "timing": {"step_s": 0.11, ...}}

where `metrics` is a function of (config, data, seed) alone, bit for bit, and `timing` is whatever the
clock said.  Kinds: `train`, `dev`, and `event` for what happened to the process.

Room: [disk, clock].  Imports paths.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import rich.box
import rich.measure
import rich.progress
import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from janus_jax import paths
from janus_jax.paths import AnyPath

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
KINDS = ("train", "dev", "event")
PACKAGES = (
    "janus-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "sentencepiece",
    "sacrebleu",
    "numpy",
)

Path = str | os.PathLike[str]
Row = dict[str, Any]


class ReportError(ValueError):
    """Something that cannot be written, read back or drawn; the message names it and the remedy."""


# -- numbers ------------------------------------------------------------------------------------------


class MetricsWriter:
    """Writes the rows of a run to `folder/metrics.jsonl` and, if asked, to TensorBoard event files.

    Each row has reached the operating system when `write` returns, so kill -9 loses none.  On resume,
    rows after `resume_step` and a half-written last line are dropped in one atomic step: the file of an
    interrupted run ends up with the `metrics` of an uninterrupted one.  For that, write the rows of step
    k, and `flush`, before the checkpoint of step k.

    Where `folder` is a URL, the files grow in a cache of this machine and are uploaded whole by `flush`:
    object stores have no append.  What kill -9 loses there lies after the last checkpoint.
    """

    def __init__(self, folder: Path, tensorboard: bool = True, resume_step: int = -1) -> None:
        """Opens the files of a run; `resume_step` is the last step to keep, -1 starts anew.

        Raises:
          ReportError: the folder cannot be written, or the file there is damaged before its last line.
        """
        self._home = paths.as_path(folder)
        self._remote = paths.is_remote(self._home)
        local = paths.cache_folder(folder, "metrics") if self._remote else pathlib.Path(folder)
        self._path = local / METRICS_FILE
        self._events: _EventFile | None = None
        with _clear_errors(self._home / METRICS_FILE):
            local.mkdir(parents=True, exist_ok=True)
            if self._remote:
                self._fetch()
            if self._path.exists():
                _keep_until(self._path, resume_step)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
            if tensorboard:
                others = self._home / TENSORBOARD_FOLDER
                restarted = others.is_dir() and any(others.iterdir())
                self._events = _EventFile(local / TENSORBOARD_FOLDER, restarted, resume_step)
            self._upload()

    def write(
        self,
        step: int,
        kind: str,
        metrics: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends one row.  Values are numbers (Python, numpy or JAX scalars), strings or None.

        Floats keep every bit; NaN and infinities become null, which is what JSON has.

        Raises:
          ReportError: an unknown kind, a value that is no scalar, or a disk that takes no more.
        """
        if kind not in KINDS:
            raise ReportError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        row = {"step": step, "kind": kind, "metrics": dict(metrics), "timing": dict(timing or {})}
        line = (_json(row) + "\n").encode()
        with _clear_errors(self._home / METRICS_FILE):
            while line:  # an unbuffered write may take a part
                line = line[self._file.write(line) :]
            if self._events is not None:
                self._events.write(step, kind, metrics)
                self._events.write(step, f"{kind}_timing", timing or {})

    def flush(self) -> None:
        """Brings what was written to where it belongs; a local folder has it already.

        Raises:
          ReportError: the store takes no more.
        """
        with _clear_errors(self._home / METRICS_FILE):
            self._upload()

    def close(self) -> None:
        """`flush`, and closes the files; further writes fail."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        self.flush()

    def _fetch(self) -> None:
        """Puts what the store has in place of whatever an earlier process left here."""
        shutil.rmtree(self._path.parent / TENSORBOARD_FOLDER, ignore_errors=True)
        self._path.unlink(missing_ok=True)
        if (self._home / METRICS_FILE).exists():
            self._path.write_bytes((self._home / METRICS_FILE).read_bytes())

    def _upload(self) -> None:
        if not self._remote:
            return
        (self._home / METRICS_FILE).write_bytes(self._path.read_bytes())
        if self._events is not None:
            name = self._events.path.name
            (self._home / TENSORBOARD_FOLDER / name).write_bytes(self._events.path.read_bytes())

    def __enter__(self) -> MetricsWriter:
        """The writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self.close()


class SilentWriter(MetricsWriter):
    """Writes nothing: for a process that leaves it to another one."""

    def __init__(self) -> None:
        """Opens nothing."""

    def write(
        self,
        step: int,
        kind: str,
        metrics: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class _EventFile:
    """TensorBoard scalars, written in this thread: a full disk is noticed here and kill -9 loses nothing."""

    def __init__(self, folder: pathlib.Path, restarted: bool, resume_step: int) -> None:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._scalar = Event, summary.scalar
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{time.time_ns()}"
        self._writer = EventsWriter(str(folder / "events"), suffix)
        if restarted:  # hides what earlier files hold from this step on
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._writer.flush()
        (self.path,) = folder.glob(f"events*{suffix}")

    def write(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(number := _scalar(name, value), (int, float)):
                summary = self._scalar(f"{prefix}/{name}", number)
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run, in order; a half-written last line is left out.

    Raises:
      ReportError: no metrics file there, or a line before the last that is not a row.
    """
    path = paths.as_path(folder) / METRICS_FILE
    if not path.is_file():
        raise ReportError(f"{path}: no metrics here; is {folder} the folder of a run that has trained?")
    return _rows(path)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Train and dev rows without their timing: what two runs of one config and seed have in common."""
    return [{k: v for k, v in r.items() if k != "timing"} for r in rows if r["kind"] != "event"]


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically: the file is the old one or the new one, never half.

    Raises:
      ReportError: the place cannot be written, or a value inside is not plain data.
    """
    replace_file(paths.as_path(path), (_json(value, indent=2) + "\n").encode())


def commit() -> str | None:
    """The commit of this package's checkout, with "-dirty" for changes to it; None if it is not in one."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed from a wheel, perhaps inside somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that is not ours to read
        return None
    return told.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, by package; None where one is not installed, or not known."""
    found: dict[str, str | None] = {
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class PeakMemory(NamedTuple):
    """Largest use of memory so far, in bytes."""

    host: int  # resident set of this process
    device: int | None  # of the fullest device; None where devices do not say (CPU)


def peak_memory(*device_stats: Mapping[str, Any] | None) -> PeakMemory:
    """Peak memory of this process and of the devices whose `memory_stats()` are given."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peaks = [int(s["peak_bytes_in_use"]) for s in device_stats if s and "peak_bytes_in_use" in s]
    kilobytes = sys.platform != "darwin"  # macOS counts bytes
    return PeakMemory(host=rss * 1024 if kilobytes else rss, device=max(peaks, default=None))


def _rows(path: AnyPath) -> list[Row]:
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()  # empty, or a row that was being written when the process died
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if row["kind"] not in KINDS or not isinstance(row["step"], int):
                raise ValueError("not a row of metrics")
            for part in ("metrics", "timing"):
                if any(isinstance(value, (list, dict)) for value in row[part].values()):
                    raise ValueError(f"{part} that are none")
            rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and not tail:
                break
            raise ReportError(
                f"{path}:{number}: damaged row ({error}); delete that line to read the rest"
            ) from error
    return rows


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [row for row in _rows(path) if row["step"] <= step]
    data = "".join(_json(row) + "\n" for row in kept).encode()
    if data != path.read_bytes():
        replace_file(path, data)


def replace_file(path: AnyPath, data: bytes) -> None:
    """Puts `data` at `path` by write, fsync and rename; an object of a store appears whole anyway."""
    if paths.is_remote(path):
        with _clear_errors(path):
            path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _clear_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _clear_errors(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(
            f"cannot write {path}: {error.strerror or error}; free space or make the folder writable, "
            "then start again"
        ) from error


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain("", value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(name: str, value: Any) -> Any:
    """`value` with JSON types only: tuples as lists, array scalars as numbers, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{name}.{k}" if name else str(k), v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{name}[{i}]", v) for i, v in enumerate(value)]
    value = _scalar(name, value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalar(name: str, value: Any) -> float | int | str | None:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ReportError(f"{name} must be a number, a string or None, got {type(value).__name__}")


# -- stopwatch ----------------------------------------------------------------------------------------


class Timer:
    """Adds up the seconds spent in named spans.

        timer = Timer()
        with timer("data"):
            batch = next(batches)
        with timer("step"):
            ...
        timer.take()  # {"data": 0.02, "step": 0.31}, and starts from zero

    Spans may nest; each counts its own whole time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """A timer with no time in it."""
        self._clock = clock
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` towards `name`, also when it raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - start

    def totals(self) -> dict[str, float]:
        """Seconds by span since the start or the last `take`."""
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """`totals`, and back to zero."""
        totals = self.totals()
        self._seconds.clear()
        return totals


# -- terminal -----------------------------------------------------------------------------------------


class Progress:
    """How far a long loop has come; made by `progress`."""

    def __init__(
        self, description: str, total: int | None, done: int, unit: str, clock: Callable[[], float]
    ) -> None:
        """A loop at `done` of `total` (None: unknown)."""
        self.description, self.total, self.done, self.unit = description, total, done, unit
        self._clock = clock
        self._fields: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None  # the rate leaves out the first step, which compiles
        self._show: Callable[[], None] = lambda: None
        self._say: Callable[[str], None] = lambda message: None

    def advance(self, amount: int = 1, **fields: Any) -> None:
        """Moves on by `amount`; `fields` (loss=..., **{"tok/s": ...}) are shown until changed."""
        self.update(self.done + amount, **fields)

    def update(self, done: int, **fields: Any) -> None:
        """Moves to `done`."""
        self.done = done
        self._fields |= fields
        self._first = self._first or (self._clock(), done)
        self._show()

    def say(self, message: str) -> None:
        """Prints a line that stays, above the bar where there is one."""
        self._say(message)

    def status(self) -> str:
        """For instance `1,200/20,000   6%   9.41 steps/s   ETA 0:33:17   loss 3.214`."""
        parts = [f"{self.done:,}"]
        if self.total is not None:
            share = self.done / self.total if self.total else 1
            parts = [f"{self.done:,}/{self.total:,}", f"{int(100 * share)}%"]
        if rate := self._rate():
            parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}")
            if self.total is not None and self.done < self.total:
                parts.append(f"ETA {clock_time((self.total - self.done) / rate)}")
        parts += [f"{name} {_short(value)}" for name, value in self._fields.items()]
        return "   ".join(parts)

    def _rate(self) -> float:
        if self._first is None:
            return 0.0
        seconds, steps = self._clock() - self._first[0], self.done - self._first[1]
        return steps / seconds if seconds > 0 else 0.0


@contextlib.contextmanager
def progress(
    total: int | None,
    description: str,
    *,
    start: int = 0,
    unit: str = "step",
    every: float = 10.0,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Progress of a loop on standard error: a live bar on a terminal, else a plain line per `every` seconds.

        with progress(20_000, "train", start=resumed_at) as p:
            for step in range(resumed_at, 20_000):
                p.advance(loss=loss)

    Standard output is left alone, for results.  Rate and ETA count from here, not from `start`.
    """
    console = console or Console(stderr=True)
    state = Progress(description, total, start, unit, clock)
    if console.is_terminal and not console.is_dumb_terminal and console.file.isatty():
        with _bar(state, console):
            yield state
    else:
        with _lines(state, console, every, clock):
            yield state


@contextlib.contextmanager
def _bar(state: Progress, console: Console) -> Iterator[None]:
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=28),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console, redirect_stdout=False) as bar:
        task = bar.add_task(state.description, total=state.total, completed=state.done, status=state.status())
        state._show = lambda: bar.update(task, completed=state.done, status=state.status())
        state._say = lambda message: console.print(message, markup=False, highlight=False)
        yield


@contextlib.contextmanager
def _lines(state: Progress, console: Console, every: float, clock: Callable[[], float]) -> Iterator[None]:
    shown_at, shown = clock(), state.done

    def line(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show() -> None:
        nonlocal shown_at, shown
        if clock() - shown_at >= every:
            line(f"{state.description}   {state.status()}")
            shown_at, shown = clock(), state.done

    state._show, state._say = show, line
    try:
        yield
    finally:
        if state.done != shown:  # the last word, also when the loop was broken off
            line(f"{state.description}   {state.status()}")


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console | None = None
) -> None:
    """Prints a table on standard output, columns of numbers to the right, at full width when piped."""
    console = console or Console()
    grid = rich.table.Table(title=Text(title), title_justify="left", box=rich.box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        values = [row[i] for row in rows if row[i] is not None]
        numeric = bool(values) and all(isinstance(v, (int, float)) for v in values)
        grid.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    if not console.is_terminal:
        wide = console.options.update(width=10_000)
        console.width = max(console.width, rich.measure.Measurement.get(console, wide, grid).maximum)
    console.print(grid)


class RefinementPass(TypedDict):
    """One decoder pass over one sentence of n slots, for `plots.plot_refinement` and `refinement_text`."""

    tokens: Sequence[str]  # [n] pieces after the pass
    confidence: Sequence[float]  # [n] probability of each when it was predicted
    masked_before: Sequence[bool]  # [n] True at the slots that this pass predicted


def refinement_text(
    history: Sequence[RefinementPass], source: str = "", output: str = "", width: int = 100
) -> str:
    """One sentence's refinement as plain text: per pass what went in (`·` masked) and what came out.

    Slots that a pass predicted stand in [brackets].  Sentences wider than `width` columns are broken
    into blocks, each with all its passes.

    Raises:
      ReportError: an empty history, passes of unequal length, or confidences outside [0, 1].
    """
    check_history(history)
    canvas: list[list[str]] = []
    before: Sequence[str] = history[0]["tokens"]
    for one in history:
        masked = one["masked_before"]
        canvas.append(["·" if m else _visible(t) for t, m in zip(before, masked, strict=True)])
        canvas.append(
            [f"[{_visible(t)}]" if m else _visible(t) for t, m in zip(one["tokens"], masked, strict=True)]
        )
        before = one["tokens"]
    labels = [f"{i // 2 + 1:>2} {'out' if i % 2 else 'in '}" for i in range(len(canvas))]
    widths = [max(map(cell_len, column)) + 1 for column in zip(*canvas, strict=True)]
    lines = [f"source  {source}", ""] if source else []
    for block in blocks(widths, width - 8):
        for i, (label, cells) in enumerate(zip(labels, canvas, strict=True)):
            row = "".join(cells[j] + " " * (widths[j] - cell_len(cells[j])) for j in block)
            lines += [f"{label}  {row}".rstrip(), *([""] if i % 2 else [])]
    if output:
        lines.append(f"output  {output}")
    return "\n".join(lines).rstrip() + "\n"


def clock_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def _short(value: Any) -> str:
    """A number in few characters, for a status line."""
    value = _scalar("field", value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 10_000
            else f"{value:,.2f}"
            if abs(value) >= 1
            else f"{value:.4g}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def _visible(piece: str) -> str:
    """A piece without characters that would move the cursor."""
    return "".join(c if c.isprintable() else "□" for c in piece) or "∅"


def blocks(widths: Sequence[float], limit: float) -> list[range]:
    """Slots 0..n-1 cut into the fewest runs no wider than `limit` (one slot at least), evenly filled."""

    def cut(limit: float) -> list[range]:
        starts, room = [0], limit
        for i, width in enumerate(widths):
            if width > room and i > starts[-1]:
                starts.append(i)
                room = limit
            room -= width
        return [range(a, b) for a, b in itertools.pairwise([*starts, len(widths)])]

    fewest = len(cut(limit))
    even = next(limit * k / 20 for k in range(1, 21) if len(cut(limit * k / 20)) <= fewest)
    return cut(even)


def check_history(history: Sequence[RefinementPass]) -> None:
    """Raises ReportError where `history` is empty, ragged, or has confidences outside [0, 1]."""
    if not history or not history[0]["tokens"]:
        raise ReportError("a refinement needs at least one pass over at least one slot")
    slots = len(history[0]["tokens"])
    for i, one in enumerate(history, 1):
        counts = [len(one["tokens"]), len(one["confidence"]), len(one["masked_before"])]
        if counts != [slots] * 3:
            raise ReportError(
                f"pass {i}: tokens, confidence and masked_before have lengths {counts}, expected {slots}"
            )
        if not all(0 <= c <= 1.001 for c in one["confidence"]):
            raise ReportError(f"pass {i}: confidences are probabilities in [0, 1]; exponentiate log p first")
