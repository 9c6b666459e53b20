"""Profiles as lists of events: one is taken, and what the host and the devices did is read out of it.

Room: beside the package.  [disk, devices].
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# How the names of threads begin that do a program's work where there is no device beside the host.
CPU_WORKERS = "tf_XLA"


@dataclass(frozen=True)
class Event:
    """Something that took time."""

    name: str
    start: float  # seconds
    seconds: float
    on_device: bool  # work of a program: of a device, or of XLA's threads on a CPU
    hlo_op: str = ""  # the instruction that it belongs to, where the profiler says so


def take(run: Callable[[], Any], folder: Path) -> Path:
    """Profiles one call of `run`, without a word on each Python function; the file, below `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        jax.block_until_ready(run())
    return max(folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)


def events(path: Path) -> list[Event]:
    """All that took time in a profile."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        listed = json.load(lines)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in listed if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in listed if e.get("name") == "thread_name"}
    devices = {pid for pid, name in processes.items() if name.startswith("/device:")}

    def works(event: dict[str, Any]) -> bool:
        if devices:
            return event["pid"] in devices
        thread = threads.get((event["pid"], event.get("tid")), "")
        return "hlo_op" in event.get("args", {}) or thread.startswith(CPU_WORKERS)

    return [
        Event(
            name=e["name"],
            start=e["ts"] / 1e6,
            seconds=e.get("dur", 0) / 1e6,
            on_device=works(e),
            hlo_op=e.get("args", {}).get("hlo_op", ""),
        )
        for e in listed
        if e.get("ph") == "X"
    ]


def busy(found: Iterable[Event]) -> float:
    """Seconds in which at least one of the events went on."""
    total, until = 0.0, float("-inf")
    for event in sorted(found, key=lambda e: e.start):
        end = event.start + event.seconds
        total += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return total
