"""Several processes that compute one thing: how they find each other, agree, and end together.

`join` is called once, before anything asks for devices; without it a run is one process and everything
here is a no-op.  Rules that keep the processes together:

  * all of them call the same functions of this module in the same order
  * what only one may do (preparing, writing reports) runs through `main_first` or behind `is_main`; an
    error there ends all of them
  * who leaves with an error leaves at once (`leave`), so that nobody waits for him politely
  * who loses another one (its connection closed, or it gave no sign of life for mesh.heartbeat_timeout
    seconds) says so and ends

Room: devices.  Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = Any  # a pytree
T = TypeVar("T")

STOPPED = 75  # exit code (EX_TEMPFAIL): stopped on request and saved; the same command goes on
LOST = 76  # another process was lost; the same command goes on from the newest checkpoint
TOGETHER = (0, STOPPED)  # codes that all processes end with, at the same time

# What the libraries that carry collectives say when the other end is gone.
_SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection closed", "heartbeat", "NCCL")

_joined: tuple[str, int] | None = (
    None  # (coordinator in words, heartbeat timeout), once `join` has been called
)


class ProcessesError(ValueError):
    """Processes that do not come together, or one that failed; the message says which and what to do."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    startup_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Makes this process one of several.

    Args:
      coordinator: HOST:PORT where process 0 listens; None, as the other two, asks the environment: a TPU
        pod, SLURM, Open MPI and Kubernetes are recognised.
      processes: how many there are.
      index: which one this is, from 0; 0 coordinates.
      startup_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
      ProcessesError: the arguments are incomplete or impossible, the environment tells of no other
        processes, the port is taken, or other processes were found than expected.
    """
    global _joined
    given = (coordinator, processes, index)
    if any(x is None for x in given) and any(x is not None for x in given):
        raise ProcessesError("--coordinator, --processes and --process_id go together: give all or none")
    if processes is not None and index is not None and not 0 <= index < processes:
        raise ProcessesError(f"--process_id={index} of --processes={processes}: it counts from 0")
    if coordinator is not None:
        _check_address(coordinator, index == 0)
    where = coordinator or "the coordinator that the environment names"
    watch = threading.Timer(
        startup_timeout, _give_up, (where, coordinator, processes, index, startup_timeout)
    )
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            initialization_timeout=startup_timeout + 60,  # `watch` comes first, with a clearer word
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ProcessesError(
            f"the processes did not come together at {where}: {first_line}; name them yourself with "
            "--coordinator=HOST:PORT --processes=N --process_id=I"
        ) from error
    finally:
        watch.cancel()
    _joined = (where, heartbeat_timeout)
    if processes is not None and jax.process_count() != processes:
        raise ProcessesError(f"found {jax.process_count()} processes, --processes={processes} were expected")
    print(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        flush=True,
    )


def _check_address(coordinator: str, listens: bool) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ProcessesError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if listens:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError) as error:
                raise ProcessesError(
                    f"--coordinator={coordinator}: port {port} cannot be opened here: {error}"
                ) from error


def _give_up(
    where: str, coordinator: str | None, processes: int | None, index: int | None, seconds: int
) -> None:
    """Ends this process: the runtime's own way to do so is a stack trace."""
    missing = f"not all of the {processes or 'expected'} processes have come"
    if coordinator is not None and index:
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError as error:
            missing = f"it cannot be reached ({error})"
    print(
        f"janus-jax: error: process {'' if index is None else index} waited {seconds} s "
        f"(mesh.startup_timeout) at {where}: {missing}; check that all are started with the same "
        "coordinator, each with its own --process_id",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def several() -> bool:
    """Whether there are others."""
    return _joined is not None and jax.process_count() > 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if _joined else 0


def count() -> int:
    """How many processes run together."""
    return jax.process_count() if _joined else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes reports."""
    return index() == 0


def say(message: str) -> None:
    """Prints on the main process alone."""
    if is_main():
        print(message, flush=True)


def gather(value: Any) -> list[Any]:
    """What each process gave, in order of their numbers; values are what JSON holds."""
    if not several():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def main_first(function: Callable[[], T]) -> T:
    """Calls `function` on the main process, and when it is done on the others, all at once.

    Raises:
      ProcessesError: on the others, where it failed on the main one (which raises what it raised).
    """
    if not several():
        return function()
    failure: Exception | None = None
    result: Any = None
    if is_main():
        try:
            result = function()
        except Exception as error:
            failure = error
    told = gather(None if failure is None else f"{type(failure).__name__}: {failure}")[0]
    if failure is not None:
        raise failure
    if told is not None:
        raise ProcessesError(f"process 0 failed: {told}")
    return result if is_main() else function()


def to_host(tree: Tree) -> Tree:
    """Every array whole, for this process alone: what lies on other processes too is brought together."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


@contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
    """Notes SIGTERM and Ctrl-C; yields a function: updates done -> the reason to stop now, or None.

    With several processes, a notice to any of them is agreed on by all: each gets its reason at the same
    update.  A second Ctrl-C ends at once.
    """
    caught: list[str] = []
    together = several()

    def note(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)
        if together:
            os.kill(os.getpid(), signal.SIGTERM)  # which the runtime passes on to the others

    def reason(done: int) -> str | None:
        if not together:
            return caught[0] if caught else None
        return (
            "SIGTERM to one of the processes" if multihost_utils.reached_preemption_sync_point(done) else None
        )

    # With several processes SIGTERM is the runtime's.
    mine = (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in mine}
    try:
        yield reason
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective raises when another process is gone."""
    return several() and any(sign in str(error) for sign in _SIGNS_OF_LOSS)


def mourn(error: BaseException) -> NoReturn:
    """Another process is gone: says so, and ends when the runtime has named it, or else soon after.

    The runtime ends the process by itself (SIGABRT) with the number of the one that gave no sign of life.
    """
    assert _joined is not None
    seconds = _joined[1] + 10
    first_line = str(error).strip().partition("\n")[0]
    print(
        f"janus-jax: process {index()} of {count()} lost another process: {first_line}\n"
        f"janus-jax: ends as soon as it is known which, in {seconds} s at most (mesh.heartbeat_timeout); the "
        "same command goes on from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(seconds)
    leave(LOST)
    raise AssertionError("not reached")


def leave(code: int) -> int:
    """To be called last: hands `code` back where all end together, else ends this process now.

    A process that has failed must not wait for the others to say goodbye: they wait for it.
    """
    if _joined and code not in TOGETHER:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
