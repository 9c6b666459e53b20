"""Quality against speed of a trained run: `python -m benchmarks.curve --workdir=RUN`.

  quality      BLEU and chrF of the whole split; share of sentences that equal those of AR greedy
  latency      one sentence at a time, in corpus order: median and 95th percentile over sentences and rounds
  throughput   a file of sentences by the scheduler (sorted, bucketed), at batch 16 and 128
  memory       peak of a process of its own for each system, at the largest batch
  compiling    apart: everything is decoded once before anything is timed

Timed is what a user waits for: tokenising, encoder, length prediction, every pass, re-scoring, the way to
the device and back, detokenising.  Rounds go over all systems, so that a drifting machine drifts for all;
speed-ups are medians over rounds of the ratio within a round.  Each side writes as much as it writes.

Writes curve.json, curve.md, curve-latency.png and curve-throughput.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from janus_jax import mesh, plots, report, run, score, ways
from janus_jax.data.sources import PairSource, open_split
from janus_jax.engine import Report
from janus_jax.paths import as_path
from janus_jax.prepare import bring_data
from janus_jax.translator import Translator
from janus_jax.ways import Way

BATCHES = (16, 128)  # of the throughput


@dataclass(frozen=True)
class System:
    """One way to decode, as a point `label` on the line `group` of the pictures."""

    group: str
    label: str
    way: Way

    @property
    def name(self) -> str:
        """Unique."""
        return f"{self.group}, {self.label}"


def _nar(group: str, candidates: int, *, rescore: bool = False) -> tuple[System, ...]:
    return tuple(System(group, f"T = {t}", ways.nar(t, candidates, rescore=rescore)) for t in (1, 2, 4, 10))


# One line for each way to decode; what the model was not trained for is left out.  Re-scoring a single
# candidate chooses nothing, so there is none.
GREEDY = System("AR", "greedy", ways.GREEDY)
BEAM = System("AR", "beam 5", ways.BEAM)
SYSTEMS: tuple[System, ...] = (
    GREEDY,
    BEAM,
    *_nar("NAR, 1 candidate", 1),
    *_nar("NAR, 3 candidates", 3),
    *_nar("NAR, 3 re-scored", 3, rescore=True),
    System("draft", "strict", ways.STRICT),
    System("draft", "strict, no branches", ways.UNBRANCHED),
    System("draft", "3 within 1.0", ways.TOLERANT),
)


def chosen_systems(wanted: Sequence[str]) -> tuple[System, ...]:
    """The systems of these names or groups, as `SYSTEMS` has them, beside greedy and beam 5; () means all.

    Raises:
      BenchmarkError: a name that is neither.
    """
    for name in wanted:
        if name not in (known := [word for s in SYSTEMS for word in (s.group, s.name)]):
            raise common.BenchmarkError(
                f"--system={name}: there is none of this name; there are {'; '.join(dict.fromkeys(known))}"
            )
    return tuple(s for s in SYSTEMS if not wanted or s in (GREEDY, BEAM) or {s.group, s.name} & set(wanted))


class Round(NamedTuple):
    """What one system took in one round, compiling left out."""

    latencies: list[float]  # seconds, of each sentence by itself
    streams: dict[int, float]  # batch size -> sentences a second


def curve(
    workdir: str,
    output: Path,
    *,
    split: str = "",
    checkpoint: str = "best",
    sentences: int = 200,
    stream: int = 512,
    rounds: int = 3,
    limit: int = 0,
    memory: bool = True,
    dtype: str = "",
    systems: Sequence[System] = SYSTEMS,
) -> dict[str, Any]:
    """Measures, writes and returns everything.

    Args:
      workdir: a run with checkpoints.
      output: folder of what is written.
      split: default `data.test_split`.
      checkpoint: best | latest | a step | average:N.
      sentences: how many, from the first, are timed one at a time.
      stream: how many, from the first, make the file of the throughput.
      rounds: how often.
      limit: score the first so many only; 0 means all.
      memory: start a process for each system to see its peak.
      dtype: of the computation; default that of the run.
      systems: what to measure.

    Raises:
      BenchmarkError: the split is empty, or no system is one of this model's.
      Whatever opening a run or a split raises.
    """
    opened, split, pairs = test_set(workdir, split)
    count = min(limit or len(pairs), len(pairs))
    common.folder(output)
    sources = [source for source, _ in itertools.islice(pairs, count)]
    references = [pairs.references(i) for i in range(count)]
    translator = load(workdir, checkpoint, dtype)
    chosen = decodable(systems, translator)
    facts = common.facts(translator.config.model.dtype)

    found: dict[str, dict[str, Any]] = {s.name: {"group": s.group, "label": s.label} for s in chosen}
    written: dict[str, list[str]] = {}
    bases = [s for s in (GREEDY, BEAM) if s in chosen]
    groups = [list(g) for _, g in itertools.groupby((s for s in chosen if s not in bases), lambda s: s.group)]
    timed: dict[str, list[Round]] = {s.name: [] for s in chosen}
    beside: dict[str, dict[str, list[Round]]] = {}  # system -> base -> its rounds in the same group
    turns = len(chosen) + rounds * sum(len(bases) + len(group) for group in groups or [[]])
    with report.progress(turns, "curve", unit="system") as progress:

        def told(name: str, what: str) -> None:
            progress.advance(system=name, now=what)

        for group in groups or [[]]:  # as many as an engine keeps programs of, each beside both bases
            translator = load(workdir, checkpoint, dtype)
            for system in (*bases, *group):
                text, seconds = _warm(translator, system, sources, sentences, stream, found[system.name])
                if system.name not in written:
                    written[system.name], found[system.name]["compile_s"] = text, seconds
                    told(system.name, "scored")
            here: dict[str, list[Round]] = common.interleaved(
                {
                    s.name: functools.partial(_round, translator, s, sources, sentences, stream)
                    for s in (*bases, *group)
                },
                rounds,
                advance=lambda name: told(name, "timed"),
            )
            for name, its in here.items():
                timed[name] += its
            beside |= {s.name: {base.name: here[base.name] for base in bases} for s in group}
    beside |= {s.name: {base.name: timed[base.name] for base in bases} for s in bases}
    for system in chosen:
        row = found[system.name]
        row["scores"] = score.score(written[system.name], references).to_dict()
        if GREEDY.name in written:
            same = [a == b for a, b in zip(written[system.name], written[GREEDY.name], strict=True)]
            row["equal_to_greedy"] = sum(same) / len(same)
        row |= _speed(timed[system.name])
        for base in bases:
            row[f"times_{base.label}"] = _speed_ups(beside[system.name][base.name], timed[system.name])
        row["memory"] = None
    result = {
        **facts,
        "workdir": str(workdir),
        "checkpoint": translator.name,
        "split": split,
        "data": pairs.identity,
        "sentences": {"scored": count, "latency": min(sentences, count), "throughput": min(stream, count)},
        "rounds": rounds,
        "buckets": opened.config.batch.buckets,
        "peak_host_bytes": common.peak_host_bytes(),
        "systems": found,
    }
    _publish(result, output)
    if memory:  # after the rest is written, which took half an hour and is not to be lost with this
        with report.progress(len(chosen), "curve: memory", unit="system") as progress:
            for system in chosen:
                found[system.name]["memory"] = _alone(
                    _peak, str(workdir), checkpoint, dtype, system, sources[:stream]
                )
                progress.advance(system=system.name)
        _publish(result, output)
    return result


def test_set(workdir: str, split: str) -> tuple[run.Run, str, PairSource]:
    """A run, the split asked for or else `data.test_split`, and its pairs.

    Raises:
      BenchmarkError: there are none.
      Whatever opening a run or a split raises.
    """
    opened = run.open_run(workdir)
    bring_data(opened.config, opened.folder)
    split = split or opened.config.data.test_split
    pairs = open_split(opened.config.data, opened.data_folder, split)
    if not len(pairs):
        raise common.BenchmarkError(f"split {split!r} in {opened.data_folder} has no examples")
    return opened, split, pairs


def decodable(systems: Sequence[System], translator: Translator) -> list[System]:
    """Those of the systems that the model was trained for; says which groups are left out.

    Raises:
      BenchmarkError: none is.
    """
    found = [s for s in systems if s.way.sides <= set(translator.modes)]
    if not found:
        raise common.BenchmarkError(
            f"{translator.name}: decodes {', '.join(translator.modes)} only: nothing to measure"
        )
    for name in dict.fromkeys(s.group for s in systems if s not in found):
        print(f"left out: {name}, which this model was not trained for", file=sys.stderr)
    return found


def load(workdir: str, checkpoint: str, dtype: str = "") -> Translator:
    """The model of a run, computing in `dtype`, or as the run does."""
    translator = Translator.from_run(workdir, checkpoint)
    if dtype in ("", translator.config.model.dtype):
        return translator
    config = translator.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    params, name = run.open_run(workdir).params(checkpoint)
    return Translator(params, config, translator.vocabulary, name=name)


def _warm(
    translator: Translator,
    system: System,
    sources: list[str],
    sentences: int,
    stream: int,
    row: dict[str, Any],
) -> tuple[list[str], float]:
    """Decodes all, and everything that will be timed, once -> (the texts, seconds spent compiling)."""
    decode = functools.partial(decode_with, translator, system)
    texts, took = decode(sources, BATCHES[-1])
    row["tokens_per_sentence"] = took.tokens / len(sources)
    row["passes_per_sentence"] = took.passes / len(sources) or None
    row["tokens_per_pass"] = took.tokens / took.passes if took.passes else None
    seconds = took.compile_seconds
    for size in BATCHES:
        seconds += decode(sources[:stream], size)[1].compile_seconds
    for line in sources[:sentences]:
        seconds += decode([line], 1)[1].compile_seconds
    return texts, seconds


def _round(translator: Translator, system: System, sources: list[str], sentences: int, stream: int) -> Round:
    latencies = [decode_with(translator, system, [line], 1)[1].seconds for line in sources[:sentences]]
    lines = sources[:stream]
    rates = {size: len(lines) / decode_with(translator, system, lines, size)[1].seconds for size in BATCHES}
    return Round(latencies, rates)


def decode_with(
    translator: Translator, system: System, lines: list[str], size: int
) -> tuple[list[str], Report]:
    """The texts of `lines`, `size` sentences at a time, and what it took."""
    # Beams and candidates count towards decode.tokens: enough for `size` sentences of any length.
    config = translator.config
    width = max(config.decode.beam, config.decode.candidates, *_widths(system))
    options = {**system.way.options, "tokens": size * config.batch.buckets[-1] * width}
    found, took = translator.decode(lines, system.way.decode, batch_size=size, **options)
    return [best.text for best, *_ in found], took


def _widths(system: System) -> list[int]:
    return [1, *(system.way.options[name] for name in ("beam", "candidates") if name in system.way.options)]


def _speed(rounds: list[Round]) -> dict[str, Any]:
    latencies = list(itertools.chain.from_iterable(r.latencies for r in rounds))
    rates = {size: sorted(r.streams[size] for r in rounds)[len(rounds) // 2] for size in BATCHES}
    return {
        "latency": common.percentiles(latencies),
        "sentences_per_s": {str(size): rate for size, rate in rates.items()},
    }


def _speed_ups(base: list[Round], own: list[Round]) -> dict[str, Any]:
    """How many times faster than `base`, at batch 1 and at each larger one."""
    ones = common.speed_up([sum(r.latencies) for r in base], [sum(r.latencies) for r in own])
    streams = {
        size: common.speed_up([1 / r.streams[size] for r in base], [1 / r.streams[size] for r in own])
        for size in BATCHES
    }
    return {"1": ones._asdict(), **{str(size): ratio._asdict() for size, ratio in streams.items()}}


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _peak(workdir: str, checkpoint: str, dtype: str, system: System, lines: list[str]) -> dict[str, Any]:
    """Peak memory of this process, which decodes nothing else, and what it had before decoding."""
    translator = load(workdir, checkpoint, dtype)
    before = common.peak_host_bytes()
    decode_with(translator, system, lines, BATCHES[-1])
    device = mesh.device_memory_stats().get("peak_bytes_in_use")
    return {"host_bytes": common.peak_host_bytes(), "host_bytes_before": before, "device_bytes": device}


def _publish(result: dict[str, Any], output: Path) -> None:
    systems: dict[str, dict[str, Any]] = result["systems"]
    rows = [_row(name, row) for name, row in systems.items()]
    columns = [
        "", "BLEU", "chrF", "= greedy, %", "p50 ms", "p95 ms", "sent/s @16", "sent/s @128",
        "x greedy @1", "x beam @1", "x greedy @128", "x beam @128", "tokens/pass", "peak MiB", "compile s",
    ]  # fmt: skip
    counts = result["sentences"]
    title = (
        f"{result['split']}: quality of {counts['scored']:,} sentences, latency of {counts['latency']:,} one "
        f"at a time, throughput of {counts['throughput']:,}; {result['rounds']} rounds; {result['device']}, "
        f"{result['precision']}, {result['threads']} threads, load before {result['load_before']:.1f}"
    )
    common.publish(output, "curve", title, result, columns, rows)
    first = next(iter(systems.values()))["scores"]
    print(f"BLEU: {first['bleu_signature']}\nchrF: {first['chrf_signature']}")
    points: list[dict[str, Any]] = [
        {"label": row["label"], "group": row["group"], "bleu": row["scores"]["bleu"]}
        for row in systems.values()
    ]
    for file, key, values, heading in (
        (
            "curve-latency.png",
            "latency",
            [r["latency"]["p50_ms"] / 1000 for r in systems.values()],
            "batch 1",
        ),
        (
            "curve-throughput.png",
            "sentences_per_s",
            [r["sentences_per_s"][str(BATCHES[-1])] for r in systems.values()],
            f"batch {BATCHES[-1]}",
        ),
    ):
        drawn: Any = [{**point, key: value} for point, value in zip(points, values, strict=True)]
        plots.plot_quality_speed(drawn, output / file, f"{result['split']}, {heading}, {result['device']}")
        print(f"written: {output / file}")


def _row(name: str, row: dict[str, Any]) -> list[Any]:
    times = [row.get(f"times_{base.label}") for base in (GREEDY, BEAM)]
    memory = row["memory"] or {}
    peak = memory.get("device_bytes") or memory.get("host_bytes")
    equal = row.get("equal_to_greedy")
    return [
        name,
        row["scores"]["bleu"],
        row["scores"]["chrf"],
        None if equal is None else 100 * equal,
        row["latency"]["p50_ms"],
        row["latency"]["p95_ms"],
        *(row["sentences_per_s"][str(size)] for size in BATCHES),
        *(t and t[size]["median"] for size in ("1", str(BATCHES[-1])) for t in times),
        row["tokens_per_pass"],
        peak and peak / 2**20,
        row["compile_s"],
    ]


def add_arguments(parser: argparse.ArgumentParser, *, sentences: int) -> None:
    """The options of whatever decodes a trained run one sentence at a time; `sentences` by default."""
    parser.add_argument("--workdir", required=True, help="a run with checkpoints")
    parser.add_argument("--output_dir", type=Path, help="default WORKDIR/benchmarks")
    parser.add_argument("--split", default="", help="default data.test_split")
    parser.add_argument("--checkpoint", default="best", help="best | latest | a step | average:N")
    parser.add_argument(
        "--sentences", type=common.at_least_one, default=sentences, help="timed one at a time"
    )
    parser.add_argument("--rounds", type=common.at_least_one, default=3, help="how often each is timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="default the run's")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME",
        help="this one or this group alone, beside AR, such as draft or 'draft, strict'; may be repeated",
    )


def folder_of(args: argparse.Namespace) -> Path:
    """Where what is measured is to be written."""
    return args.output_dir or Path(str(as_path(args.workdir))) / "benchmarks"


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_arguments` say of the measurement.

    Raises:
      BenchmarkError: as `chosen_systems`.
    """
    kept = ("split", "checkpoint", "sentences", "rounds", "dtype")
    return {"systems": chosen_systems(args.system), **{key: getattr(args, key) for key in kept}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.curve", description=__doc__.split("\n", 1)[0])
    add_arguments(parser, sentences=200)
    parser.add_argument("--stream", type=common.at_least_one, default=512, help="sentences of the throughput")
    parser.add_argument("--limit", type=common.at_least_one, default=0, help="score the first so many only")
    parser.add_argument("--no_memory", action="store_true", help="start no process for each peak")
    args = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the children of --memory room

    def work() -> int:
        curve(
            args.workdir,
            folder_of(args),
            stream=args.stream,
            limit=args.limit,
            memory=not args.no_memory,
            **chosen(args),
        )
        return 0

    return common.guarded(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
