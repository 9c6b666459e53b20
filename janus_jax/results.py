"""`janus-jax report`: tables and pictures from a run directory, or from all below a folder.

    <output>/table.md, table.csv      the same figures for people and for programs
    <output>/report.html              tables and pictures in one file
    <output>/*.png                    learning curves, ablations, BLEU by length, quality over speed

Run directories that lie in one folder make one table; `ende/ar` and `deen/ar` are in two.  What may stand
in a table is told by `tables`; a directory that cannot be read is listed with what is wrong, and hides no
other.

Room: shell.  Reads run directories and their prepared data, writes below `output`.
"""

from __future__ import annotations

import base64
import html
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from janus_jax import paths, plots, report, tables
from janus_jax.data.sources import open_split
from janus_jax.evaluate import FOLDER as EVAL
from janus_jax.paths import AnyPath
from janus_jax.run import Run, open_run
from janus_jax.tables import Evaluated, Judged, Speeds, Table, Trained, Versus

MARKS = ("config.json", report.METRICS_FILE, "checkpoints")  # any of them makes a folder a run directory
WRITTEN = ("table.md", "table.csv", "report.html")
FEWEST = 10  # sentences of a length bucket that is drawn; the table has all
DEPTH = 4  # folders between the one that is given and a run


class ResultsError(ValueError):
    """A folder that no table can be made of; the message names it and the remedy."""


@dataclass(frozen=True)
class Section:
    """One table's worth: the runs of one folder."""

    name: str  # path of the folder below the one given, "" for itself
    judged: Judged
    versus: list[Versus]
    speeds: Speeds
    tables: list[Table]
    pictures: dict[str, str]  # file name -> caption
    head: str


def write(
    folder: AnyPath,
    output: AnyPath | None = None,
    *,
    baseline: str = "",
    split: str = "",
    samples: int = tables.SAMPLES,
    any_commit: bool = False,
) -> list[Section]:
    """Reads a run, or all runs below a folder, and writes the report.

    Args:
      folder: a run directory, or where to look for some.
      output: where to write; default `folder`.
      baseline: the row that others are compared with; default "ar", where there is one.
      split: which evaluations; default the test split of the runs.
      samples: resamples of the paired bootstrap.
      any_commit: runs and evaluations of different commits may stand side by side.

    Raises:
      ResultsError: no such folder, no run in it that can be read, or no row called `baseline`.
      report.ReportError: `output` cannot be written.
    """
    if not folder.is_dir():
        raise ResultsError(f"{folder}: no such folder")
    if not paths.is_remote(folder):
        folder = folder.resolve()  # names a row and the page; "." has no name
    groups: dict[str, dict[str, AnyPath]] = {}
    for path in [folder] if _is_run(folder) else find_runs(folder):
        groups.setdefault("/".join(path.parts[len(folder.parts) : -1]), {})[path.name] = path
    if not groups:
        raise ResultsError(
            f"{folder} is no run directory, and there is none below it: they are folders with a config.json, "
            "such as janus-jax train or launch/tables/multi30k.sh make"
        )
    read = {name: {p.name: read_run(p) for p in found.values()} for name, found in groups.items()}
    found_runs = [run for found in read.values() for run in found.values()]
    if all(run.config is None for run in found_runs):
        raise ResultsError(f"no run can be read: {found_runs[0].name}: {found_runs[0].faults[0]}")
    rows = {run.row for run in found_runs}
    if baseline and baseline not in rows:
        raise ResultsError(f"--baseline={baseline}: no such row; there are {', '.join(sorted(rows))}")
    output = output or folder
    output.mkdir(parents=True, exist_ok=True)
    sections = []
    for name in sorted(read):
        judged = tables.judge(list(read[name].values()), baseline or "ar", split, any_commit)
        references = _References(groups[name])
        versus = tables.versus_baseline(judged, references, samples)
        sections.append(_section(name, judged, versus, list(read[name].values()), output, any_commit))
    lines = (row for s in sections for row in tables.csv_rows(s.name, s.judged, s.versus, s.speeds))
    report.replace_file(output / "table.csv", tables.to_csv(lines).encode())
    report.replace_file(output / "table.md", markdown(folder.name, sections).encode())
    report.replace_file(output / "report.html", page(folder.name, sections, output).encode())
    return sections


def report_on(folder: AnyPath, output: AnyPath | None = None, **options: Any) -> int:
    """`write`, and prints the main table, what is set apart, and where all of it lies."""
    for section in write(folder, output, **options):
        for table in section.tables:
            if table.title.startswith(("BLEU, ", "Set apart", "Not ")):
                heading = f"{section.name}: {table.title}" if section.name else table.title
                report.table(heading, table.columns, table.rows)
    for name in WRITTEN:
        print(f"written: {(output or folder) / name}")
    return 0


# -- reading ------------------------------------------------------------------------------------------


def find_runs(folder: AnyPath, depth: int = DEPTH) -> Iterator[AnyPath]:
    """The run directories below `folder`, by name; what lies inside of one is none."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if _is_run(path):
            yield path
        elif depth:
            yield from find_runs(path, depth - 1)


def _is_run(folder: AnyPath) -> bool:
    return any((folder / mark).exists() for mark in MARKS)


def read_run(folder: AnyPath) -> Trained:
    """All there is in a run directory; what cannot be read becomes a fault."""
    faults: list[str] = []

    def attempt(what: str, read: Any, otherwise: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError) as error:  # ours are ValueErrors
            faults.append(f"{what}: {str(error).replace(f'{folder}/', '')}")
            return otherwise

    config = attempt("config.json", lambda: open_run(folder).config, None)
    rows = attempt(report.METRICS_FILE, lambda: report.read_metrics(folder), [])
    versions = attempt("versions.json", lambda: _json(folder / "versions.json"), {})
    vocabulary = attempt("vocab.json", lambda: str(_json(folder / "vocab.json")["sha256"]), "")
    bench, bench_fault = _bench(folder / "bench.json")
    return Trained(
        name=folder.name,
        config=config,
        rows=rows,
        versions=versions,
        vocabulary=vocabulary,
        evaluations=tuple(_evaluations(folder / EVAL)),
        bench=bench,
        bench_fault=bench_fault,
        faults=tuple(faults),
    )


def _evaluations(folder: AnyPath) -> Iterator[Evaluated]:
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith(".json")) if folder.is_dir() else []
    for name in names:
        split, _, way = name.removesuffix(".json").partition(".")
        try:
            result = _json(folder / name)
            fault = tables.result_fault(result)
        except (OSError, ValueError) as error:
            result, fault = {}, f"cannot be read: {error}"
        written = folder / name.replace(".json", ".hyp")
        lines = None
        if written.is_file() and not fault:
            try:
                lines = tuple(written.read_text(encoding="utf-8").split("\n")[:-1])
            except (OSError, ValueError) as error:
                fault = f"{written.name} cannot be read: {error}"
        yield Evaluated(split, way, result, lines, fault)


def _bench(path: AnyPath) -> tuple[dict[str, Any] | None, str]:
    """What `bench` wrote, or why it cannot be used; the run is good without."""
    if not path.is_file():
        return None, ""
    try:
        found = _json(path)
        fault = tables.bench_fault(found)
    except (OSError, ValueError) as error:
        found, fault = {}, f"cannot be read: {error}"
    return (None, fault) if fault else (found, "")


def _json(path: AnyPath) -> Any:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("holds no object")
    return found


class _References:
    """The wordings that an evaluation was scored against, from the prepared data of its run."""

    def __init__(self, folders: dict[str, AnyPath]) -> None:
        self._folders = folders
        self._known: dict[str, list[tuple[str, ...]]] = {}

    def __call__(self, run: Trained, one: Evaluated) -> Sequence[Sequence[str]]:
        identity = one.result["data"]
        if identity not in self._known:
            assert run.config
            opened = Run(self._folders[run.name], run.config)
            pairs = open_split(run.config.data, opened.data_folder, one.split)
            if pairs.identity != identity:
                raise ResultsError(
                    f"{opened.data_folder} has other data now: {pairs.identity}, not {identity}"
                )
            self._known[identity] = [pairs.references(i) for i in range(len(pairs))]
        return self._known[identity][: one.result["scores"]["sentences"]]


# -- writing ------------------------------------------------------------------------------------------


def _section(
    name: str,
    judged: Judged,
    versus: list[Versus],
    every: Sequence[Trained],
    output: AnyPath,
    any_commit: bool,
) -> Section:
    measured = tables.speeds(judged, any_commit)
    found: list[Table | None] = [
        tables.quality(judged),
        tables.details(judged, versus),
        tables.speed(judged, measured),
        tables.cost(judged),
        tables.by_length(judged),
        tables.settings(judged),
    ]
    shown = [table for table in found if table and table.rows] + tables.apart(judged, measured, versus)
    pictures = _pictures(name, judged, measured, every, output)
    return Section(name, judged, versus, measured, shown, pictures, _head(judged, any_commit))


def _head(judged: Judged, any_commit: bool) -> str:
    """What all of the table shares."""
    if not judged.runs:
        return "No run can stand in the table: see what is set apart."
    config = judged.runs[0].config
    assert config
    trained = sorted({c for run in judged.runs for c in run.commits})
    decoded = sorted({one.commit for one in judged.evaluations.values()})
    data = config.data
    told = [
        f"{data.name} {data.source}-{data.target}, {judged.split}: {config.train.steps:,} updates of "
        f"{config.batch.tokens:,} slots a side, dropout {config.model.dropout:g}, vocabulary "
        f"{judged.runs[0].vocabulary[:12]}.",
        f"Trained by commit {', '.join(trained)}"
        + (f", decoded by {', '.join(decoded)}." if decoded else ", not evaluated."),
        f"Compared with {judged.baseline}." if judged.baseline in judged.rows else
        f"No row {judged.baseline} to compare with.",
    ]  # fmt: skip
    if any_commit and (
        len({*trained, *decoded}) > 1 or any(c.endswith(tables.DIRTY) for c in (*trained, *decoded))
    ):
        told.append("Commits were not told apart, as asked: the code may differ from row to row.")
    if tables.UNKNOWN in (*trained, *decoded):
        told.append("What no commit was recorded for may be of any.")
    return "  ".join(told)


def _pictures(
    name: str, judged: Judged, measured: Speeds, every: Sequence[Trained], output: AnyPath
) -> dict[str, str]:
    """Draws what there is data for; the file names and captions of what was drawn."""
    prefix = name.replace("-", "--").replace("/", "-") + "-" if name else ""  # no two sections share one
    drawn: dict[str, str] = {}

    def place(file: str, caption: str) -> AnyPath:
        drawn[f"{prefix}{file}.png"] = caption
        return output / f"{prefix}{file}.png"

    alike = {run.name for run in judged.runs}
    # Where train.dev_sentences was -1 nothing was decoded, and there is the likelihood to look at.
    for what, ar, axis in (("bleu", "AR (greedy)", "BLEU on dev"), ("nll", "AR", "nats a token on dev")):
        titles = {"ar": ar, "nar": "NAR"}
        curves: dict[str, list[plots.Series]] = {title: [] for title in titles.values()}
        for run in sorted(every, key=lambda r: ([*judged.rows, r.row].index(r.row), r.name)):
            row = run.row if run.name in alike else f"{run.name} (set apart)"
            for side, curve in tables.dev_curves(run, what).items():
                curves[titles[side]].append(plots.Series(row, curve, faint=run.name not in alike))
        if any(curves.values()):
            path = place("learning", f"{axis[:1].upper()}{axis[1:]} by updates")
            plots.plot_lines(curves, path, "updates", axis, order=list(judged.rows))
            break
    labels = {way.name: way.label for way in tables.WAYS}
    ablated = tables.ablations(judged)
    if ablated:
        bars = {
            row: {labels[way]: (one.mean, one.sd) for way, one in found.items()}
            for row, found in ablated.items()
        }
        path = place("ablations", f"What each change of {tables.ABLATED} moves")
        plots.plot_bars(bars, path, tables.ABLATED, f"BLEU against {tables.ABLATED}")
    _draw_lengths(judged, labels, place, ablated)
    for batch in tables.SPEED_BATCHES:
        points: list[plots.SpeedPoint] = []
        for row in judged.rows:
            for way in tables.WAYS:
                rate = measured.found.get((row, way.label, batch))
                bleu = tables.score_of(judged, row, way.name)
                if rate and bleu and (row not in ablated or row == tables.ABLATED):
                    side = {"ar": "AR", "nar": "NAR", "draft": "draft"}[way.how.decode]
                    label = way.label.removeprefix(f"{side} ")
                    point: plots.SpeedPoint = {"label": label, "group": f"{row} {side}", "bleu": bleu.mean}
                    points.append({**point, "sentences_per_s": rate})
        if points:
            path = place(f"speed-{batch}", f"Quality over speed at batch {batch}, {measured.device}")
            plots.plot_quality_speed(points, path, f"{judged.split}, batch {batch}, {measured.device}")
    return drawn


def _draw_lengths(judged: Judged, labels: dict[str, str], place: Any, ablated: Any) -> None:
    sized = [(name, count) for name, count in tables.buckets(judged) if count >= FEWEST]
    names = [name for name, _ in sized]
    panels: dict[str, list[plots.Series]] = {labels[way]: [] for way in tables.HEADLINES}
    for (row, way), curve in tables.length_curves(judged).items():
        if row not in ablated or row == tables.ABLATED:
            points = [(float(names.index(b)), one.mean) for b, one in curve.items() if b in names]
            panels[labels[way]].append(plots.Series(row, points))
    ticks = [f"{name}\n({count})" for name, count in sized]
    if not any(line.points for lines in panels.values() for line in lines):
        return
    path = place("length", "BLEU by length of the reference (sentences)")
    order = list(judged.rows)
    plots.plot_lines(panels, path, "tokens of the reference (sentences)", "BLEU", ticks, order)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole report as Markdown, pictures by name."""
    parts = [f"# {title}\n"]
    for section in sections:
        parts += [f"## {section.name}\n"] if section.name else []
        parts += [section.head + "\n", *(table.markdown() for table in section.tables)]
        parts += [f"![{caption}]({urllib.parse.quote(file)})\n" for file, caption in section.pictures.items()]
    return "\n".join(parts)


STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25em .6em; text-align: left }
th { border-bottom: 2px solid #767676; vertical-align: bottom } td { border-bottom: 1px solid #e3e3e3 }
.n { text-align: right; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
.note, figcaption { color: #666; font-size: 13px } figure { margin: 1.5em 0 } img { max-width: 100% }
"""


def page(title: str, sections: Sequence[Section], output: AnyPath) -> str:
    """The whole report as one HTML page that needs no other file."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts += [f"<h2>{html.escape(section.name)}</h2>"] if section.name else []
        parts.append(f"<p>{html.escape(section.head)}</p>")
        parts += [table.html() for table in section.tables]
        for file, caption in section.pictures.items():
            data = base64.b64encode((output / file).read_bytes()).decode("ascii")
            text = html.escape(caption)
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>\n{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
