"""Pictures of runs and tables: curves, one sentence's refinement, quality over speed, bars.

matplotlib is imported when first used.  One look for all, in colours that everybody can tell apart; no
pyplot, so no global state and no display.  The suffix of a file is its format (.png, .svg, .pdf).

Room: [disk].  Imports report and paths.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from janus_jax import paths
from janus_jax.report import Path, RefinementPass, ReportError, Row, blocks, check_history, replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """Steps and values of one metric; what is not finite (null, or what others wrote) leaves a gap."""
    chosen = [r for r in rows if r["kind"] == kind and name in r["metrics"]]
    numbers = [math.nan if (v := r["metrics"][name]) is None else float(v) for r in chosen]
    values = [v if math.isfinite(v) else math.nan for v in numbers]
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
        colour, marker = _look(runs.index(run))
        look: dict[str, Any] = {"color": colour}
        look |= {"linestyle": "--" if label == "NAR" else "-"}
        if kind == "train":
            alone: dict[str, Any] = (
                {"marker": ".", "markersize": 4} if sum(map(math.isfinite, values)) == 1 else {}
            )
            axes.plot(steps, values, linewidth=0.9, alpha=0.45, **look, **alone)
        else:
            axes.plot(steps, values, linewidth=1.5, marker=marker, markersize=2.6, markeredgewidth=0, **look)
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


def _look(i: int) -> tuple[str, str]:
    """Colour and marker of run `i`: once the colours have been used up, they come with another marker."""
    return COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]


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
        Line2D([], [], color=(look := _look(i))[0], marker=look[1], linewidth=3, label=_drawable(run))
        for i, run in enumerate(runs)
        if run
    ]
    one = COLOURS[0] if len(runs) == 1 else GREY
    handles += [
        Line2D([], [], color=one, linewidth=0.9, alpha=0.6, label="train"),
        Line2D([], [], color=one, linewidth=1.5, marker="o", markersize=2.6, label="dev"),
    ]
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.075 * widest)))  # inches of a name at this size
    figure.legend(handles=handles, loc="outside upper right", ncols=min(len(handles), columns), fontsize=9)


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
    check_history(history)
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
        self.blocks = blocks(self.widths, self.WIDTH - 2 * self.MARGIN - self.GUTTER)
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


# Colour and marker first, then the line: enough for as many rows as a table has.
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))


@dataclass(frozen=True)
class Series:
    """One line of `plot_lines`."""

    label: str  # lines of one label look alike in all panels
    points: Sequence[tuple[float, float]]
    faint: bool = False  # not to be compared with the others: pale, and named so by its label


def plot_lines(
    panels: Mapping[str, Sequence[Series]],
    path: Path,
    xlabel: str,
    ylabel: str,
    ticks: Sequence[str] = (),
    order: Sequence[str] = (),
) -> None:
    """Lines in panels side by side on one scale, with one legend.

    Args:
      panels: the lines, by the title of their panel; a panel without a line is left out.
      path: the file.
      xlabel: below each panel.
      ylabel: left of the first.
      ticks: what x = 0, 1, ... are called, where x is no number.
      order: labels in the order that colours are given in, so that several pictures agree; there may be
        others, and labels without a line take their colour and are not in the legend.

    Raises:
      ReportError: no line has a point, or the file cannot be written.
    """
    shown = {title: [s for s in lines if s.points] for title, lines in panels.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    if not shown:
        raise ReportError(f"nothing to draw in {path}: no line has a point")
    labels = list(dict.fromkeys([*order, *(s.label for lines in shown.values() for s in lines)]))
    handles: dict[str, Any] = {}
    with _style():
        figure = _figure(4.6 * len(shown) + 1.9, 4.0, layout="constrained")
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (title, lines) in zip(grid, shown.items(), strict=True):
            for one in lines:
                i = labels.index(one.label)
                look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "alpha": 0.45 if one.faint else 1}
                look |= {
                    "marker": MARKERS[i % len(MARKERS)],
                    "linestyle": LINES[i // len(COLOURS) % len(LINES)],
                }
                (drawn,) = axes.plot(*zip(*one.points, strict=True), linewidth=1.3, markersize=3.8, **look)
                handles.setdefault(one.label, drawn)
            axes.set(title=title, xlabel=xlabel)
            axes.grid(False, axis="x")
            if ticks:
                axes.set_xticks(range(len(ticks)), ticks)
            else:
                axes.set_xlim(left=0)
        grid[0].set_ylabel(ylabel)
        named = [label for label in labels if label in handles]
        figure.legend(
            [handles[label] for label in named],
            [_drawable(label) for label in named],
            loc="outside right upper",
        )
        _save(figure, path)


def plot_bars(
    groups: Mapping[str, Mapping[str, tuple[float, float | None]]], path: Path, reference: str, xlabel: str
) -> None:
    """How far each group lies from `reference`, a bar for each thing measured, the figure itself beside it.

    Args:
      groups: {group: {thing: (value, its standard deviation or None)}}; `reference` is one of them.
      path: the file.
      reference: the group that the others are drawn against.
      xlabel: what the length of a bar is.

    Raises:
      ReportError: there is no `reference`, nothing beside it, or the file cannot be written.
    """
    others = [name for name in groups if name != reference]
    if reference not in groups or not others:
        raise ReportError(f"nothing to draw in {path}: it takes {reference!r} and another row")
    base = groups[reference]
    things = list(base)
    with _style():
        figure = _figure(4.0 * len(things) + 1.6, 0.34 * len(others) + 1.2, layout="constrained")
        grid = figure.subplots(1, len(things), sharey=True, squeeze=False)[0]
        for i, (axes, thing) in enumerate(zip(grid, things, strict=True)):
            start = base[thing][0]
            found = {j: groups[n][thing] for j, n in enumerate(others) if thing in groups[n]}
            lengths = [value - start for value, _ in found.values()]
            reach = max(map(abs, lengths), default=0) or 1.0
            axes.barh(list(found), lengths, height=0.62, color=COLOURS[i % len(COLOURS)])
            axes.axvline(0, color=INK, linewidth=0.9)
            for j, (value, deviation) in found.items():
                length, spread = value - start, deviation or 0.0
                if deviation:
                    axes.errorbar(length, j, xerr=deviation, color=INK, linewidth=1, capsize=2.5)
                end = length + math.copysign(spread + 0.03 * reach, length)
                axes.text(end, j, f"{value:.2f} ({length:+.2f})", fontsize=7.5, color=GREY,
                          va="center_baseline", ha="left" if length >= 0 else "right")  # fmt: skip
            low, high = min(0.0, *lengths, 0.0), max(0.0, *lengths, 0.0)
            room = 0.42 * (high - low or 1.0)  # for the figures
            axes.set_xlim(
                low - (room if low < 0 else 0.06 * reach), high + (room if high > 0 else 0.06 * reach)
            )
            axes.set_title(f"{_drawable(thing)}: {_drawable(reference)} {start:.2f}")
            axes.set_xlabel(xlabel)
            axes.grid(False, axis="y")
            axes.set_yticks(range(len(others)), [_drawable(n) for n in others])
        grid[0].invert_yaxis()
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
    lines = _legend_above(axes)
    axes.set_title(_drawable(title), fontsize=12, fontweight="bold", pad=6 + 18 * lines)


def _legend_above(axes: Axes) -> int:
    """Names the lines above the axes, in as few lines as fit the figure's width; how many those are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure: Any = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    names = axes.get_legend_handles_labels()[1]
    box = axes.get_position()
    for columns in range(len(names), 0, -1):
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=columns, borderaxespad=0.2)
        if legend.get_window_extent(renderer).x1 <= figure.bbox.x1:
            break
    lines = -(-len(names) // columns)
    axes.set_position((box.x0, box.y0, box.width, box.height - 0.055 * (lines - 1)))
    return lines


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
    replace_file(target, memory.getvalue())


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
