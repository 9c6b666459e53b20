"""What a run tells the world: metric files, progress, tables, stopwatches and pictures.

  numbers     MetricsWriter, read_metrics, comparable, write_json, commit, versions, peak_memory
  terminal    progress, table, refinement_text
  stopwatch   Timer
  pictures    plot_training, plot_refinement, plot_quality_speed (matplotlib, imported when first used)

A metrics file `metrics.jsonl` has one row per line,

  {"step": 50, "kind": "train", "metrics": {"loss": 7.25, ...}, "timing": {"step_s": 0.11, ...}}

where `metrics` is a function of (config, data, seed) alone, bit for bit, and `timing` is whatever the
clock said.  Kinds: `train`, `dev`, and `event` for what happened to the process.

Room: [disk, clock].  Imports paths.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
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
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import rich.box
import rich.measure
import rich.progress
import rich.table
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from janus_jax import paths
from janus_jax.paths import AnyPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    _replace(paths.as_path(path), (_json(value, indent=2) + "\n").encode())


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
            rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
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
        _replace(path, data)


def _replace(path: AnyPath, data: bytes) -> None:
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
            "then start again: a run resumes by itself"
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
    """One decoder pass over one sentence of n slots, for `plot_refinement` and `refinement_text`."""

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
    _check_history(history)
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
    for block in _blocks(widths, width - 8):
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


def _blocks(widths: Sequence[float], limit: float) -> list[range]:
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


def _check_history(history: Sequence[RefinementPass]) -> None:
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


# -- pictures -----------------------------------------------------------------------------------------

# Okabe and Ito's colours, apart for every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GREY, FAINT, ALERT = "#222222", "#767676", "#E3E3E3", "#D55E00"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Panel:
    """One small picture of `plot_training`: names of metrics by the label of their line."""

    title: str
    lines: Mapping[str, str]
    log: bool = False


PANELS = (
    Panel("Loss, all terms", {"": "loss"}),
    Panel("AR, nll per token", {"": "nll_ar"}),
    Panel("NAR, nll per masked token", {"": "nll_nar"}),
    Panel("AUX, nll per masked token", {"": "nll_aux"}),
    Panel("Symmetric KL, NAR and AUX", {"": "kl_nar_aux"}),
    Panel("Symmetric KL, AR and AUX", {"": "kl_ar_aux"}),
    Panel("Symmetric KL, AR and NAR", {"": "kl_ar_nar"}),
    Panel("Symmetric KL, two dropouts", {"": "kl_rdrop"}),
    Panel("Length, cross-entropy", {"": "length"}),
    Panel("BLEU on dev", {"AR": "bleu_ar", "NAR": "bleu_nar"}),
    Panel("Gradient norm", {"": "grad_norm"}, log=True),
    Panel("Learning rate", {"": "lr"}),
)


def plot_training(rows: Sequence[Row] | Mapping[str, Sequence[Row]], path: Path) -> None:
    """Training curves as small multiples: one panel per term of the loss, dev BLEU, gradient, rate.

    `rows` come from `read_metrics`; a mapping {name: rows} lays several runs over each other, one colour
    each.  Thin and pale is training, strong with dots is dev.  Panels without a value in any run are
    left out (objectives `ar` and `cmlm` have fewer terms); see PANELS for the metrics looked for.

    Raises:
      ReportError: no row has any of these metrics, or the file cannot be written.
    """
    runs: Mapping[str, Sequence[Row]] = rows if isinstance(rows, Mapping) else {"": rows}
    curves = {
        (run, panel.title, label, kind): points
        for run, panel in itertools.product(runs, PANELS)
        for label, name in panel.lines.items()
        for kind in ("train", "dev")
        if (points := _curve(runs[run], kind, name))
    }
    panels = [p for p in PANELS if any(title == p.title for _, title, _, _ in curves)]
    if not panels:
        raise ReportError(f"nothing to draw in {path}: no train or dev row has a known metric")
    with _style():
        across = 4 if len(panels) in (4, 7, 8) or len(panels) > 9 else min(3, len(panels))
        down = math.ceil(len(panels) / across)
        figure = _figure(3.1 * across, 2.25 * down + 0.5, layout="constrained")
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(down, across, place)
            _draw_panel(axes, panel, {k: v for k, v in curves.items() if k[1] == panel.title}, list(runs))
            axes.set_xlim(0, max(1, *(max(steps) for steps, _ in curves.values())))
            if place > len(panels) - across:
                axes.set_xlabel("updates")
        _run_legend(figure, list(runs))
        _save(figure, path)


def _curve(rows: Sequence[Row], kind: str, name: str) -> tuple[list[int], list[float]] | None:
    """Steps and values of one metric; a null (NaN) leaves a gap."""
    chosen = [r for r in rows if r["kind"] == kind and name in r["metrics"]]
    values = [math.nan if (v := r["metrics"][name]) is None else float(v) for r in chosen]
    return None if all(map(math.isnan, values)) else ([r["step"] for r in chosen], values)


def _draw_panel(
    axes: Axes,
    panel: Panel,
    curves: Mapping[tuple[str, str, str, str], tuple[list[int], list[float]]],
    runs: Sequence[str],
) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    labelled = set()
    for (run, _, label, kind), (steps, values) in curves.items():
        look: dict[str, Any] = {"color": COLOURS[runs.index(run) % len(COLOURS)]}
        look |= {"linestyle": "--" if label == "NAR" else "-"}
        if kind == "train":
            axes.plot(steps, values, linewidth=0.9, alpha=0.45, **look)
        else:
            axes.plot(steps, values, linewidth=1.5, marker="o", markersize=2.6, markeredgewidth=0, **look)
        if label and label not in labelled:
            labelled.add(label)
            last = max(i for i, v in enumerate(values) if math.isfinite(v))
            at = (steps[last], values[last])
            axes.annotate(f"  {label}", at, fontsize=8, va="center", annotation_clip=False)
    axes.set_title(panel.title)
    axes.grid(False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    numbers = [v for _, values in curves.values() for v in values if math.isfinite(v)]
    if panel.log and min(numbers) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(numbers) < 100 * min(numbers) else (1,))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(*_robust_limits(numbers))


def _robust_limits(numbers: Sequence[float]) -> tuple[float, float]:
    """Limits that show all but the top 2 % of the values where those would flatten the rest."""
    values = sorted(numbers)
    low, high = values[0], values[-1]
    usual = values[int(0.98 * (len(values) - 1))]
    if high - low > 2 * (usual - low) > 0:
        high = usual
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _run_legend(figure: Figure, runs: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=_drawable(run))
        for i, run in enumerate(runs)
        if run
    ]
    one = COLOURS[0] if len(runs) == 1 else GREY
    handles += [
        Line2D([], [], color=one, linewidth=0.9, alpha=0.6, label="train"),
        Line2D([], [], color=one, linewidth=1.5, marker="o", markersize=2.6, label="dev"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)


def plot_refinement(
    history: Sequence[RefinementPass], path: Path, title: str = "", source: str = "", output: str = ""
) -> None:
    """One sentence's refinement: a row per decoder pass, a column per slot, the piece in each cell.

    A cell that the pass predicted is filled, the darker the more confident; a cell kept from an earlier
    pass is white with a bar in the colour of its confidence; a cell about to be masked again has an
    orange dashed frame.  Wide sentences are broken into blocks.

    Raises:
      ReportError: an unusable history (see `refinement_text`), or a file that cannot be written.
    """
    _check_history(history)
    with _style():
        _RefinementPicture(history, title, source, output).draw(path)


class _RefinementPicture:
    """Lays the cells out in inches on one axes that covers the figure; y runs downwards."""

    WIDTH, MARGIN, GUTTER = 12.0, 0.3, 0.75  # inches
    CELL, GAP, PAD = 0.34, 0.06, 0.1  # height, space between cells, space inside
    NARROWEST, WIDEST, FONT = 0.46, 1.7, 10.0

    def __init__(self, history: Sequence[RefinementPass], title: str, source: str, output: str) -> None:
        self.history = history
        # The block that SentencePiece puts for a blank is heavy in print.
        self.tokens = [[_drawable(t.replace("▁", "_")) or "∅" for t in one["tokens"]] for one in history]
        inside = [max(_text_width(t, self.FONT) for t in column) for column in zip(*self.tokens, strict=True)]
        self.widths = [min(max(w + 2 * self.PAD, self.NARROWEST), self.WIDEST) + self.GAP for w in inside]
        self.blocks = _blocks(self.widths, self.WIDTH - 2 * self.MARGIN - self.GUTTER)
        grid = max(sum(self.widths[j] for j in block) for block in self.blocks)
        self.width = max(grid + 2 * self.MARGIN + self.GUTTER, 6.7)
        self.title = self._wrap(title, 13)
        self.source, self.output = self._wrap(source, 10), self._wrap(output, 10)
        self.height = (
            2 * self.MARGIN
            + 0.3 * len(self.title)
            + sum(0.22 * len(lines) + 0.12 for lines in (self.source, self.output) if lines)
            + len(self.blocks) * (0.4 + len(history) * (self.CELL + self.GAP))
            + 0.36
        )

    def draw(self, path: Path) -> None:
        figure = _figure(self.width, self.height)
        self.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        self.axes.axis("off")
        y = self.MARGIN
        for line in self.title:
            self._text(self.MARGIN, y + 0.12, line, size=13, weight="bold")
            y += 0.3
        y = self._labelled("source", self.source, y)
        for block in self.blocks:
            y = self._draw_block(block, y)
        y = self._labelled("output", self.output, y + 0.12)
        self._legend(self.height - self.MARGIN - 0.06)
        _save(figure, path)

    def _draw_block(self, block: range, y: float) -> float:
        x = self.MARGIN + self.GUTTER
        for j in block:
            self._text(
                x + (self.widths[j] - self.GAP) / 2, y + 0.22, str(j + 1), size=7, color=GREY, ha="center"
            )
            x += self.widths[j]
        y += 0.34
        for i in range(len(self.history)):
            self._text(self.MARGIN, y + self.CELL / 2, f"pass {i + 1}", size=9, color=GREY)
            x = self.MARGIN + self.GUTTER
            for j in block:
                self._draw_cell(x, y, i, j)
                x += self.widths[j]
            y += self.CELL + self.GAP
        return y + 0.06

    def _draw_cell(self, x: float, y: float, i: int, j: int) -> None:
        width = self.widths[j] - self.GAP
        predicted = self.history[i]["masked_before"][j]
        again = i + 1 < len(self.history) and self.history[i + 1]["masked_before"][j]
        fill = _confidence_colour(self.history[i]["confidence"][j])
        if predicted:
            self._box(x, y, width, self.CELL, facecolor=fill)
        else:
            self._box(x, y, width, self.CELL, facecolor="white", edgecolor=FAINT, linewidth=0.8)
            self._box(x + 0.05, y + self.CELL - 0.065, width - 0.1, 0.035, facecolor=fill, rounding=0.015)
        if again:
            inset = 0.012
            self._box(
                x + inset, y + inset, width - 2 * inset, self.CELL - 2 * inset,
                facecolor="none", edgecolor=ALERT, linewidth=1.5, linestyle=(0, (2.2, 1.4)),
            )  # fmt: skip
        text, size = _fit(self.tokens[i][j], self.FONT, width - self.PAD)
        colour = (INK if _luminance(fill) > 0.52 else "white") if predicted else GREY
        lift = 0 if predicted else 0.02
        self._text(x + width / 2, y + self.CELL / 2 - lift, text, size=size, color=colour, ha="center")

    def _labelled(self, label: str, lines: Sequence[str], y: float) -> float:
        for i, line in enumerate(lines):
            if i == 0:
                self._text(self.MARGIN, y + 0.1, label, size=9, color=GREY)
            self._text(self.MARGIN + self.GUTTER, y + 0.1, line, size=10)
            y += 0.22
        return y

    def _legend(self, y: float) -> None:
        x = self.MARGIN + self.GUTTER
        samples: tuple[tuple[str, dict[str, Any]], ...] = (
            ("kept", {"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.8}),
            (
                "masked again",
                {"facecolor": "none", "edgecolor": ALERT, "linewidth": 1.4, "linestyle": (0, (2.2, 1.4))},
            ),
        )
        self._text(x, y, "predicted, confidence", size=8, color=GREY)
        x += 1.42
        self._text(x, y, "0", size=8, color=GREY)
        for k in range(40):
            self._box(
                x + 0.12 + 0.03 * k, y - 0.06, 0.032, 0.12, facecolor=_confidence_colour(k / 39), rounding=0
            )
        self._text(x + 1.4, y, "1", size=8, color=GREY)
        x += 1.85
        for label, look in samples:
            self._box(x, y - 0.08, 0.26, 0.16, **look)
            if label == "kept":
                self._box(x + 0.03, y + 0.03, 0.2, 0.03, facecolor=_confidence_colour(0.9), rounding=0.01)
            self._text(x + 0.34, y, label, size=8, color=GREY)
            x += 0.34 + _text_width(label, 8) + 0.3

    def _wrap(self, text: str, size: float) -> list[str]:
        text = _drawable(text).strip()
        if not text:
            return []
        room = self.width - 2 * self.MARGIN - self.GUTTER
        letters = int(0.95 * len(text) * room / _text_width(text, size))
        return textwrap.wrap(text, max(letters, 20))

    def _text(self, x: float, y: float, text: str, size: float, color: str = INK, **kwargs: Any) -> None:
        self.axes.text(x, y, text, fontsize=size, color=color, va="center_baseline", **kwargs)

    def _box(
        self, x: float, y: float, width: float, height: float, rounding: float = 0.05, **look: Any
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={rounding}" if rounding else "square,pad=0"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, shape, **{"linewidth": 0, **look}))


class SpeedPoint(TypedDict, total=False):
    """One way to decode, for `plot_quality_speed`; give sentences_per_s or latency, alike in all points."""

    label: str  # for instance "T = 4"
    group: str  # for instance "NAR"; points of a group share a colour and are joined
    bleu: float
    sentences_per_s: float
    latency: float  # seconds per sentence


def plot_quality_speed(points: Sequence[SpeedPoint], path: Path, title: str = "") -> None:
    """BLEU over speed, logarithmic, one point per way to decode, labelled in place.

    Raises:
      ReportError: no points, points without one common measure of speed, or a speed of 0 or less.
    """
    measure = next(
        (m for m in ("sentences_per_s", "latency") if points and all(m in p for p in points)), None
    )
    if measure is None:
        raise ReportError("every point needs sentences_per_s, or every point needs latency")
    speeds = [float(p[measure]) for p in points]  # type: ignore[literal-required]
    if not min(speeds) > 0:
        raise ReportError(f"{measure} must be above 0 on a logarithmic axis, got {min(speeds)}")
    groups = list(dict.fromkeys(p["group"] for p in points))
    with _style():
        figure = _figure(7.0, 4.4)
        axes = figure.add_axes((0.09, 0.12, 0.88, 0.74 if title else 0.8))
        axes.set_xscale("log")
        for i, group in enumerate(groups):
            line = sorted((s, p["bleu"]) for s, p in zip(speeds, points, strict=True) if p["group"] == group)
            look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(*zip(*line, strict=True), **look, label=_drawable(group), linewidth=1.2, markersize=6.5)
        _speed_axes(axes, measure, title, speeds, [p["bleu"] for p in points])
        colours = [COLOURS[groups.index(p["group"]) % len(COLOURS)] for p in points]
        _label_points(axes, [(s, p["bleu"]) for s, p in zip(speeds, points, strict=True)],
                      [_drawable(p["label"]) for p in points], colours)  # fmt: skip
        _save(figure, path)


def _speed_axes(axes: Axes, measure: str, title: str, speeds: list[float], bleus: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlim(min(speeds) / 1.5, max(speeds) * 1.5)
    margin = 0.18 * (max(bleus) - min(bleus)) or 1.0
    axes.set_ylim(min(bleus) - margin, max(bleus) + margin)
    few = max(speeds) / min(speeds) < 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sentences per second" if measure == "sentences_per_s" else "seconds per sentence")
    axes.set_ylabel("BLEU")
    axes.set_title(_drawable(title), fontsize=12, fontweight="bold", pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=8, borderaxespad=0.2)


def _label_points(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Puts each label where it covers least of what is already there, as near as possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(axes.figure.figure)  # type: ignore[arg-type]
    canvas.draw()
    taken: list[Any] = []
    for line in axes.lines:
        pixels = axes.transData.transform(line.get_xydata())
        taken += [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in pixels]
        for (x0, y0), (x1, y1) in itertools.pairwise(pixels):  # the line between points, as small boxes
            steps = max(2, int(math.hypot(x1 - x0, y1 - y0) / 8))
            centres = [(x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(steps)]
            taken += [Bbox.from_extents(x - 2, y - 2, x + 2, y + 2) for x, y in centres]
    frame = axes.get_window_extent()
    for point, label, colour in zip(points, labels, colours, strict=True):
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", color=colour, fontsize=8.5)
        best: tuple[float, float, float, str, str, Any] | None = None
        for distance, dx, dy in itertools.product((7, 13, 20, 30), (0, 1, -1), (1, -1, 0)):
            if dx == dy == 0:
                continue
            ha, va = ("left", "center", "right")[1 - dx], ("bottom", "center", "top")[1 - dy]
            reach = distance if 0 in (dx, dy) else 0.75 * distance
            note.set(position=(dx * reach, dy * reach), ha=ha, va=va)
            box = note.get_window_extent(canvas.get_renderer())
            outside = box.width * box.height - _overlap(box, frame)
            cost = sum(_overlap(box, other) for other in taken) + 3 * outside + 0.5 * distance
            if best is None or cost < best[0]:
                best = (cost, dx * reach, dy * reach, ha, va, box)
        assert best is not None
        note.set(position=best[1:3], ha=best[3], va=best[4])
        taken.append(best[5])


def _overlap(a: Any, b: Any) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says; no pyplot, so no global state and no display."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def _figure(width: float, height: float, **kwargs: Any) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", **kwargs)


def _save(figure: Figure, path: Path) -> None:
    """Draws and writes the picture atomically; the suffix is the format (.png, .svg, .pdf)."""
    target = paths.as_path(path)
    kind = target.suffix[1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ReportError(
            f"{path}: cannot draw a {target.suffix or 'file without suffix'}; use .png, .svg or .pdf"
        )
    memory = io.BytesIO()
    figure.savefig(memory, format=kind)
    _replace(target, memory.getvalue())


def _drawable(text: str) -> str:
    """`text` in the characters that the font has in both weights; others become □ instead of a warning."""
    known = _glyphs()
    return "".join(c if ord(c) in known and c.isprintable() else " " if c.isspace() else "□" for c in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    faces = [get_font(findfont(FontProperties(family="DejaVu Sans", weight=w))) for w in ("normal", "bold")]
    return frozenset.intersection(*(frozenset(face.get_charmap()) for face in faces))


def _text_width(text: str, size: float) -> float:
    """Inches that `text` takes at `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width / 72


def _fit(text: str, size: float, width: float) -> tuple[str, float]:
    """`text` and a font size that fit into `width` inches: smaller down to 6.5 points, then cut."""
    fitted = max(6.5, min(size, size * width / max(_text_width(text, size), 1e-6)))
    while len(text) > 2 and _text_width(text, fitted) > width + 0.01:
        text = text[:-2] + "…"
    return text, fitted


def _confidence_colour(confidence: float) -> str:
    """From pale yellow (0) to deep blue (1); lightness falls evenly, so it reads in grey as well."""
    stops = ((255, 248, 214), (184, 222, 190), (90, 172, 195), (36, 104, 172), (16, 42, 110))
    place = min(max(confidence, 0.0), 1.0) * (len(stops) - 1)
    k = min(int(place), len(stops) - 2)
    mixed = (a + (b - a) * (place - k) for a, b in zip(stops[k], stops[k + 1], strict=True))
    return "#" + "".join(f"{round(c):02x}" for c in mixed)


def _luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue
