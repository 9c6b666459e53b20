"""Where the milliseconds of one sentence go: `python -m benchmarks.sentence --workdir=RUN`.

For each way to decode, one sentence at a time: what a user waits for, on the clock; then, in a profile, what
the host did (the spans of `janus_jax.engine`: tokenising, starting programs, waiting for them, reading
back), how long the devices were at work, and in how many pieces.  Where the waits are short and the devices
idle, the host is what a user waits for; where starting takes long and the pieces are many, it is launching
them.  On a CPU, starting a small program is running it.

A profile slows down what it looks at, so the clock is read without one too.  Writes sentence.json,
sentence.md and, below OUT/traces, the profiles, which Perfetto and TensorBoard open.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks import common, curve, trace
from janus_jax import report
from janus_jax.engine import Span
from janus_jax.translator import Translator

SPANS: tuple[str, ...] = get_args(Span)


def sentence(
    workdir: str,
    output: Path,
    *,
    split: str = "",
    checkpoint: str = "best",
    sentences: int = 60,
    rounds: int = 3,
    dtype: str = "",
    systems: Sequence[curve.System] = curve.SYSTEMS,
) -> dict[str, Any]:
    """Measures, writes and returns everything.

    Args:
      workdir: a run with checkpoints.
      output: folder of what is written.
      split: default `data.test_split`.
      checkpoint: best | latest | a step | average:N.
      sentences: how many, from the first.
      rounds: how often each is timed.
      dtype: of the computation; default that of the run.
      systems: what to measure; what the model was not trained for is left out.

    Raises:
      BenchmarkError: the split is empty, or no system is one of this model's.
      Whatever opening a run or a split raises.
    """
    _, split, pairs = curve.test_set(workdir, split)
    lines = [source for source, _ in itertools.islice(pairs, sentences)]
    common.folder(output)
    translator = curve.load(workdir, checkpoint, dtype)
    chosen = curve.decodable(systems, translator)
    facts, found = common.facts(translator.config.model.dtype), {}
    with report.progress(len(chosen), "sentence", unit="system") as progress:
        for system in chosen:  # one after the other: an engine keeps the programs of few
            found[system.name] = _measured(translator, system, lines, rounds, output / "traces")
            progress.advance(system=system.name)
    result = {
        **facts,
        "workdir": str(workdir),
        "checkpoint": translator.name,
        "split": split,
        "sentences": len(lines),
        "rounds": rounds,
        "systems": found,
    }
    _publish(result, output)
    return result


def _measured(
    translator: Translator, system: curve.System, lines: list[str], rounds: int, folder: Path
) -> dict[str, Any]:
    """All of one system, in seconds; what the profile tells is the mean of a sentence."""

    def decode() -> list[float]:
        seconds = []
        for line in lines:
            start = time.perf_counter()
            curve.decode_with(translator, system, [line], 1)
            seconds.append(time.perf_counter() - start)
        return seconds

    decode()  # compiles
    clock = list(itertools.chain.from_iterable(decode() for _ in range(rounds)))
    seconds: list[float] = []
    name = system.name.replace(", ", "-").replace(" ", "")
    events = trace.events(trace.take(lambda: seconds.extend(decode()), folder / name))
    on_device = [e for e in events if e.on_device]
    spans = {s: sum(e.seconds for e in events if e.name == s and not e.on_device) / len(lines) for s in SPANS}
    whole = sum(seconds) / len(lines)
    return {
        "latency": common.percentiles(clock),
        "mean_s": sum(clock) / len(clock),
        "profiled_mean_s": whole,
        "spans_s": spans,
        "rest_s": whole - sum(spans.values()),
        "device_s": trace.busy(on_device) / len(lines),
        "device_events": len(on_device) / len(lines),
    }


def _publish(result: dict[str, Any], output: Path) -> None:
    rows = [
        [
            name,
            row["latency"]["p50_ms"],
            row["latency"]["p95_ms"],
            *(1000 * s for s in (row["mean_s"], row["profiled_mean_s"], *row["spans_s"].values())),
            *(1000 * row[key] for key in ("rest_s", "device_s")),
            row["device_events"],
        ]
        for name, row in result["systems"].items()
    ]
    columns = ["ms a sentence", "p50", "p95", "mean", "profiled", *SPANS, "the rest", "devices at work"]
    title = (
        f"{result['split']}: {result['sentences']} sentences one at a time; {result['device']}, "
        f"{result['precision']}, {result['threads']} threads, load before {result['load_before']:.1f}"
    )
    common.publish(output, "sentence", title, result, [*columns, "in pieces"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.sentence", description=__doc__.split("\n", 1)[0])
    curve.add_arguments(parser, sentences=60)
    args = parser.parse_args(argv)

    def work() -> int:
        sentence(args.workdir, curve.folder_of(args), **curve.chosen(args))
        return 0

    return common.guarded(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
