"""Where the time of a compiled update goes, by part of the model: a trace, read beside the program's names.

XLA names every instruction and says which line of the model it came from (`op_name`); the profiler says how
long each took.  Together: seconds of the encoder's attention, of the loss, of the optimiser, forward and
backward.  Threads and streams that work side by side are added up, so shares are of work, not of the clock.
Inside a CUDA graph a library's kernels bear no name of ours: XLA_FLAGS=--xla_gpu_enable_command_buffer= does
without graphs.

Room: beside the package.  Pure.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from benchmarks.trace import Event
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


def seconds_by_part(events: Iterable[Event], program: str) -> dict[str, float]:
    """Seconds of work of each part of a program in a profile, most first; {} where it names none of them."""
    known = origins(program)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        # Inside a CUDA graph the instruction is that of the graph, and a kernel bears its own fusion's name.
        name = next((name for name in (event.name, event.hlo_op) if name in known), None)
        if event.on_device and name:
            found[part(known[name])] += event.seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))
