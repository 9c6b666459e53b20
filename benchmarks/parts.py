"""Where the time of a compiled update goes, by part of the model: a trace, read beside the program's names.

XLA names every instruction and says which line of the model it came from (`op_name`); the profiler says how
long each took.  Together: seconds of the encoder's attention, of the loss, of the optimiser, forward and
backward.  Threads and streams that work side by side are added up, so shares are of work, not of the clock.
Inside a CUDA graph a library's kernels bear no name of ours: XLA_FLAGS=--xla_gpu_enable_command_buffer= does
without graphs.

Room: beside the package.  [disk, devices].
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from janus_jax import hlo

# The first that is found in an instruction's op_name.
PARTS = {
    "loss over the vocabulary": r"loss_",
    "length loss": r"length_logits",
    "embeddings": r"_rows|input",
    "encoder, attention": r"encoder.*attention",
    "encoder, feed-forward": r"encoder.*ffn",
    "encoder, rest": r"encoder",
    "decoder, self-attention": r"decoder.*(_self_attention|attention)",
    "decoder, cross-attention": r"decoder.*cross",
    "decoder, feed-forward": r"decoder.*ffn",
    "decoder, rest": r"decoder",
}
OTHER = "optimiser and the rest"
HOLDERS = frozenset({"while", "conditional", "call", "tuple", "get-tuple-element", "parameter"})


def trace(run: Callable[[], Any], folder: Path) -> Path:
    """Profiles one call of `run`; returns the trace's file below `folder`."""
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        jax.block_until_ready(run())
    return max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)


def origins(program: str) -> dict[str, str]:
    """{instruction: op_name} of a compiled program's text, less instructions that only hold others."""
    lines = (i for computation in hlo.parse(program).computations.values() for i in computation)
    return {i.name: i.op_name for i in lines if i.opcode not in HOLDERS}


def part(op_name: str) -> str:
    """Part and direction: "decoder, cross-attention, backward"."""
    for name, pattern in PARTS.items():
        if re.search(pattern, op_name):
            return f"{name}, {'backward' if 'transpose(' in op_name else 'forward'}"
    return OTHER


def seconds_by_part(path: Path, program: str) -> dict[str, float]:
    """Seconds of work of each part of a program in a trace, most first; {} where it names none of them."""
    known = origins(program)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        events = json.load(lines)["traceEvents"]
    held = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in held.items() if name.startswith("/device:")}
    found: Counter[str] = Counter()
    for event in events:
        if devices and event.get("pid") not in devices:
            continue  # the host's own events, which bear the names of what it launches
        # Inside a CUDA graph the instruction is that of the graph, and a kernel bears its own fusion's name.
        names = (event.get("name", ""), event.get("args", {}).get("hlo_op", ""))
        name = next((name for name in names if name in known), None)
        if event.get("ph") == "X" and name:
            found[part(known[name])] += event["dur"] / 1e6
    return dict(found.most_common())
