"""What a configuration needs on machines that are not here: `janus-jax compile --topology=v5e:16x16`.

Compiles the train step and the ways of decoding for a topology of TPUs or of GPUs, ahead of time, on any
machine with libtpu or jax's plugin for CUDA; and reports for each chip: memory and whether it fits, FLOPs,
what goes through the networks, the roofline, and of GPUs how many kernels a program is cut into.  Everything
but memory, the traffic and the kernels is a prediction of a model (`chips.roofline`), and is marked so.  With
`--topology=local` the programs are compiled for the devices here, run on random tokens, and measured beside
the prediction.

  train   one update at the bucket that computes most slots; rows are full
  ar, nar, draft
          one decoding batch on the chips of one host, which needs nothing of the others: every host decodes
          its own sentences.  AR runs as many steps as the source has tokens (locally: to the limit, for
          random weights do not stop), NAR all of decode.iterations, drafts a pass for two of AR's steps
          (locally as many as it has).

Room: shell.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from janus_jax import batch as batches
from janus_jax import chips, cost, hlo, losses, mesh, report, sharding
from janus_jax import config as configuration
from janus_jax.chips import Chip
from janus_jax.config import Config, ConfigError
from janus_jax.decode import reading
from janus_jax.generate import Generator
from janus_jax.mesh import MeshError
from janus_jax.models import apart, init_params
from janus_jax.step import init_state, train_step

PROGRAMS = ("train", "ar", "nar", "draft")
LOCAL = "local"
RUNS = 5  # measured runs of a program, after one that warms up
DOES_NOT_FIT = 1  # exit code
ROWS, WHOLE = PartitionSpec(sharding.ROWS), PartitionSpec()


class CompileError(ValueError):
    """A program that cannot be compiled or reported on; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """What to compile for."""

    topology: str
    slices: int
    devices: list[Any] | None  # None: those of the current backend
    chip: Chip
    memory: float | None  # bytes a program may take on a chip; None where nobody knows

    @property
    def local(self) -> bool:
        """Whether programs can be run here."""
        return self.devices is None


@dataclass(frozen=True)
class Program:
    """Something to compile."""

    name: str
    mesh: Mesh
    shape: dict[str, int]
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings
    jitted: Any
    state: dict[str, float]  # bytes on each device of what is in the arguments, by name
    flops: cost.Flops  # over all devices of the mesh
    loops: dict[str, float]  # expected trips of loops that depend on data, by part of their name
    tokens: float  # target tokens of one run
    start: Callable[[], tuple[Any, ...]]  # real arguments, for measuring


@dataclass(frozen=True)
class Compiled:
    """A program and what the compiler made of it; `executable` is None where it does not fit."""

    program: Program
    executable: Any
    seconds: float
    overflow: str = ""  # the compiler's words


def run(
    config: Config,
    topology: str,
    slices: int = 1,
    *,
    programs: Sequence[str] = PROGRAMS,
    memory: float | None = None,
    to: str | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> int:
    """Compiles, prints the report, and writes it as JSON.

    Args:
      config: what to compile.
      topology: of one slice, as `mesh.topology_devices` takes it, or "local".
      slices: how many.
      programs: which of PROGRAMS.
      memory: bytes that a program may take on a chip; default the chip's.
      to: a file for the JSON, or "-" for standard output in place of the tables; None for tables alone.
      say: told what is being compiled, which takes a while.

    Returns:
      0, or DOES_NOT_FIT.

    Raises:
      MeshError, ConfigError, CompileError: see there.
    """
    machine = find_machine(topology, slices, memory)
    found = make_report(config, machine, programs, say)
    if to == "-":
        print(json.dumps(found, indent=2))
    else:
        print_report(found)
        if to:
            report.write_json(Path(to), found)
            print(f"written: {to}")
    return 0 if found["fits"] else DOES_NOT_FIT


def find_machine(topology: str, slices: int, memory: float | None = None) -> Machine:
    """The machine of the command line.

    Raises:
      MeshError: no such topology, or no libtpu.
      CompileError: slices of what is here, or fewer than one.
    """
    if slices < 1 or (topology == LOCAL and slices > 1):
        raise CompileError(f"--slices={slices}: there must be at least one, and locally there is one")
    if topology == LOCAL:
        chip = chips.find(mesh.device_kind()) or _measured_chip()
        limit = mesh.device_memory_stats().get("bytes_limit", chip.hbm_bytes or None)
        return Machine(topology, 1, None, chip, memory or limit)
    devices = mesh.topology_devices(topology, slices)
    found = chips.find(devices[0].device_kind)
    if found is None:
        raise CompileError(f"there are no figures for {devices[0].device_kind!r} in janus_jax/chips.py")
    return Machine(topology, slices, devices, found, memory or found.hbm_bytes)


def make_report(
    config: Config, machine: Machine, programs: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Everything that there is to know, as plain data; the keys are those of the JSON."""
    m = mesh.make_mesh(config.mesh, machine.devices)
    found: dict[str, Any] = {}
    for name in programs:
        if name not in PROGRAMS:
            raise CompileError(f"there is no program {name!r}; there are {', '.join(PROGRAMS)}")
        sides = {"train": (), "draft": ("ar", "nar")}.get(name, (name,))
        if not all(losses.streams_needed(config.loss)[side] for side in sides):
            continue  # this objective does not train it
        program = build(name, config, machine)
        say(f"compiling {name} for {machine.slices} x {machine.topology} ...")
        found[name] = describe(build_and_compile(program), machine)
    fits = all(one["memory"]["fits"] for one in found.values())
    remedy = None
    if "train" in found and not found["train"]["memory"]["fits"]:
        remedy = nearest_that_fits(config, machine, say)
    return {
        "topology": machine.topology,
        "slices": machine.slices,
        "devices": m.size,
        "mesh": {k: int(v) for k, v in m.shape.items()},
        "chip": dataclasses.asdict(machine.chip),
        "programs": found,
        "fits": fits,
        "remedy": remedy,
        "model": {k: getattr(config.model, k) for k in _MODEL_KEYS},
        "versions": report.versions(),
        "note": NOTE,
    }


_MODEL_KEYS = (
    "dim",
    "ffn",
    "heads",
    "encoder_layers",
    "decoder_layers",
    "vocab_size",
    "dtype",
    "scan_layers",
    "remat",
    "remat_keep",
)
NOTE = (
    "memory, FLOPs, collectives and kernels are those of the compiled program; seconds, tokens/s and "
    "utilisation are predictions of a roofline from published chip figures (launches: from what one H200 "
    "took), not measurements"
)
PARTS = {  # of chips.Roofline, and what the table calls them
    "compute": "compute",
    "memory": "memory",
    "launches": "kernels and waits",
    "ici": "ICI",
    "dcn": "DCN",
}


# -- programs -----------------------------------------------------------------------------------


def build(name: str, config: Config, machine: Machine) -> Program:
    """The program `name` of this configuration on this machine."""
    return build_train(config, machine) if name == "train" else _build_decode(name, config, machine)


def build_train(config: Config, machine: Machine) -> Program:
    """One update, laid out as `train` does it."""
    m = mesh.make_mesh(config.mesh, machine.devices)
    shares = mesh.row_shares(m)
    config = _with(config, "train.microbatches", configuration.microbatches(config, shares))
    rows, length = batch_shape(config, shares)
    abstract = jax.eval_shape(functools.partial(init_state, config))
    laid = mesh.state_shardings(m, abstract)
    by_row = mesh.batch_sharding(m)
    batch = {
        k: jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)
        for k, (shape, dtype) in batches.spec(rows, length, config.batch.order).items()
    }
    parts = config.train.microbatches

    def start() -> tuple[Any, ...]:
        state = jax.jit(functools.partial(init_state, config), out_shardings=laid)()
        return state, mesh.global_batch(m, _random_batch(config, rows, length))

    return Program(
        "train",
        m,
        {"rows": rows, "length": length, "microbatches": parts},
        (mesh.with_shardings(abstract, laid), batch),
        jax.jit(
            functools.partial(train_step, config=config),
            donate_argnums=0,
            out_shardings=(laid, mesh.replicated(m)),
        ),
        {
            "parameters": _bytes(abstract.params, laid.params),
            "optimizer": _bytes(abstract.opt_state, laid.opt_state) + _bytes(abstract.ema, laid.ema),
        },
        cost.train_step(config, rows, length, shares * parts),
        cost.loop_counts(config, rows / shares / parts, length),
        config.batch.tokens // length * (length - 1),  # fillers hold none
        start,
    )


def _build_decode(name: str, config: Config, machine: Machine) -> Program:
    """One decoding batch on the devices of one host, each with its own sentences, as `engine` does it."""
    m = _one_host(config, machine)
    shares = mesh.row_shares(m)
    length = config.batch.buckets[-1]
    width = {"ar": config.decode.beam, "nar": config.decode.candidates, "draft": 1}[name]
    rows = max(1, config.decode.tokens // (length * width))
    rows = -(-rows // shares) * shares
    if "ar" not in losses.taught(config.loss):  # nothing to score by, and decoding leaves it out
        config = _with(config, "decode.rescore", False)
    generator = Generator(config.model, config.decode)

    def ar(params: Any, source: jax.Array) -> Any:
        return generator.autoregressive(params, source)

    def nar(params: Any, source: jax.Array) -> Any:
        memory, lengths = generator.remember(params, source)
        return generator.non_autoregressive(params, memory, jnp.minimum(lengths, length), length)[1]

    ways = {"ar": ar, "nar": nar, "draft": generator.draft}
    each = mesh.on_each_device(ways[name], m, (WHOLE, ROWS), ROWS)

    def weights() -> Any:  # as the engine lays them out
        return apart(init_params(jax.random.key(0), config.model), config.model)

    params = jax.eval_shape(weights)
    whole = jax.tree.map(lambda _: mesh.replicated(m), params)
    source = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=mesh.batch_sharding(m))
    limit = cost.decode_slots(config, length)
    steps = limit if machine.local else min(limit, length - 1)
    passes = {
        "ar": steps,
        "nar": config.decode.iterations,
        "draft": steps if machine.local else -(-steps // 2),
    }
    flops = {
        "ar": cost.ar_decode(config, rows, length, steps),
        "nar": cost.nar_decode(config, rows, length, length),
        "draft": cost.draft_decode(config, rows, length, passes["draft"]),
    }[name]

    # Where logits are read in turn: NAR's are those of ever fewer slots, drafts' of all that they draft.
    read = rows // shares * (config.decode.draft_block - 1 if name == "draft" else width * length)
    share = (passes["nar"] + 1) / 2 / passes["nar"] if name == "nar" else 1.0
    turns = share * read / reading.at_a_time(read) if read else 1.0

    def start() -> tuple[Any, ...]:
        source = mesh.global_batch(m, {"source": _random_batch(config, rows, length)["source"]})["source"]
        return jax.jit(weights, out_shardings=whole)(), source

    return Program(
        name,
        m,
        {"rows": rows, "length": length, "width": width, "passes": passes[name]},
        (mesh.with_shardings(params, whole), source),
        jax.jit(each),
        {"parameters": _bytes(params, whole), "optimizer": 0.0},
        flops,
        {reading.IN_TURN: turns, "": passes[name]},
        rows * (steps if name != "nar" else length - 1),
        start,
    )


def batch_shape(config: Config, shares: int) -> tuple[int, int]:
    """(rows, length) of the training batch with most slots; of equals the longest, which attends most.

    Raises:
      CompileError: it does not give every device a row of each micro-batch.
    """
    multiple = shares * config.train.microbatches
    shapes = []
    for length in config.batch.buckets:
        rows = config.batch.tokens // length
        if rows < multiple:
            raise CompileError(
                f"batch.tokens = {config.batch.tokens} does not hold {multiple} rows ({shares} devices x "
                f"{config.train.microbatches} micro-batches) of length {length}: raise it to "
                f"{multiple * length} or more, or cut less (mesh.tensor, fewer devices)"
            )
        shapes.append((-(-rows // multiple) * multiple, length))
    return max(shapes, key=lambda s: (s[0] * s[1], s[1]))


def build_and_compile(program: Program) -> Compiled:
    """Lowers and compiles; a program that exceeds the chip's memory is a result, not an error."""
    start = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            executable = program.jitted.lower(*program.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "memory space hbm" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return Compiled(program, None, time.perf_counter() - start, str(error))
    return Compiled(program, executable, time.perf_counter() - start)


def whole_arrays(compiled: Compiled, least: int = 1024) -> list[str]:
    """Paths of arrays of the updated state, of `least` entries or more, that every device holds whole.

    By the compiler's own output shardings: under fsdp there must be none.
    """
    state, _ = compiled.executable.output_shardings
    abstract = compiled.program.arguments[0]
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, array), laid in zip(leaves, jax.tree.leaves(state), strict=True)
        if array.size >= least and laid.shard_shape(array.shape) == array.shape
    ]


# -- the report ---------------------------------------------------------------------------------


def describe(compiled: Compiled, machine: Machine) -> dict[str, Any]:
    """One program's part of the report."""
    program, size = compiled.program, compiled.program.mesh.size
    memory = _memory(compiled, machine.memory)
    found: dict[str, Any] = {
        "shape": program.shape,
        "devices": size,
        "memory": memory,
        "flops": {"model": program.flops.model / size, "executed": program.flops.executed / size},
        "tokens": program.tokens,
        "compile_seconds": compiled.seconds,
    }
    if compiled.executable is None:
        return found
    module, counts = hlo.parse(compiled.executable.as_text()), hlo.Counts(program.loops)
    of_gpus = program.mesh.devices.flat[0].platform == "gpu"
    # What GPUs of different hosts exchange goes through the slower network.
    slice_of = [
        d.process_index if of_gpus else getattr(d, "slice_index", 0) or 0 for d in program.mesh.devices.flat
    ]
    moved = hlo.collectives(module, counts, devices=size, slice_of=slice_of)
    traffic = hlo.memory_bytes(module, counts)
    launches = _launches(program, module) if of_gpus else None
    roofline = chips.roofline(
        machine.chip,
        flops=program.flops.executed / size,
        hbm=traffic,
        traffic=[chips.Traffic(c.bytes, c.group, c.times, c.crosses) for c in moved],
        slice_chips=max(1, size // len(set(slice_of))),
        launches=(launches["kernels"], launches["waits"]) if launches else None,
    )
    found["hbm_traffic_bytes"] = traffic
    if launches:
        found["launches"] = launches
    found["collectives"] = _totals(moved)
    found["loops"] = {"expected": program.loops, "counted_once": sorted(counts.unknown)}
    found["roofline_seconds"] = {k: v for k, v in dataclasses.asdict(roofline).items() if v is not None}
    found["predicted"] = {"bound": roofline.bound, "seconds_if_overlapped": roofline.overlapped}
    found["predicted"] |= _rates(program, machine.chip, roofline.serial)
    if machine.local:
        found["measured"] = _rates(program, machine.chip, _measure(compiled)) | {"runs": RUNS}
    return found


def _launches(program: Program, module: hlo.Module) -> dict[str, float]:
    """Kernels and waits of a run, and how many of them each pass of decoding adds."""
    whole, more = (dataclasses.asdict(hlo.launches(module, hlo.Counts(program.loops), n)) for n in (0, 1))
    if program.name == "train":
        return whole
    return {**whole, **{f"{name}_of_a_pass": more[name] - value for name, value in whole.items()}}


def _rates(program: Program, chip: Chip, seconds: float) -> dict[str, float]:
    return {
        "seconds": seconds,
        "tokens_per_s": program.tokens / seconds,
        "utilisation": program.flops.model / program.mesh.size / seconds / chip.flops,
    }


def _memory(compiled: Compiled, limit: float | None) -> dict[str, Any]:
    """Bytes on each device, by what they are for."""
    state = compiled.program.state
    found: dict[str, Any] = {**state}
    if compiled.executable is None:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", compiled.overflow)
        total = float(used[1]) * 1024 ** ("KMGT".index(used[2]) + 1) if used else float("inf")
        found["temporaries"] = max(0.0, total - sum(state.values()))
    else:
        analysis = compiled.executable.memory_analysis()
        kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # not in place of arguments
        given = analysis.argument_size_in_bytes
        found["temporaries"] = float(analysis.temp_size_in_bytes + kept)
        if compiled.program.mesh.devices.flat[0].platform == "tpu":
            # There `temp` adds up what never lives at the same time; the peak, arguments included, does not.
            found["temporaries"] = max(0.0, analysis.peak_memory_in_bytes - given)
        # A program may leave parameters out that it does not need; they are there all the same.
        found["batch_and_padding"] = max(0.0, given - sum(state.values()))
        found["code"] = float(analysis.generated_code_size_in_bytes)
        total = sum(found.values())
    fits = compiled.executable is not None and (limit is None or total <= limit)
    return {**found, "total": total, "limit": limit, "fits": fits}


def _totals(moved: Sequence[hlo.Collective]) -> list[dict[str, Any]]:
    """Bytes that a chip sends in one run, and in how many exchanges, by kind and network."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for c in moved:
        total = sums[c.kind, "dcn" if c.crosses else "ici"]
        total[0] += c.bytes * c.times
        total[1] += c.times
    return [
        {"kind": kind, "network": network, "bytes": total, "count": count}
        for (kind, network), (total, count) in sorted(sums.items())
    ]


def _measure(compiled: Compiled) -> float:
    """Median seconds of one run on the devices here."""
    arguments = compiled.program.start()
    donated = compiled.program.name == "train"
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled.executable(*arguments))
        times.append(time.perf_counter() - start)
        if donated:
            arguments = (result[0], *arguments[1:])
    return statistics.median(times[1:])


def print_report(found: dict[str, Any]) -> None:
    """The report as tables, on standard output."""
    axes = " x ".join(f"{k} {v}" for k, v in found["mesh"].items())
    chip = found["chip"]
    print(f"{found['slices']} x {found['topology']}: {found['devices']} x {chip['name']}, mesh {axes}")
    programs = found["programs"]
    kinds = {(c["kind"], c["network"]) for p in programs.values() for c in p.get("collectives", ())}
    rows = [(label, [show(p) for p in programs.values()]) for label, show in _lines(sorted(kinds))]
    columns = ["per chip", *(_title(name, p) for name, p in programs.items())]
    report.table("", columns, [[label, *cells] for label, cells in rows if any(cells)])
    figures = "figures measured here" if chip["measured"] else "published chip figures"
    what = "communication overlaps with nothing"
    if any("launches" in p for p in programs.values()):
        what = (
            f"nothing overlaps; {1e6 * chips.KERNEL_SECONDS:.1f} us a kernel, {1e6 * chips.WAIT_SECONDS:.0f} "
            "us a wait, as fits what one H200 took; what the host does before and after a call is not in it"
        )
    print(f"(p) predicted, not measured: a roofline from {figures}; {what}")
    for name, p in programs.items():
        for loop in p.get("loops", {}).get("counted_once", ()):
            print(f"counted once, for its length depends on data: {name}: {loop}")
    if found["remedy"]:
        print(f"does not fit; the nearest setting that does: {found['remedy']['flags']}")
    elif not found["fits"]:
        print(
            "does not fit, nor with more micro-batches, remat or fsdp"
            if "train" in programs
            else "does not fit"
        )


def _title(name: str, p: dict[str, Any]) -> str:
    shape = p["shape"]
    if name == "train":
        parts = f" in {shape['microbatches']}" if shape["microbatches"] > 1 else ""
        return f"train {shape['rows']} x {shape['length']}{parts}"
    return f"{name} {shape['rows']} x {shape['width']} x {shape['length']}, {shape['passes']} passes"


def _lines(kinds: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Label and cell of every line of the table; a cell is empty where there is nothing to say."""

    def memory(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda p: _size(p["memory"][key]) if p["memory"].get(key) else ""

    def seconds(part: str, key: str) -> Callable[[dict[str, Any]], str]:
        return lambda p: f"{1000 * p[part][key]:,.2f} ms" if part in p and key in p[part] else ""

    def moved(kind: str, network: str) -> Callable[[dict[str, Any]], str]:
        def cell(p: dict[str, Any]) -> str:
            for c in p.get("collectives", ()):
                if (c["kind"], c["network"]) == (kind, network):
                    return f"{_size(c['bytes'])} in {c['count']:,.0f}"
            return ""

        return cell

    yield "parameters", memory("parameters")
    yield "optimiser state", memory("optimizer")
    yield "activations and temporaries", memory("temporaries")
    yield "batch, padding", memory("batch_and_padding")
    yield "program", memory("code")
    yield "total", memory("total")
    yield "of", memory("limit")
    yield "fits", lambda p: "yes" if p["memory"]["fits"] else "NO"
    yield "FLOPs", lambda p: f"{p['flops']['executed'] / 1e9:,.3f} G"
    yield "main memory traffic", lambda p: _size(p.get("hbm_traffic_bytes", 0))
    for key, label in (("kernels", "kernels"), ("waits", "waits of the host")):
        yield label, _count("launches", key)
        yield f"{label}, of a pass", _count("launches", f"{key}_of_a_pass")
    for kind, network in kinds:
        yield f"{kind}, {network.upper()}", moved(kind, network)
    for key, label in PARTS.items():
        yield f"{label} (p)", seconds("roofline_seconds", key)
    yield "bound by (p)", lambda p: p.get("predicted", {}).get("bound", "")
    yield "time if all overlapped (p)", seconds("predicted", "seconds_if_overlapped")
    for part, mark in (("predicted", " (p)"), ("measured", ", MEASURED")):
        yield f"time{mark}", seconds(part, "seconds")
        yield f"target tokens/s, of the chips that run it{mark}", _rate(part, "tokens_per_s", "{:,.0f}")
        yield f"utilisation of peak{mark}", _rate(part, "utilisation", "{:.1%}")
    yield "compile time", lambda p: f"{p['compile_seconds']:.1f} s"


def _count(part: str, key: str) -> Callable[[dict[str, Any]], str]:
    return lambda p: f"{p[part][key]:,.0f}" if key in p.get(part, {}) else ""


def _rate(part: str, key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda p: form.format(p[part][key]) if part in p else ""


def _size(n: float) -> str:
    """Bytes for a reader; nothing for none."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((f"{n / u:,.2f} {name}" for u, name in units if n >= u), f"{n:.0f} B" if n else "")


# -- what fits ----------------------------------------------------------------------------------


def nearest_that_fits(
    config: Config, machine: Machine, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any] | None:
    """The first of `candidates` whose train step was compiled and fits: its changes, flags and memory."""
    for changes in candidates(config, machine):
        flags = " ".join(f"--config.{k}={str(v).lower()}" for k, v in changes.items())
        try:
            changed = config
            for key, value in changes.items():
                changed = _with(changed, key, value)
            program = build_train(configuration.from_dict(changed.to_dict()), machine)
        except (ConfigError, MeshError, CompileError):
            continue  # does not divide
        if machine.memory is not None and sum(program.state.values()) > machine.memory:
            continue  # parameters and optimiser alone are too large
        say(f"does not fit; trying {flags} ...")
        memory = _memory(build_and_compile(program), machine.memory)
        if memory["fits"]:
            return {"changes": changes, "flags": flags, "memory": memory}
    return None


def candidates(config: Config, machine: Machine) -> Iterator[dict[str, Any]]:
    """Changes to try, the smallest first: micro-batches, then remat, then fsdp, then all of them."""
    m = mesh.make_mesh(config.mesh, machine.devices)
    shares = mesh.row_shares(m)
    now = configuration.microbatches(config, shares)
    most = min(config.batch.tokens // length // shares for length in config.batch.buckets)
    parts = [now * 2**i for i in range(1, 12) if now * 2**i <= most]
    for n in parts:
        yield {"train.microbatches": n}
    remat = {} if config.model.remat else {"model.remat": True}
    both = {**({"train.microbatches": parts[-1]} if parts else {}), **remat}
    if remat:
        yield remat
        if both != remat:
            yield both
    inside = m.size // machine.slices // config.mesh.tensor
    wider = [n for n in (config.mesh.fsdp * 2**i for i in range(1, 12)) if inside % n == 0]
    for more in ({}, both):
        for n in wider:
            yield {"mesh.fsdp": n, "mesh.data": -1, **more}


# -- small things -------------------------------------------------------------------------------


def _one_host(config: Config, machine: Machine) -> Mesh:
    """All chips of one host as replicas: where decoding happens.

    The compiler takes whole slices alone, so for a pod it is a slice of one host: four chips in a square.
    A host of GPUs is named as it is.
    """
    if machine.devices is None:
        return mesh.local_mesh(config.mesh)
    chip, _, shape = machine.topology.partition(":")
    square = {0: shape, 1: "2x2", 2: "2x2x1"}[shape.count("x")]
    host = mesh.topology_devices(f"{chip}:{square}")
    axes = (AxisType.Auto,) * len(sharding.AXES)
    return Mesh(np.array(host).reshape(-1, 1, 1), sharding.AXES, axis_types=axes)


def _bytes(abstract: Any, laid: Any) -> float:
    return float(sum(size for *_, size in mesh.sharding_table(abstract, laid)))


def _with(config: Config, key: str, value: Any) -> Config:
    """`config` with one dotted key replaced."""
    section, _, name = key.partition(".")
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


def _random_batch(config: Config, rows: int, length: int) -> batches.Batch:
    """Full rows of ordinary tokens between BOS and EOS, masked as training masks."""
    ids, rng = config.model.ids, np.random.default_rng(config.seed)
    lowest = max(dataclasses.astuple(ids)) + 1
    tokens = rng.integers(lowest, config.model.vocab_size, (rows, length), np.int32)
    tokens[:, 0], tokens[:, -1] = ids.bos, ids.eos
    rngs = [batches.example_rng(config.seed, 0, i) for i in range(rows)]
    return batches.corrupted(np.arange(rows, dtype=np.int32), tokens, tokens, rngs, config.batch, ids)


def _measured_chip() -> Chip:
    """Figures of a device that the table does not have (a CPU), by a matrix product and a copy, here and now.

    Virtual devices share one machine: each gets its part of what was measured.
    """
    n, kind = 1024, mesh.device_kind()
    a = jnp.ones((n, n), jnp.float32)
    b = jnp.ones(2**24, jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)

    def best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(function(x))
            times.append(time.perf_counter() - start)
        return min(times[1:])

    share = mesh.row_shares(mesh.local_mesh(configuration.MeshConfig())) if kind == "cpu" else 1
    flops, bandwidth = 2 * n**3 / best(product, a) / share, 2 * b.nbytes / best(copy, b) / share
    return Chip(kind, flops, 0, bandwidth, bandwidth, 1, bandwidth, measured=True)
