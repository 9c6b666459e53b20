"""What the benchmarks share: interleaved timing, honest summaries, tables, a fit, pictures, error messages.

Room: beside the package.  [disk, clock]; may import anything of ours.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from janus_jax import cli, mesh, paths, plots, report

T = TypeVar("T")


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked; the message says why and what to do."""


# -- time ---------------------------------------------------------------------------------------------


def interleaved(
    systems: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    settle: float = 0.0,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, list[T]]:
    """What each system returns, one value a round.

    Every round calls every system once, each round from another one on, so that a machine that drifts
    (heat, neighbours) drifts for all of them.

    Args:
      systems: by name.
      rounds: how many.
      settle: seconds of quiet before each call: threads of the one before may still spin.
      advance: told the name of each system when it is done.
    """
    names = list(systems)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            if settle:
                time.sleep(settle)
            found[name].append(systems[name]())
            advance(name)
    return found


class Ratio(NamedTuple):
    """How many times faster: the median over rounds, and the range that the rounds span."""

    median: float
    low: float
    high: float


def speed_up(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """Seconds of `base` over seconds of `own`, round by round."""
    ratios = [b / o for b, o in zip(base, own, strict=True)]
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    return {f"p{p}_ms": 1000 * float(np.percentile(seconds, p)) for p in (50, 95)}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The power k of cost ~ size ** k: least squares on logarithms, over the upper half of the sizes.

    Below, what does not grow (a call, the encoder) hides what does.  At least two points; a cost of 0
    or less has no logarithm and gives NaN.
    """
    start = min(len(sizes) // 2, len(sizes) - 2)
    upper = list(zip(sizes, costs, strict=True))[max(start, 0) :]
    if len(upper) < 2 or min(c for _, c in upper) <= 0:
        return math.nan
    logs = np.log(np.asarray(upper, float))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


# -- the machine --------------------------------------------------------------------------------------


def use_threads(count: int) -> int:
    """Keeps this process, and those it starts, on `count` cores; must come before the first use of jax.

    Raises:
      BenchmarkError: there are not that many.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise BenchmarkError("--threads needs a system that can keep a process on chosen cores (Linux)")
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise BenchmarkError(f"--threads={count}: this process may use {len(cores)} cores only")
    os.sched_setaffinity(0, cores[:count])
    return count


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_host_bytes() -> int:
    """Largest resident set of this process so far.

    From /proc where there is one: what getrusage tells to a child begins at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return report.peak_memory().host


def facts(dtype: str) -> dict[str, Any]:
    """What a figure depends on and a reader must be told: device, precision, threads, load, versions."""
    return {
        "device": mesh.device_kind(),
        "precision": dtype,
        "threads": threads(),
        "load_before": os.getloadavg()[0],  # other work on this machine, were it idle: 0
        "versions": report.versions(),
        "command": sys.argv,
    }


# -- what is written ----------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers with the digits that mean something, None as a dash."""

    def cell(value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "-"
        if isinstance(value, float):
            return (
                f"{value:,.0f}"
                if abs(value) >= 1000
                else f"{value:.3g}"
                if abs(value) < 10
                else f"{value:.1f}"
            )
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(v) for v in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def folder(path: Path) -> Path:
    """`path`, made and found to take files before anything is measured.

    Raises:
      BenchmarkError: it cannot be written to.
    """
    try:
        paths.make_writable(path)
    except OSError as error:
        raise BenchmarkError(f"--output_dir={path} cannot be written to: {error.strerror}") from error
    return path


def publish(
    folder: Path,
    name: str,
    title: str,
    result: Mapping[str, Any],
    columns: Sequence[str],
    rows: list[list[Any]],
) -> None:
    """Writes `folder`/`name`.json and .md, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(f"{title}\n\n{markdown(columns, rows)}", encoding="utf-8")
    report.table(title, columns, rows)
    print(f"written: {folder / name}.json, {name}.md")


TICKS = [a * 10.0**b for b in range(-6, 10) for a in (1, 2, 5)]


class Panel(NamedTuple):
    """One picture of `plot_panels`: lines by name, each (x, y) in order."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def plot_panels(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Panels side by side, both axes logarithmic, one legend for all."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    with matplotlib.style.context(["default", plots.STYLE]):
        figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.4), facecolor="white", layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            for name, points in panel.lines.items():
                i = names.index(name)
                look: Any = {"color": plots.COLOURS[i % 7], "marker": plots.MARKERS[i % 7]}
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, markersize=4.5, **look)
            axes.set(xscale="log", yscale="log", title=panel.title, xlabel=panel.x, ylabel=panel.y)
            sizes = sorted({x for points in panel.lines.values() for x, _ in points})
            costs = [y for points in panel.lines.values() for _, y in points]
            axes.set_xticks(sizes)
            if max(costs) < 20 * min(costs):  # a decade or less would go without a label
                axes.set_yticks([t for t in TICKS if min(costs) / 1.6 <= t <= max(costs) * 1.6])
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
                axis.set_minor_formatter(NullFormatter())
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        handles = {h.get_label(): h for axes in grid.flat for h in axes.lines}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _short(value: float) -> str:
    """16000 -> 16k, so that ticks do not meet."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


# -- the command line ---------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 up between commas, for argparse."""
    return tuple(at_least_one(part) for part in text.split(","))


def guarded(name: str, run: Callable[[], int]) -> int:
    """The exit code of `run`; an expected error becomes one line on standard error and code 1."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"{name}: error: interrupted", file=sys.stderr)
        return cli.EXIT_INTERRUPTED
    except Exception as error:
        message = str(error) if isinstance(error, BenchmarkError) else cli.explain(error)
        if message is None:
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        return cli.EXIT_FAILED
