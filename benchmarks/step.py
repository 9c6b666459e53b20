"""One update of JANUS, plain and fast, and of AR alone: `python -m benchmarks.step [--config=FILE]`.

Every system is a whole update (loss, gradient, optimiser) on the same batch and from the same parameters, all
in one process, one update of each in every round:

  separate   AR in one pass and NAR with AUX in another, each with its own encoder pass; all logits at once
  one pass   all streams behind one encoder pass; all logits at once
  chunked    and the loss in chunks of slots (`loss.chunk`)
  gathered   and only what the loss reads (`loss.gather`): M in a static capacity, the last layer pruned
  AR         the objective `ar` alone, as fast as it goes

The first four have the same loss and the same gradients, but for the draws of dropout
(tests/test_step_benchmark.py).  Seconds are medians over rounds, ratios medians of the ratios of a round.
`of peak` is utilisation: the FLOPs that the method needs (`janus_jax.cost`) over those that the chip could
have made meanwhile, where its bfloat16 peak is known.  FLOPs are counted twice: by XLA in the compiled
program, where the body of a loop counts once (the chunked loss is one), and by `janus_jax.cost`.  `--profile`
traces an update of ours and tells how much of it is the encoder, the decoder's attention, the loss and so on.

Room: beside the package.  [disk, clock]; may import anything of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import common, parts, trace
from janus_jax import bench, chips, cli, cost, losses, mesh, optim, report, run, step
from janus_jax.config import Config
from janus_jax.models import Janus, Params

PROGRAM = "benchmarks.step"
DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "multi30k_deen.py"
SYSTEMS = ("separate", "one pass", "chunked", "gathered", "AR")
OURS = "gathered"


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and writes it where `--json` says; an exit code as of `janus-jax`."""
    parser = argparse.ArgumentParser(
        PROGRAM, description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: configs/multi30k_deen.py")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", help="a run, whose batches are used; else full rows"
    )
    parser.add_argument(
        "--length", type=int, metavar="T", help="one of batch.buckets (default: the middle one)"
    )
    parser.add_argument(
        "--rounds",
        type=common.at_least_one,
        default=15,
        metavar="N",
        help="updates of each system (default: 15)",
    )
    parser.add_argument(
        "--systems",
        type=_systems,
        default=SYSTEMS,
        metavar="NAME,...",
        help="default: all",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace our version there, and say where its time goes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    try:
        rest, overrides = cli.split_overrides(sys.argv[1:] if argv is None else argv)
    except cli.UsageError as error:
        parser.error(str(error))
    args = parser.parse_args(rest)

    def work() -> int:
        config = cli.resolve_config(
            args.config or (None if args.workdir else DEFAULT), args.workdir, overrides
        )
        opened = run.open_run(args.workdir) if args.workdir else None
        length = args.length or bench.middle_bucket(config, opened)
        if length not in config.batch.buckets:
            raise common.BenchmarkError(
                f"--length must be one of batch.buckets {config.batch.buckets}, got {length}"
            )
        if args.profile and OURS not in args.systems:
            raise common.BenchmarkError(f"--profile traces {OURS!r}: name it in --systems")
        result = measure(config, opened, length, args.rounds, args.systems, args.profile)
        if args.json:
            report.write_json(args.json, result)
        show(result)
        return 0

    return common.guarded(PROGRAM, work)


def measure(
    config: Config,
    opened: run.Run | None,
    length: int,
    rounds: int,
    names: list[str],
    profiled: Path | None = None,
) -> dict[str, Any]:
    """Everything the table needs, of one batch of `length`; `profiled`: where to put a trace."""
    config = changed(config, loss={"objective": "janus"}, mesh={"data": 1})
    batch = jax.tree.map(jax.numpy.asarray, next(bench.batches_of(config, opened, length, 1)))
    rows = batch["target"].shape[0]
    systems = {n: c for n, c in configurations(config).items() if n in names}
    state = jax.jit(functools.partial(step.init_state, config))()
    compiled: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, its in systems.items():
        start = time.perf_counter()
        function = functools.partial(update, its, separately=name == "separate")
        compiled[name] = jax.jit(function).lower(state, batch).compile()
        jax.block_until_ready(compiled[name](state, batch))  # the first call still sets things up
        analysis = compiled[name].cost_analysis() or {}
        memory = compiled[name].memory_analysis()
        found[name] = {
            "compile_s": time.perf_counter() - start,
            "temp_bytes": int(memory.temp_size_in_bytes) if memory else None,
            "flops_xla": float(analysis.get("flops", float("nan"))),
            "flops": flops(its, rows, length, separately=name == "separate"),
            "model_flops": cost.train_step(its, rows, length).model,
        }

    def timed(name: str) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled[name](state, batch))
        return time.perf_counter() - start

    chip = chips.find(mesh.device_kind())
    seconds = common.interleaved({name: functools.partial(timed, name) for name in systems}, rounds)
    for name, row in found.items():
        row["seconds"] = seconds[name]
        row["median_s"] = float(np.median(seconds[name]))
        for base in ("separate", "AR"):
            row[f"to_{base}"] = ratio(seconds[name], seconds[base]) if base in systems else None
        row["flops_to_AR"] = row["flops"] / found["AR"]["flops"] if "AR" in systems else None
        row["utilisation"] = chip and row["model_flops"] / row["median_s"] / chip.flops
    if profiled:
        taken = trace.take(lambda: compiled[OURS](state, batch), profiled)
        found[OURS]["profile"] = parts.seconds_by_part(trace.events(taken), compiled[OURS].as_text())
    return {
        "systems": found,
        "rows": rows,
        "length": length,
        "masked": float(batch["masked"].mean()),
        "real": float((batch["target"] != config.model.ids.pad).mean()),
        "rounds": rounds,
        "batches": f"of {opened.folder}" if opened else "full rows of random tokens",
        "config": config.to_dict(),
        "device": mesh.device_kind(),
        "versions": report.versions(),
    }


def configurations(config: Config) -> dict[str, Config]:
    """The configuration of each system; chunks are the default's where the given one has none."""
    chunk = config.loss.chunk or type(config.loss)().chunk
    plain = changed(config, loss={"chunk": 0, "gather": False})
    fast = changed(config, loss={"chunk": chunk, "gather": True})
    systems = (
        plain,
        plain,
        changed(config, loss={"chunk": chunk, "gather": False}),
        fast,
        changed(fast, loss={"objective": "ar"}),
    )
    return dict(zip(SYSTEMS, systems, strict=True))


def update(config: Config, state: step.TrainState, batch: step.Batch, *, separately: bool) -> Any:
    """Parameters and optimiser state after one update, and the loss; dropout as in training."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    weights = losses.weights(batch["target"], batch["masked"], config.loss, config.model.ids)
    objective = separate if separately else step.objective
    gradient = jax.value_and_grad(objective, has_aux=True)
    (loss, _), grads = gradient(state.params, batch, config, key, weights)
    optimizer = optim.optimizer(config.optim, config.train.steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, loss


def separate(
    params: Params, batch: step.Batch, config: Config, key: jax.Array | None, weights: step.Metrics
) -> tuple[jax.Array, step.Metrics]:
    """The objective of `step.objective` by two models' worth of passes: what is obvious to write.

    AR, then NAR and AUX, each from the source on, every slot computed, and all logits there at once.
    """
    model: Any = Janus(config.model)
    keys = (None, None) if key is None else jax.random.split(key)
    need = losses.streams_needed(config.loss)

    def apply(key: jax.Array | None, **asked: bool) -> Any:
        rngs = None if key is None else {"dropout": key}
        arrays = (batch["source"], batch["target"], batch["masked"])
        return model.apply({"params": params}, *arrays, rngs=rngs, turn=batch.get("turn"), **asked)

    left = apply(keys[0], ar=True, nar=False, aux=False)
    right = apply(keys[1], ar=False, nar=True, aux=need["aux"])
    outputs = dataclasses.replace(right, ar=left.ar if need["ar"] else None)
    found = losses.terms(outputs, batch["target"], batch["masked"], config.loss, config.model.ids)
    whole = {name: (value, weights[name.removeprefix("nll_")]) for name, (value, _) in found.items()}
    return losses.total(whole, config.loss), {name: value for name, (value, _) in found.items()}


def flops(config: Config, rows: int, length: int, *, separately: bool) -> float:
    """By `janus_jax.cost`; a second encoder pass is projected for the cross-attention once more, too."""
    total = cost.train_step(config, rows, length).executed
    if separately:
        again = cost.encoder(config.model, rows, length) + rows * cost.keys_values(config.model, length)
        total += 3 * again
    return total


def _systems(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"no system {sorted(unknown)[0]!r}; there are {', '.join(SYSTEMS)}")
    return names


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds."""
    return float(np.median(np.asarray(ours) / np.asarray(theirs)))


def show(result: dict[str, Any]) -> None:
    """The table on standard output."""
    columns = [
        "update",
        "ms",
        "to separate",
        "to AR",
        "FLOPs to AR",
        "GFLOPs",
        "XLA's",
        "of peak",
        "temporary MiB",
        "compile s",
    ]
    rows = [
        [
            name,
            f"{1000 * row['median_s']:.1f}",
            *("-" if row[k] is None else f"{row[k]:.2f}" for k in ("to_separate", "to_AR", "flops_to_AR")),
            f"{row['flops'] / 1e9:.2f}",
            f"{row['flops_xla'] / 1e9:.2f}",
            f"{row['utilisation']:.1%}" if row["utilisation"] else "-",
            "-" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 2**20:.1f}",
            f"{row['compile_s']:.1f}",
        ]
        for name, row in result["systems"].items()
    ]
    shape = f"{result['rows']} x {result['length']}, {result['batches']}"
    shares = f"{100 * result['real']:.0f} % tokens, {100 * result['masked']:.0f} % in M"
    title = f"one update, {shape} ({shares}); {result['device']}, {result['rounds']} rounds"
    report.table(title, columns, rows)
    if told := result["systems"].get(OURS, {}).get("profile"):
        whole = sum(told.values())
        report.table(
            f"where the time of one update of ours goes ({1000 * whole:.1f} ms of work)",
            ["part", "ms", "share"],
            [[name, f"{1000 * x:.2f}", f"{x / whole:.1%}"] for name, x in told.items()],
        )


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with {section: {key: value}} replaced."""
    parts = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **parts)


if __name__ == "__main__":
    sys.exit(main())
