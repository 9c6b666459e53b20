"""Our data sets as TFDS builders that write array_record files without TensorFlow.

One record is {<language>: text, <other language>: text, "references": all accepted targets}; the
references are empty where the target is the only one.  Records keep the order of their source.

Room: [disk] writes data sets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from janus_jax.data.catalogue import Corpus, Progress
from janus_jax.data.lines import DataError

REFERENCES = "references"
VERSION = "1.0.0"

_REPORT_EVERY = 2000  # records between two reports of progress


@dataclasses.dataclass(eq=False)
class PairConfig(tfds.core.BuilderConfig):
    """Which corpus a builder writes, and whom it tells how far it is."""

    corpus: Corpus | None = None
    progress: Progress | None = None


class PairBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes the `Corpus` of its config; each data set below is this under its own name."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        fields = dict.fromkeys(self._corpus.languages, text)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Pairs of text: {self._corpus.name}, {self._corpus.variant}.",
            features=tfds.features.FeaturesDict({**fields, REFERENCES: tfds.features.Sequence(text)}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(fingerprint=self._corpus.fingerprint, splits={}),
        )

    @property
    def _corpus(self) -> Corpus:
        return self.builder_config.corpus

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # the catalogue has fetched what there was to fetch
        return {split: self._generate_examples(split) for split in self._corpus.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbered records of one split; counts what is dropped or empty.

        A pair with an empty side teaches nothing: the training split drops it.  The other splits
        keep every line, so that line n of an output belongs to line n of the raw file.
        """
        first_language, second_language = self._corpus.languages
        number, empty, dropping = 0, 0, split == self._corpus.train
        for first, second, references in self._corpus.splits[split]():
            empty += not (first and second)
            if dropping and not (first and second):
                continue
            yield number, {first_language: first, second_language: second, REFERENCES: list(references)}
            number += 1
            self._tell(split, number)
        self._tell(split, number, last=True)
        if not number:
            raise DataError(f"split {split!r} of {self._corpus.name} has no pair of text")
        self.info.metadata["splits"][split] = {"pairs": number, "dropped": dropping * empty, "empty": empty}

    def _tell(self, split: str, number: int, last: bool = False) -> None:
        progress = self.builder_config.progress
        if progress and (last or number % _REPORT_EVERY == 0):
            progress(f"write {split}", number, number if last else None)


class Multi30k(PairBuilder):
    """Multi30k, task 1."""


class ParallelText(PairBuilder):
    """The user's own line-aligned files."""


class Phrases(PairBuilder):
    """Generated wordings of numbers, dates, times and amounts."""


class Iwslt14(PairBuilder):
    """IWSLT 2014 German-English."""


class Wmt14(PairBuilder):
    """WMT 2014."""


class Wmt16(PairBuilder):
    """WMT 2016."""


_BUILDERS = {b.name: b for b in (Multi30k, ParallelText, Phrases, Iwslt14, Wmt14, Wmt16)}


def write(corpus: Corpus, folder: pathlib.Path, progress: Progress | None = None) -> None:
    """Writes `corpus` below `folder`; the data set appears there whole or not at all.

    Raises:
      DataError: something in the corpus cannot be used.
    """
    config = PairConfig(name=corpus.variant, corpus=corpus, progress=progress)
    with _quiet():
        builder = _BUILDERS[corpus.name](data_dir=str(folder), config=config, file_format="array_record")
        builder.download_and_prepare()


def path(name: str, variant: str, folder: pathlib.Path) -> pathlib.Path:
    """Where `write` puts a data set; the folder exists if and only if it is complete."""
    return folder / name / variant / VERSION


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without TFDS's own bars and messages: progress is reported by us."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()
