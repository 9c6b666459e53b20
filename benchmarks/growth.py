"""How time and memory of decoding grow: `python -m benchmarks.growth [--config=...]`.

One axis at a time around a base point: target length, batch, vocabulary, NAR passes.  Random weights; every
sentence writes exactly the length asked for.  Time: median of calls, taken in rounds over all systems of a
point.  Memory: what XLA plans to hold beside parameters and inputs while the program runs
(`memory_analysis().temp_size_in_bytes`), so no noise.  Exponent k of cost ~ size ** k: least squares on
logarithms over the upper half of each axis.

Writes growth.json, growth.md and growth.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import common, forced
from janus_jax import cli, report
from janus_jax.config import ModelConfig
from janus_jax.models import apart, init_params

SOURCE = 32  # symbols of each source, on every axis


@dataclass(frozen=True)
class Point:
    """What one measurement is made at."""

    length: int = 64  # symbols written
    batch: int = 8
    vocabulary: int = 4000
    passes: int = 4  # NAR's


AXES: dict[str, tuple[int, ...]] = {
    "length": (16, 32, 64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "vocabulary": (1000, 2000, 4000, 8000, 16000, 32000),
    "passes": (1, 2, 4, 8, 16),
}
# Which program, and whether the number of passes matters to it.
SYSTEMS: tuple[tuple[str, Callable[..., jax.Array], Callable[[Point], dict[str, int]], bool], ...] = (
    ("AR greedy", forced.autoregressive, lambda at: {"width": 1}, False),
    ("AR beam 5", forced.autoregressive, lambda at: {"width": 5}, False),
    ("NAR", forced.non_autoregressive, lambda at: {"iterations": at.passes}, True),
)


def growth(
    output: Path,
    model: ModelConfig,
    *,
    base: Point = Point(),
    axes: dict[str, tuple[int, ...]] = AXES,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measures, writes and returns everything.

    Args:
      output: folder of what is written.
      model: its vocabulary and its lengths are those of each point.
      base: where the other axes stand.
      axes: sizes by axis, rising.
      rounds: calls timed at each point.
    """
    facts = common.facts(model.dtype)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {axis: {} for axis in axes}
    with report.progress(sum(map(len, axes.values())), "growth", unit="point") as progress:
        for axis, sizes in axes.items():
            for size in sizes:
                at = dataclasses.replace(base, **{axis: size})
                for name, row in measure(at, model, rounds, passes_only=axis == "passes").items():
                    found[axis].setdefault(name, []).append({"size": size, **row})
                progress.advance(axis=axis, size=size)
    exponents = {
        axis: {
            name: {
                key: common.exponent([r["size"] for r in rows], [r[key] for r in rows])
                for key in ("seconds", "temp_bytes")
            }
            for name, rows in systems.items()
        }
        for axis, systems in found.items()
    }
    result = {
        **facts,
        "model": dataclasses.asdict(model),
        "base": dataclasses.asdict(base),
        "source": SOURCE,
        "rounds": rounds,
        "points": found,
        "exponents": exponents,
    }
    _publish(result, output)
    return result


def measure(at: Point, model: ModelConfig, rounds: int, *, passes_only: bool) -> dict[str, dict[str, Any]]:
    """Seconds, temporary bytes and compile seconds of each system at one point.

    Args:
      at: the point.
      model: as `growth`.
      rounds: calls timed.
      passes_only: leave out what makes no passes.
    """
    reach = max(at.length, SOURCE) + 2
    model = dataclasses.replace(model, vocab_size=at.vocabulary, max_positions=reach, max_length=reach)
    drawn = jax.jit(functools.partial(init_params, config=model))(jax.random.key(0))
    params = jax.device_put(apart(jax.tree.map(np.asarray, drawn), model))
    source = sources(at, model)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], float]] = {}
    for name, program, options, has_passes in SYSTEMS:
        if passes_only and not has_passes:
            continue
        start = time.perf_counter()
        static = {"model": model, "length": at.length, **options(at)}
        compiled = program.lower(params, source, **static).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        rows[name] = {
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "compile_s": seconds,
        }
        calls[name] = functools.partial(_call, compiled, params, source)
        calls[name]()  # the first call still sets things up
    for name, taken in common.interleaved(calls, rounds).items():
        rows[name] = {"seconds": float(np.median(taken)), **rows[name]}
    return rows


def _call(compiled: Any, params: Any, source: np.ndarray) -> float:
    start = time.perf_counter()
    np.asarray(compiled(params, source))
    return time.perf_counter() - start


def sources(at: Point, model: ModelConfig) -> np.ndarray:
    """[batch, SOURCE] int32 full rows of random ordinary symbols between BOS and EOS."""
    least = max(dataclasses.astuple(model.ids)) + 1
    tokens = np.random.default_rng(0).integers(least, model.vocab_size, (at.batch, SOURCE), np.int32)
    tokens[:, 0], tokens[:, -1] = model.ids.bos, model.ids.eos
    return tokens


def _publish(result: dict[str, Any], output: Path) -> None:
    rows: list[list[Any]] = []
    panels = {"seconds": [], "temp_bytes": []}  # type: dict[str, list[common.Panel]]
    for axis, systems in result["points"].items():
        for name, points in systems.items():
            first, last = points[0], points[-1]
            powers = result["exponents"][axis][name]
            rows.append([
                axis, name, f"{first['size']} to {last['size']}",
                1000 * first["seconds"], 1000 * last["seconds"], powers["seconds"],
                first["temp_bytes"] / 2**20, last["temp_bytes"] / 2**20, powers["temp_bytes"],
            ])  # fmt: skip
        for key, unit, factor in (("seconds", "ms", 1000.0), ("temp_bytes", "MiB", 1 / 2**20)):
            lines = {
                name: [(float(p["size"]), factor * p[key]) for p in points]
                for name, points in systems.items()
            }
            title = "time" if key == "seconds" else "temporary memory"
            panels[key].append(common.Panel(f"{title} by {axis}", axis, unit, lines))
    columns = [
        "axis", "", "sizes", "ms, first", "ms, last", "time exponent", "MiB, first", "MiB, last",
        "memory exponent",
    ]  # fmt: skip
    model, base = result["model"], result["base"]
    title = (
        f"d {model['dim']}, ffn {model['ffn']}, {model['encoder_layers']}+{model['decoder_layers']} layers; "
        f"base: {', '.join(f'{k} {v}' for k, v in base.items())}; {SOURCE} symbols in; "
        f"{result['rounds']} rounds; {result['device']}, {result['precision']}, {result['threads']} threads, "
        f"load before {result['load_before']:.1f}"
    )
    common.publish(output, "growth", title, result, columns, rows)
    common.plot_panels([*panels["seconds"], *panels["temp_bytes"]], output / "growth.png", columns=len(AXES))
    print(f"written: {output / 'growth.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.growth", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--config", type=Path, help="whose model to measure; default d 256, 4+4 layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default that of the config")
    parser.add_argument("--rounds", type=common.at_least_one, default=5)
    for axis, sizes in AXES.items():
        told = ",".join(map(str, sizes))
        parser.add_argument(f"--{axis}", type=common.numbers, default=sizes, help=f"default {told}")
    args = parser.parse_args(argv)

    def work() -> int:
        model = cli.load_config_file(args.config).model if args.config else ModelConfig()
        model = dataclasses.replace(model, dtype=args.dtype or model.dtype)
        axes = {axis: getattr(args, axis) for axis in AXES}
        for axis, sizes in axes.items():
            if len(sizes) < 2 or any(a >= b for a, b in itertools.pairwise(sizes)):
                raise common.BenchmarkError(f"--{axis}: give at least two sizes, rising, got {sizes}")
        if axes["vocabulary"][0] <= (most := max(dataclasses.astuple(model.ids)) + 1):
            raise common.BenchmarkError(
                f"--vocabulary: sizes must be above {most}, for symbols beside the special ones"
            )
        growth(common.folder(args.output_dir), model, axes=axes, rounds=args.rounds)
        return 0

    return common.guarded(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
