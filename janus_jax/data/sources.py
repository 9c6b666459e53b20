"""Prepared data sets: made once, then opened split by split, without TensorFlow.

Room: [disk] reads and writes data sets below one folder.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from janus_jax.config import DataConfig
from janus_jax.data import builders, catalogue
from janus_jax.data.catalogue import Progress
from janus_jax.data.lines import DataError

_READ = 1000  # records read together


@dataclass(frozen=True)
class SplitReport:
    """What became of the lines of one split."""

    pairs: int  # kept
    dropped: int  # pairs with an empty side, left out of the training split
    empty: int  # pairs with an empty side, dropped or kept


@dataclass(frozen=True)
class DatasetReport:
    """A prepared data set."""

    name: str
    folder: pathlib.Path
    fresh: bool  # whether this call wrote it
    splits: dict[str, SplitReport]


class PairSource:
    """The pairs of one split in one direction, by number; iteration reads many at once."""

    def __init__(self, records: Any, languages: tuple[str, str], length: int, identity: str) -> None:
        """Wraps `records`, a sequence of dicts of text.

        Args:
          records: has `__getitem__` and, for many at once, `__getitems__`.
          languages: source and target.
          length: how many of the records to use, from the first.
          identity: names exactly this text; a key for what is derived from it.
        """
        self._records = records
        self._languages = languages
        self._length = length
        self.identity = identity

    def __len__(self) -> int:
        """Number of pairs."""
        return self._length

    def __getitem__(self, index: int) -> tuple[str, str]:
        """Source and target of one pair."""
        return self._pair(self._record(index))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """All pairs in order."""
        for start in range(0, self._length, _READ):
            for record in self._records.__getitems__(range(start, min(start + _READ, self._length))):
                yield self._pair(record)

    def references(self, index: int) -> tuple[str, ...]:
        """All accepted targets of a pair; for ordinary sets the target alone."""
        record = self._record(index)
        return tuple(map(_text, record[builders.REFERENCES])) or (self._pair(record)[1],)

    def _record(self, index: int) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"pair {index} of {self._length}")
        return self._records[index % self._length]

    def _pair(self, record: Any) -> tuple[str, str]:
        source, target = self._languages
        return _text(record[source]), _text(record[target])


def prepare_dataset(
    config: DataConfig, folder: pathlib.Path, progress: Progress | None = None
) -> DatasetReport:
    """Makes the data set that `config` names below `folder`, unless it is there already.

    The set appears whole or not at all: a run that was killed leaves nothing that looks finished.

    Raises:
      DataError: keys, files or a network that cannot be used, or raw files that have changed since
        the set was made.
    """
    name = catalogue.variant(config)
    path = builders.path(config.name, name, folder)
    fresh = not path.is_dir()
    if fresh or catalogue.has_raw_files(config):
        corpus = catalogue.corpus(config, folder, progress)
        if fresh:
            builders.write(corpus, folder, progress)
        elif corpus.fingerprint != _metadata(path)["fingerprint"]:
            raise DataError(
                f"{path} was made from other raw files or another data.train_split than {config.name} has "
                "now; delete that folder to make it anew, or use another data.dir"
            )
    splits = {split: SplitReport(**counts) for split, counts in _metadata(path)["splits"].items()}
    return DatasetReport(config.name, path, fresh, splits)


def open_split(config: DataConfig, folder: pathlib.Path, split: str) -> PairSource:
    """The pairs of `split`, from `config.source` to `config.target`.

    `config.size` limits the training split to its first pairs.

    Raises:
      DataError: the set is not prepared, has no such split (the message lists them) or, for the
        training split, fewer pairs than `config.size`.
    """
    path = builders.path(config.name, catalogue.variant(config), folder)
    if not path.is_dir():
        raise DataError(f"{path} is missing: run `janus-jax prepare` first")
    metadata = _metadata(path)
    if split not in metadata["splits"]:
        raise DataError(
            f"{config.name} has no split {split!r}; it has {', '.join(metadata['splits'])}: name one of "
            "these by data.train_split, data.dev_split or data.test_split, or by --split"
        )
    tfds = importlib.import_module("tensorflow_datasets")  # half a second, so only when it is needed
    records = tfds.builder_from_directory(str(path)).as_data_source(split)
    length = len(records)
    if split == config.train_split and config.size and config.name != "phrases":
        if config.size > length:
            raise DataError(f"data.size = {config.size}, but split {split!r} has only {length} pairs")
        length = config.size
    languages = (config.source, config.target)
    parts: Sequence[Any] = (*path.parts[-3:], split, *languages, length, metadata["fingerprint"])
    return PairSource(records, languages, length, "/".join(map(str, parts)))


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    try:
        metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        return {key: metadata[key] for key in ("fingerprint", "splits")}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); delete that folder and prepare it again") from error


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value
