"""The run directory: one folder that holds all there is to a run.

  config.json      the whole configuration
  versions.json    of the packages that trained it
  vocab.model, vocab.json
  data/            prepared data, unless data.dir names another place
  metrics.jsonl, tensorboard/
  checkpoints/
  eval/            hypotheses and scores

Decoding needs this folder and nothing else.  It may be gs://bucket/folder: then prepared data lie on
each machine (`paths.data_folder`), and a lease takes the place of the lock.

Room: [disk].  Imports config, text, checkpoint, report and paths.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_jax import checkpoint, paths, report
from janus_jax.config import Config, ConfigError, differences, from_dict
from janus_jax.paths import AnyPath
from janus_jax.text import MODEL_FILE, Vocabulary

LOCK = ".lock"
BOUND = "vocabulary.sha256"  # beside the checkpoints: the vocabulary that they were made with
BOUND_DATA = "training_data.sha256"  # and the encoded training pairs

# What may change between two starts of the same run; all other keys define it.
FREE = ("data.dir", "data.raw_dir", "data.dev_split", "data.test_split", "batch.workers", "batch.prefetch")
FREE_SECTIONS = ("train.", "decode.", "mesh.")
FREE_MODEL = ("model.scan_layers", "model.remat", "model.remat_keep")
# What may differ between a run and the one that it starts from: models that read the same parameters.
FREE_OF_START = (
    *("model.dropout", "model.attention_dropout", "model.activation_dropout", "model.dtype"),
    *("model.ar_positions", "model.ar_stream", "model.length_gradient"),
    *FREE_MODEL,
)
# What a vocabulary is made by: fixed once there is one.  The rest is fixed once there is a checkpoint.
OF_VOCABULARY = ("data.", "vocab.", "model.vocab_size", "model.ids.", "init.run")


class RunError(ValueError):
    """A run directory that cannot be used; the message names it, what is wrong, and the remedy."""


@dataclass(frozen=True)
class Run:
    """An existing run directory and its configuration."""

    folder: AnyPath
    config: Config

    @property
    def data_folder(self) -> Path:
        """Where its prepared data lies."""
        return paths.data_folder(self.config.data.dir, self.folder)

    @property
    def checkpoints(self) -> AnyPath:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    def has_checkpoints(self) -> bool:
        """Whether there is any, whole or not."""
        return any(self.checkpoints.glob("[0-9]*"))

    def vocabulary(self) -> Vocabulary:
        """Its vocabulary, checked against the configuration and against what the checkpoints were made with.

        Raises:
          VocabularyError: it cannot be read.
          RunError: it has other ids or another size than the model, or is not the one of the checkpoints.
        """
        vocabulary = Vocabulary.load(self.folder)
        for what, found, wanted in (
            ("number of entries", len(vocabulary), self.config.model.vocab_size),
            ("special ids", vocabulary.ids, self.config.model.ids),
            ("sha256", vocabulary.sha256, self._bound_vocabulary() or vocabulary.sha256),
        ):
            if found != wanted:
                raise RunError(
                    f"{self.folder}: this is not the vocabulary of the model: {what} {found}, the model has "
                    f"{wanted}; put back the vocab.model and vocab.json of this run"
                )
        return vocabulary

    def bind_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Keeps beside the checkpoints which vocabulary they are made with; call it before the first."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.checkpoints / BOUND).write_text(vocabulary.sha256 + "\n", encoding="utf-8")

    def bind_data(self, sha256: str, *, write: bool = True) -> None:
        """Keeps beside the checkpoints which encoded training pairs they are made with, or compares.

        Args:
          sha256: of the pairs at hand.
          write: False on processes that only compare.

        Raises:
          RunError: checkpoints are there, made with other pairs.
        """
        path = self.checkpoints / BOUND_DATA
        if self.has_checkpoints() and path.is_file():
            if (bound := path.read_text(encoding="utf-8").strip()) != sha256:
                raise RunError(
                    f"{self.folder}: the checkpoints were made with other training data: the encoded pairs "
                    f"had sha256 {bound}, those in {self.data_folder} have {sha256}; set data.dir and "
                    "data.raw_dir back to the data of this run, or choose another --workdir"
                )
        elif write:
            path.write_text(sha256 + "\n", encoding="utf-8")

    def record(self) -> None:
        """Writes down its configuration and the versions of the packages here."""
        report.write_json(self.folder / "config.json", self.config.to_dict())
        report.write_json(self.folder / "versions.json", report.versions())

    def _bound_vocabulary(self) -> str | None:
        path = self.checkpoints / BOUND
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def params(self, which: str = "best") -> tuple[Any, str]:
        """Parameters for decoding, and what they are, in words.

        Args:
          which: best | latest | a step | average:N, the mean of the newest N checkpoints.  The
            exponential average is taken where the run keeps one.

        Raises:
          RunError: `which` is none of these, or asks for the mean of more checkpoints than a run keeps.
          checkpoint.NoCheckpointError: there is no such checkpoint.
        """
        part = "ema" if self.config.optim.ema else "params"
        steps = self.find(which)
        if which.startswith("average"):
            found = checkpoint.average_params(self.checkpoints, len(steps), part)
            return found, f"average of steps {', '.join(map(str, steps))}"
        return checkpoint.restore_params(self.checkpoints, steps[0], part), f"step {steps[0]}"

    def find(self, which: str) -> list[int]:
        """The steps that `which`, as `params` has it, is made of; no parameters are read.

        Raises:
          RunError, checkpoint.NoCheckpointError: as `params`.
        """
        kind, _, number = which.partition(":")
        if kind == "average" and number.isdecimal():
            if int(number) > (kept := self.config.train.keep_last):
                raise RunError(  # an older one is there only where it is best on dev
                    f"cannot average the last {number} checkpoints of {self.folder}: train.keep_last is "
                    f"{kept}; ask for 1 to {kept}, or train with a larger one"
                )
            return checkpoint.newest_steps(self.checkpoints, int(number))
        if which not in ("best", "latest") and not which.isdecimal():
            raise RunError(f"--checkpoint must be best, latest, a step or average:N, got {which!r}")
        return [checkpoint.find_step(self.checkpoints, int(which) if which.isdecimal() else which)]

    def start(self) -> tuple[Any, str] | None:
        """The parameters of the run that this one starts from, and what they are; None if it draws its own.

        Raises:
          RunError: `init.run` is no run, or has another model or another vocabulary.
          checkpoint.NoCheckpointError: it has no checkpoint `init.checkpoint`.
        """
        origin = start_of(self.config)
        if origin is None:
            return None
        if origin.vocabulary().sha256 != self.vocabulary().sha256:
            raise RunError(
                f"{self.folder} was prepared with another vocabulary than that of init.run = "
                f"{origin.folder}: choose another --workdir"
            )
        params, what = origin.params(self.config.init.checkpoint)
        return params, f"{origin.folder}, {what}"


def start_of(config: Config) -> Run | None:
    """The run whose parameters `config` starts from, or None.

    Raises:
      RunError: `init.run` is no run, or a model of another kind (names every key that differs).
    """
    if not config.init.run:
        return None
    try:
        origin = open_run(os.path.expanduser(config.init.run))
    except RunError as error:
        raise RunError(f"init.run: {error}") from None
    other = {
        key: values
        for key, values in differences(origin.config, config).items()
        if key.startswith("model.") and key not in FREE_OF_START
    }
    if other:
        lines = "\n".join(f"  {key}: {there!r} there, {here!r} here" for key, (there, here) in other.items())
        raise RunError(
            f"init.run = {origin.folder} has another model, whose parameters do not fit:\n{lines}\n"
            "set these keys as they are there"
        )
    return origin


def open_run(folder: str | os.PathLike[str]) -> Run:
    """An existing run directory.

    Raises:
      RunError: there is none, or its config.json cannot be read.
    """
    folder = paths.as_path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(
            f"{folder} is not a run directory: it has no config.json; make one with "
            f"janus-jax train --config=... --workdir={folder}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ConfigError("it holds no configuration")
        return Run(folder, from_dict(values))
    except (ConfigError, ValueError) as error:
        raise RunError(f"{path} cannot be used: {error}") from error


def claim(folder: str | os.PathLike[str], config: Config) -> Run:
    """The run directory `folder` for `config`, made if need be.

    Settings that do not change what is learnt (cadences, decoding defaults, devices, places of data)
    may differ from those it was made with; the others only while there is nothing made with them: no
    vocabulary, for those that it depends on, and no checkpoint.  They are written down where there is no
    checkpoint yet; else `Run.record` does that, once there is an update to be made with them.

    Raises:
      RunError: the folder belongs to another configuration (names every key that differs), or holds
        checkpoints of which nobody knows what they belong to; or as `start_of`.
      paths.PathError: a URL that cannot hold a run.
    """
    folder = paths.as_path(folder)
    paths.check_run(folder)
    claimed = Run(folder, config)
    if (folder / "config.json").exists():
        old = open_run(folder).config
        fixed = {k: v for k, v in differences(old, config).items() if not free(k, config)}
        if not claimed.has_checkpoints():
            bound = OF_VOCABULARY if (folder / MODEL_FILE).exists() else ()
            fixed = {k: v for k, v in fixed.items() if k.startswith(bound)}
        if fixed:
            lines = "\n".join(
                f"  {key}: {mine!r} there, {yours!r} asked for" for key, (mine, yours) in fixed.items()
            )
            raise RunError(
                f"{folder} belongs to a run with another configuration:\n{lines}\n"
                "choose another --workdir, or leave --config out to go on with that run"
            )
    elif claimed.has_checkpoints():
        raise RunError(
            f"{folder} has checkpoints but no config.json, so what they belong to is unknown; "
            "put the config.json back, or choose another --workdir"
        )
    if not claimed.has_checkpoints():
        start_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        claimed.record()
    return claimed


@contextmanager
def locked(folder: AnyPath) -> Iterator[None]:
    """Holds `folder` for this process alone.

    Raises:
      RunError: another process holds it.
      paths.PathError: a URL that cannot hold a run.
    """
    if paths.is_remote(folder):
        paths.check_run(folder)
        try:
            with paths.lease(folder / LOCK):
                yield
        except paths.LeaseError as error:
            raise RunError(str(error)) from None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another janus-jax process; wait for it, or choose another --workdir"
            ) from None
        yield


def free(key: str, config: Config) -> bool:
    """Whether `key` may change between two starts of a run of `config`."""
    if key == "train.steps" and config.optim.schedule == "polynomial":
        return False  # the schedule ends there
    if key == "train.steps" and config.loss.ties_change:
        return False  # a share of them is the warm-up of the ties, or their decay
    return key in (*FREE, *FREE_MODEL) or key.startswith(FREE_SECTIONS)
