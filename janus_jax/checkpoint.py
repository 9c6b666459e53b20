"""Checkpoints: written behind the training loop's back, found again after anything, read by decoding.

A folder (by convention `<workdir>/checkpoints`) holds one sub-folder per step:

    checkpoints/1000/state    the training state, any pytree of arrays
    checkpoints/1000/scores   {"metrics": {name: value}, "best_metric": name, "best_mode": "max"}

A step appears under its number only when it is whole (it is renamed into place), so a process killed
in the middle of a save leaves the earlier steps as they were.  Kept are the newest `keep_last` steps and
the best one on `best_metric`.

Room: disk; the only one that knows orbax.  Imports nothing of ours.  All functions may be called by
every process of a run; orbax divides the work.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

Tree = Any  # a pytree
Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]  # {path/of/keys: (shape, dtype)}
Say = Callable[[str], None]

STATE = "state"
SCORES = "scores"
LATEST = "latest"
BEST = "best"
SHOWN_DIFFERENCES = 5

# Orbax logs pages of tracebacks from its threads; what matters in them reaches the user as an error of ours.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names it and the remedy."""


class MismatchError(CheckpointError):
    """A checkpoint whose arrays are not those that were asked for."""


class NoCheckpointError(FileNotFoundError):
    """A folder, or a choice of step, without a checkpoint."""


def to_stderr(message: str) -> None:
    """The default way to say something: one line on stderr."""
    print(message, file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run, for the run that writes them.

    Opening the folder creates it and removes what an interrupted save left behind, so only the
    training process may; readers use the functions below the class.

    Attributes:
      folder: absolute path of the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_last: int = 5,
        best_metric: str | None = None,
        best_mode: str = "max",
        say: Say = to_stderr,
    ) -> None:
        """Opens `folder`, creating it if need be.

        Args:
          folder: where the steps lie, `<workdir>/checkpoints` by convention; a local path or a URL.
          keep_last: how many of the newest steps to keep.
          best_metric: name in the metrics given to `save` whose best step is kept as well, or None.
          best_mode: "max" or "min".
          say: receives one line for each thing that the user should know.

        Raises:
          CheckpointError: the folder cannot be created or read.
        """
        if keep_last < 1 or best_mode not in ("max", "min"):
            raise ValueError(f"keep_last must be >= 1 and best_mode max or min: {keep_last}, {best_mode!r}")
        self.folder = _absolute(folder)
        self._keep_last = keep_last
        self._rule = {"best_metric": best_metric, "best_mode": best_mode}
        self._say = say
        self._saving: int | None = None  # the step last handed to orbax
        self._damaged: list[int] = []  # steps passed over by restore, to be replaced by the next save
        self._open()

    def save(self, step: int, state: Tree, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts to write `state`; returns as soon as it has been copied from the devices.

        The caller may donate or change the arrays at once.  An error of the background write is raised by
        the next call of `save`, `wait` or `close`.  Damaged steps that `restore` passed over are deleted
        now, before a good one takes their place.

        Args:
          step: updates done; larger than every step saved so far.
          state: pytree of dicts, tuples, NamedTuples and arrays.
          metrics: values to remember with the step; those not finite never count as the best.

        Returns:
          False if this very step is already saved (then nothing is written), else True.

        Raises:
          CheckpointError: this or the previous checkpoint could not be written (earlier ones are unharmed),
            or the folder holds a newer step.
        """
        self.wait()
        with self._writing("damaged checkpoints could not be removed"):
            while self._damaged:
                self._manager.delete(self._damaged[-1])
                self._damaged.pop()
        if step in self.steps():
            return False
        latest = self.latest()
        if latest is not None and step < latest:
            raise CheckpointError(
                f"{self.folder} holds step {latest}, newer than step {step} that is to be saved; "
                f"use another --workdir, or move the newer steps away"
            )
        record = {"metrics": {k: float(v) for k, v in (metrics or {}).items()}, **self._rule}
        self._records[step] = record  # before the save, which asks for the best at once
        with self._writing(f"the checkpoint of step {step} could not be written"):
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardSave(state), SCORES: ocp.args.JsonSave(record)}
                ),
                force=True,
            )
        return True

    def wait(self) -> None:
        """Waits until what is being written is on disk.

        Raises:
          CheckpointError: it could not be written; earlier checkpoints are unharmed.
        """
        with self._writing(f"the checkpoint of step {self._saving} could not be written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, then releases everything; a with-statement does the same."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`close`; an error that is already under way is not replaced by one of closing."""
        with suppress(CheckpointError) if error else nullcontext():
            self.close()

    def steps(self) -> list[int]:
        """All steps, oldest first, one that is still being written included."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best `best_metric` (the newest such), or None if no step has that metric."""
        return _best_step({s: self._records[s] for s in self.steps() if s in self._records}, self._rule)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with `step`; empty if there are none."""
        return dict(self._records.get(step, {}).get("metrics", {}))

    def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, int]:
        """The state of `step`, or the newest that can be read, laid out as `abstract_state` says.

        A newest step that is damaged is passed over, said so, and deleted when the next one is saved.

        Args:
          abstract_state: the state's structure with a `jax.ShapeDtypeStruct` with sharding for each array;
            any number of devices, whatever number wrote it.
          step: this step and no other; None takes the newest.

        Returns:
          (state, its step).

        Raises:
          NoCheckpointError: there is no checkpoint, or not that one.
          MismatchError: the checkpoint's arrays have other names, shapes or types than `abstract_state`.
          CheckpointError: no checkpoint, or not that one, can be read.
        """
        self.wait()
        wanted = [_choose(self.folder, self._by_step(), step)] if step is not None else self.steps()[::-1]
        if not wanted:
            raise _none_in(self.folder)
        failures: list[CheckpointError] = []
        for candidate in wanted:
            path = _join(self.folder, candidate)
            try:
                with _reading(path):
                    state = self._restore(path, candidate, abstract_state)
            except MismatchError:
                raise
            except CheckpointError as error:
                self._say(str(error))
                failures.append(error)
                continue
            if failures:
                self._damaged = wanted[: len(failures)]
                self._say(
                    f"continuing from step {candidate} of {self.folder}; the damaged steps "
                    f"{_listed(self._damaged)} are deleted when the next checkpoint is saved"
                )
            return state, candidate
        if step is not None:
            raise failures[0]
        raise CheckpointError(
            f"none of the checkpoints in {self.folder} can be read ({_listed(wanted)}); "
            f"bring back a copy of one, or train afresh with another --workdir"
        ) from failures[0]

    def _restore(self, path: str, step: int, abstract_state: Tree) -> Tree:
        _check_same(path, _arrays(_saved_tree(path)), _arrays(abstract_state))
        args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract_state)})
        return self._manager.restore(step, args=args)[STATE]

    def _by_step(self) -> dict[int, dict[str, Any]]:
        return {s: self._records.get(s, {}) for s in self.steps()}

    def _open(self) -> None:
        try:
            self._manager = _manager(
                self.folder, create=True, retention=_Retention(self._keep_last, self.best)
            )
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self.folder}: {_reason(error)}; "
                f"choose a --workdir that exists and is writable"
            ) from error
        self._records = _records(self._manager)

    @contextmanager
    def _writing(self, failure: str) -> Iterator[None]:
        """Turns an error of orbax into ours, after bringing memory and disk back in line."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):
                self._manager.close()
            self._open()  # forgets the failed step, and removes what there is of it
            remedy = "free space there or make it writable; " if _system_words(error) else ""
            raise CheckpointError(
                f"{failure} in {self.folder}: {_reason(error)}; {remedy}"
                f"the earlier checkpoints are unharmed ({_listed(self.steps())})"
            ) from error


def find_step(folder: str | os.PathLike[str], which: int | str = LATEST) -> int:
    """The step that `which` means: a number, "latest" or "best" (by the metric its run chose).

    Raises:
      NoCheckpointError: the folder has none, not that one, or none with the metric.
    """
    folder = _absolute(folder)
    with closing(_manager(folder)) as manager:
        records = {s: {} for s in manager.all_steps()} if which == LATEST else _records(manager)
    return _choose(folder, records, which)


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """All complete steps in `folder`, oldest first; empty if there is no such folder."""
    with closing(_manager(_absolute(folder))) as manager:
        return sorted(manager.all_steps())


def restore_params(folder: str | os.PathLike[str], step: int | str = LATEST, part: str = "params") -> Tree:
    """One part of a saved state, without knowing the rest of it.

    Args:
      folder: where the steps lie, `<workdir>/checkpoints` by convention.
      step: a step, "latest" or "best"; `find_step` tells which one that is.
      part: key of the state, such as "params" or "ema".

    Returns:
      Nested dicts of numpy arrays, in the types they were saved in.

    Raises:
      NoCheckpointError: as `find_step`.
      CheckpointError: the step is damaged, or its state has no such part.
    """
    folder = _absolute(folder)
    path = _join(folder, find_step(folder, step))
    with _reading(path, f"choose another step with --checkpoint, of {_listed(list_steps(folder))}"):
        return _read_part(path, part)


def newest_steps(folder: str | os.PathLike[str], last: int) -> list[int]:
    """The newest `last` steps, oldest first.

    Raises:
      NoCheckpointError: there are fewer; names how many.
    """
    folder = _absolute(folder)
    steps = list_steps(folder)
    if not steps:
        raise _none_in(folder)
    if not 1 <= last <= len(steps):
        raise NoCheckpointError(
            f"cannot average the last {last} checkpoints of {folder}, which has {len(steps)}: "
            f"{_listed(steps)}; ask for 1 to {len(steps)}, or train with a larger train.keep_last"
        )
    return steps[-last:]


def average_params(folder: str | os.PathLike[str], last: int, part: str = "params") -> Tree:
    """The mean, in float32, of one part of the newest `last` checkpoints.

    Raises:
      NoCheckpointError: as `newest_steps`.
      CheckpointError: as `restore_params`, or the checkpoints differ in their arrays.
    """
    folder = _absolute(folder)
    newest, *older = reversed(newest_steps(folder, last))
    params = restore_params(folder, newest, part)
    arrays = _arrays(params)
    total = jax.tree.map(lambda x: np.array(x, np.float32), params)
    for step in older:
        params = restore_params(folder, step, part)
        _check_same(_join(folder, step), _arrays(params), arrays)
        total = jax.tree.map(lambda s, x: s + np.asarray(x, np.float32), total, params)
    return jax.tree.map(lambda s: s / np.float32(last), total)


class _Retention:
    """Orbax's preservation policy: the newest `keep_last` steps, and the best."""

    def __init__(self, keep_last: int, best: Callable[[], int | None]) -> None:
        self._keep_last = keep_last
        self._best = best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [c.step for c in checkpoints]
        kept = {*sorted(steps)[-self._keep_last :], self._best()}
        return [s in kept for s in steps]


def _manager(folder: str, create: bool = False, retention: _Retention | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        create=create,
        cleanup_tmp_directories=create,
        preservation_policy=retention,
        lightweight_initialize=True,  # a damaged step must not keep the folder from opening
    )
    return ocp.CheckpointManager(folder, options=options)


def _records(manager: ocp.CheckpointManager) -> dict[int, dict[str, Any]]:
    """{step: its scores file}; an unreadable one counts as empty, as it only informs the choice of a best."""
    records: dict[int, dict[str, Any]] = {}
    for step in manager.all_steps():
        records[step] = {}
        with suppress(Exception):
            args = ocp.args.Composite(**{SCORES: ocp.args.JsonRestore()})
            records[step] = manager.restore(step, args=args)[SCORES]
    return records


def _choose(folder: str, records: Mapping[int, dict[str, Any]], which: int | str) -> int:
    """The step that `which` means among `records`, as `find_step`."""
    if not records:
        raise _none_in(folder)
    if which == LATEST:
        return max(records)
    if which == BEST:
        rule = next((r for _, r in sorted(records.items(), reverse=True) if r.get("best_metric")), {})
        best = _best_step(records, rule)
        if best is None:
            raise NoCheckpointError(
                f"no checkpoint in {folder} has a value of {rule.get('best_metric') or 'a dev metric'} to be "
                f"the best by; choose the latest or one of the steps {_listed(records)}"
            )
        return best
    if isinstance(which, str) and which.isdigit():
        which = int(which)
    if which not in records:
        raise NoCheckpointError(
            f"no checkpoint of step {which!r} in {folder}; "
            f"choose {LATEST}, {BEST} or one of {_listed(records)}"
        )
    return int(which)


def _best_step(records: Mapping[int, dict[str, Any]], rule: Mapping[str, Any]) -> int | None:
    sign = -1.0 if rule.get("best_mode") == "min" else 1.0
    values = {s: r.get("metrics", {}).get(rule.get("best_metric")) for s, r in records.items()}
    finite = [(sign * v, s) for s, v in values.items() if v is not None and math.isfinite(v)]
    return max(finite)[1] if finite else None


def _saved_tree(path: str) -> Tree:
    """The saved state as nested dicts and lists with descriptions of arrays at the leaves."""
    with ocp.PyTreeCheckpointer() as reader:
        description = reader.metadata(_join(path, STATE)).item_metadata
    if description is None:
        raise ValueError("the description of its arrays is missing")
    return description.tree


def _read_part(path: str, part: str) -> Tree:
    saved = _saved_tree(path)
    if part not in saved or not jax.tree.leaves(saved[part]):
        parts = ", ".join(k for k, v in saved.items() if jax.tree.leaves(v))
        raise CheckpointError(f"checkpoint {path} holds no {part!r}; it holds {parts}")
    item = {part: saved[part]}
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(_join(path, STATE), args=args)[part]


def _arrays(tree: Tree) -> Arrays:
    """What the arrays of `tree` are; a NamedTuple's field and a dict's key are named alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in leaves
    }


def _check_same(path: str, saved: Arrays, wanted: Arrays) -> None:
    """Raises MismatchError, naming the first arrays that differ, unless `saved` is `wanted`."""

    def describe(array: tuple[tuple[int, ...], np.dtype] | None) -> str:
        return "nothing" if array is None else f"{array[1]} {array[0]}"

    differing = [k for k in dict.fromkeys([*wanted, *saved]) if wanted.get(k) != saved.get(k)]
    if differing:
        lines = [
            f"  {k}: {describe(saved.get(k))} saved, {describe(wanted.get(k))} wanted"
            for k in differing[:SHOWN_DIFFERENCES]
        ]
        more = len(differing) - len(lines)
        raise MismatchError(
            f"checkpoint {path} was written with another model or optimiser config:\n"
            + "\n".join(lines + ([f"  and {more} more"] if more else []))
            + "\nuse the config it was written with, or another --workdir"
        )


@contextmanager
def _reading(path: str, remedy: str = "") -> Iterator[None]:
    """Turns what orbax raises on damaged files into a CheckpointError; lack of memory is no damage."""
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        message = f"checkpoint {path} is damaged and cannot be read: {_reason(error)}"
        raise CheckpointError(message + (f"; {remedy}" if remedy else "")) from error


def _none_in(folder: str) -> NoCheckpointError:
    return NoCheckpointError(
        f"no checkpoint in {folder}; write one with `janus-jax train --workdir={os.path.dirname(folder)}`"
    )


def _reason(error: BaseException) -> str:
    """The telling part of an error: the system's words where there are some, else its first line, cut."""
    first_line = str(error).strip().partition("\n")[0]
    return _system_words(error) or f"{type(error).__name__}: {first_line[:200]}"


def _system_words(error: BaseException) -> str | None:
    """What the operating system said ("No space left on device"), or None if it was not the cause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's way to tell
    return os.strerror(int(code.group(1))) if code else None


def _listed(steps: Sequence[int] | Mapping[int, Any]) -> str:
    return ", ".join(str(s) for s in sorted(steps)) or "none"


def _absolute(folder: str | os.PathLike[str]) -> str:
    name = os.fspath(folder)
    return name if "://" in name else os.path.abspath(name)


def _join(folder: str, name: int | str) -> str:
    return f"{folder.rstrip('/')}/{name}"
