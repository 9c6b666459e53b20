"""The data sets that `data.name` can mean, and where the text of each comes from.

`corpus(config, folder)` turns the keys of `config.DataConfig` into a `Corpus`: splits, each a way to
iterate over its pairs.  `builders.py` writes it down as a TFDS data set.

  multi30k       image captions, two of en, de, fr, cs; raw files from data.raw_dir, else downloaded
  parallel_text  the user's own `<split>.<language>[.gz]` files in data.raw_dir
  phrases        generated: wordings of numbers, dates, times, amounts
  iwslt14        `train|valid|test.de|en[.gz]` in data.raw_dir, as the usual scripts leave them
  wmt14, wmt16   the public TFDS sets wmt14_translate and wmt16_translate, to or from en

Room: [disk, network] reads raw files.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from janus_jax.config import DataConfig
from janus_jax.data import download, lines, phrases
from janus_jax.data.lines import DataError, MissingFileError
from janus_jax.text import clean_line

Progress = Callable[[str, int, int | None], None]  # (what, done, total or None)
Record = tuple[str, str, tuple[str, ...]]  # text in languages[0], in languages[1], accepted targets

_SPLIT = re.compile(r"(?!all$)[\w-]+")  # what TFDS takes for the name of a split
_MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
_MULTI30K_SPLITS: dict[str, frozenset[str]] = {  # languages that each split exists in
    "train": frozenset(("en", "de", "fr", "cs")),
    "val": frozenset(("en", "de", "fr", "cs")),
    "test_2016_flickr": frozenset(("en", "de", "fr", "cs")),
    "test_2017_flickr": frozenset(("en", "de", "fr")),
    "test_2017_mscoco": frozenset(("en", "de", "fr")),
    "test_2018_flickr": frozenset(("en", "de", "fr", "cs")),
}
_MULTI30K_SHA256 = {
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
}
_WMT = {  # public TFDS name, and the languages it pairs with English
    "wmt14": ("wmt14_translate", frozenset(("cs", "de", "fr", "hi", "ru"))),
    "wmt16": ("wmt16_translate", frozenset(("cs", "de", "fi", "ro", "ru", "tr"))),
}
NAMES = ("multi30k", "parallel_text", "phrases", "iwslt14", "wmt14", "wmt16")


@dataclass(frozen=True)
class Corpus:
    """A data set before it is written down.

    Attributes:
      name: its name in the catalogue.
      variant: which one of that name: the languages, for `phrases` also direction and size.
      languages: the fields of a record.
      train: the split whose pairs with an empty side are dropped.
      fingerprint: changes when the raw text changes; "" where that cannot be told.
      splits: for each split, a function that iterates over its records.
    """

    name: str
    variant: str
    languages: tuple[str, str]
    train: str
    fingerprint: str
    splits: Mapping[str, Callable[[], Iterator[Record]]]


def variant(config: DataConfig) -> str:
    """The variant of `config.name` that `config` means, after a check of its keys.

    Raises:
      DataError: an unknown data set, or languages that it does not have.
    """
    pair = {config.source, config.target}
    if config.name not in NAMES:
        raise DataError(f"data.name must be one of {', '.join(NAMES)}, got {config.name!r}")
    if len(pair) != 2:
        raise DataError(f"data.source and data.target must differ, both are {config.source!r}")
    if config.name == "multi30k":
        _require(config, pair <= _MULTI30K_SPLITS["train"], "two of cs, de, en, fr")
    elif config.name == "iwslt14":
        _require(config, pair == {"de", "en"}, "de and en")
    elif config.name in _WMT:
        others = _WMT[config.name][1]
        met = "en" in pair and pair - {"en"} <= others
        _require(config, met, f"en and one of {', '.join(sorted(others))}")
    elif config.name == "phrases":
        _require(config, pair <= set(phrases.LANGUAGES), f"two of {', '.join(phrases.LANGUAGES)}")
        return f"{config.source}-{config.target}-{config.size or phrases.TRAIN_PAIRS}"
    return "-".join(sorted(pair))


def corpus(config: DataConfig, folder: pathlib.Path, progress: Progress | None = None) -> Corpus:
    """The corpus that `config` names; downloads go to `folder`/downloads.

    Raises:
      DataError: keys, files or a network that cannot be used; the message names the remedy.
    """
    name = variant(config)
    if config.name == "phrases":
        return _phrases(config, name)
    languages = (min(config.source, config.target), max(config.source, config.target))
    if config.name in _WMT:
        return _wmt(config, name, languages)
    if config.name == "multi30k":
        paths = _multi30k_files(config, languages, folder, progress)
    else:
        paths = _local_files(config, languages)
    return Corpus(
        config.name,
        name,
        languages,
        config.train_split,
        fingerprint=f"{config.train_split} {lines.fingerprint(p for pair in paths.values() for p in pair)}",
        splits={split: _reader(pair) for split, pair in paths.items()},
    )


def has_raw_files(config: DataConfig) -> bool:
    """Whether the raw text is at hand, so that prepared data can be compared with it."""
    if config.name in ("multi30k", "parallel_text", "iwslt14"):
        return bool(config.raw_dir) and pathlib.Path(config.raw_dir).is_dir()
    return config.name == "phrases"


def _require(config: DataConfig, met: bool, wanted: str) -> None:
    if not met:
        raise DataError(
            f"data.source and data.target must be {wanted} for data.name = {config.name}, "
            f"got {config.source!r} and {config.target!r}"
        )


def _reader(paths: lines.Paths) -> Callable[[], Iterator[Record]]:
    return lambda: ((a, b, ()) for a, b in lines.read_pairs(paths))


def _raw_dir(config: DataConfig) -> pathlib.Path:
    folder = pathlib.Path(config.raw_dir)
    if not config.raw_dir:
        raise MissingFileError(f"data.name = {config.name} needs data.raw_dir, the folder of its raw files")
    if not folder.is_dir():
        raise MissingFileError(f"data.raw_dir = {config.raw_dir} is no folder")
    return folder


def _multi30k_files(
    config: DataConfig, languages: tuple[str, str], folder: pathlib.Path, progress: Progress | None
) -> dict[str, lines.Paths]:
    if config.raw_dir:
        raw = _raw_dir(config)
    else:
        raw = folder / "downloads" / "multi30k"
        wanted = [
            f"{split}.{language}.gz"
            for split, available in _MULTI30K_SPLITS.items()
            if available.issuperset(languages)
            for language in languages
        ]
        for done, file in enumerate(wanted):
            if progress:
                progress(f"download {file}", done, len(wanted))
            remedy = "put the raw .gz files in a folder and name it by data.raw_dir"
            download.fetch(f"{_MULTI30K_URL}/{file}", raw / file, _MULTI30K_SHA256.get(file), remedy)
        if progress:
            progress("download", len(wanted), len(wanted))
    found = {split: lines.find_pair(raw, split, languages) for split in _MULTI30K_SPLITS}
    _require_splits(raw, languages, found, ("train",))
    return {split: pair for split, pair in found.items() if pair}


def _local_files(config: DataConfig, languages: tuple[str, str]) -> dict[str, lines.Paths]:
    raw = _raw_dir(config)
    if config.name == "iwslt14":
        splits: tuple[str, ...] = ("train", "valid", "test")
    else:
        names = [p.name.removesuffix(".gz") for p in sorted(raw.iterdir()) if p.is_file()]
        suffixes = tuple(f".{language}" for language in languages)
        stems = dict.fromkeys(n.rsplit(".", 1)[0] for n in names if n.endswith(suffixes))
        splits = tuple(stem for stem in stems if _SPLIT.fullmatch(stem))
        for key in ("train_split", "dev_split", "test_split"):
            if (split := getattr(config, key)) in stems and split not in splits:
                raise DataError(
                    f"data.{key} = {split!r} cannot be the name of a split: rename {raw / split}.* to "
                    "letters, digits, _ and - alone, and not to `all`"
                )
    found = {split: lines.find_pair(raw, split, languages) for split in splits}
    _require_splits(raw, languages, found, splits or (config.train_split,))
    return {split: pair for split, pair in found.items() if pair}


def _require_splits(
    raw: pathlib.Path, languages: tuple[str, str], found: Mapping[str, Any], wanted: tuple[str, ...]
) -> None:
    for split in wanted:
        if not found.get(split):
            raise MissingFileError(f"{raw / f'{split}.{languages[0]}'} (or .gz) is missing")


def _phrases(config: DataConfig, name: str) -> Corpus:
    size = config.size or phrases.TRAIN_PAIRS

    def reader(split: str) -> Callable[[], Iterator[Record]]:
        return lambda: iter(phrases.generate(config.source, config.target, size)[split])

    return Corpus(
        config.name,
        name,
        (config.source, config.target),
        config.train_split,
        fingerprint=f"{config.train_split} grammar {phrases.GRAMMAR}",
        splits={split: reader(split) for split in phrases.SPLITS},
    )


def _wmt(config: DataConfig, name: str, languages: tuple[str, str]) -> Corpus:
    """One of the public TFDS sets, prepared by TFDS itself and then copied into our records.

    `data.raw_dir` may name a TFDS data folder; a set that lies there as array_record is read as it
    is, without network or TensorFlow.
    """
    public = f"{_WMT[config.name][0]}/{min(set(languages) - {'en'})}-en"

    def reader(split: str) -> Callable[[], Iterator[Record]]:
        def read() -> Iterator[Record]:
            for record in _public_builder(public, config.raw_dir).as_data_source(split):
                first, second = (clean_line(_text(record[language])) for language in languages)
                yield first, second, ()

        return read

    splits = ("train", "validation", "test")
    return Corpus(config.name, name, languages, config.train_split, "", {s: reader(s) for s in splits})


def _public_builder(public: str, raw_dir: str) -> Any:
    """The builder of a public translation set whose data are prepared as array_record."""
    tfds = importlib.import_module("tensorflow_datasets")
    importlib.import_module("tensorflow_datasets.translate")  # its names resolve only after this
    where = {"data_dir": raw_dir} if raw_dir else {}
    builder = tfds.builder(public, file_format="array_record", **where)
    if not builder.is_prepared():
        if importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                f"preparing {public} needs TensorFlow, once: pip install 'janus-jax[prepare]'; or name by "
                "data.raw_dir a TFDS data folder that holds it as array_record"
            )
        try:
            builder.download_and_prepare()
        except Exception as error:  # whatever of the network, the archives or TFDS fails
            raise DataError(f"TFDS could not download and prepare {public}: {error}") from error
    return builder


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else value
