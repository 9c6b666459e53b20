"""Data sets: prepared without TensorFlow, once, whole or not at all; and every kind of bad input."""

import gzip
import importlib.util
import pathlib
import signal
import subprocess
import sys

import pytest

from janus_jax.config import DataConfig
from janus_jax.data import catalogue, download, phrases, sources
from janus_jax.data.lines import DataError, MissingFileError

DE = ["Ein Hund.", "Zwei  Katzen.", "", "Vier"]
EN = ["A dog.", "Two cats.", "Three.", "Four"]


def raw(folder, split="train", de=DE, en=EN, suffix=""):
    folder.mkdir(exist_ok=True)
    for language, text in (("de", de), ("en", en)):
        data = "".join(line + "\n" for line in text).encode()
        path = folder / f"{split}.{language}{suffix}"
        path.write_bytes(gzip.compress(data) if suffix else data)
    return folder


def config(folder, **changes):
    return DataConfig(**{"name": "parallel_text", "raw_dir": str(folder), **changes})


def test_parallel_text(tmp_path):
    raw(tmp_path / "raw")
    raw(tmp_path / "raw", "dev", suffix=".gz")
    cfg = config(tmp_path / "raw")
    told = []
    report = sources.prepare_dataset(cfg, tmp_path / "data", lambda *args: told.append(args))
    assert report.fresh
    assert report.splits["train"] == sources.SplitReport(pairs=3, dropped=1, empty=1)
    assert report.splits["dev"] == sources.SplitReport(pairs=4, dropped=0, empty=1)  # every line is scored
    assert ("write train", 3, 3) in told
    train = sources.open_split(cfg, tmp_path / "data", "train")
    assert list(train) == [("Ein Hund.", "A dog."), ("Zwei Katzen.", "Two cats."), ("Vier", "Four")]
    assert (len(train), train[1], train[-1]) == (3, ("Zwei Katzen.", "Two cats."), ("Vier", "Four"))
    assert train.references(0) == ("A dog.",)
    with pytest.raises(IndexError):
        train[3]
    assert sources.open_split(cfg, tmp_path / "data", "dev")[2] == ("", "Three.")
    # The other direction needs no second copy.
    back = config(tmp_path / "raw", source="en", target="de")
    assert not sources.prepare_dataset(back, tmp_path / "data").fresh
    assert sources.open_split(back, tmp_path / "data", "train")[0] == ("A dog.", "Ein Hund.")
    assert sources.open_split(back, tmp_path / "data", "train").identity != train.identity


def test_files_whose_name_cannot_be_that_of_a_split(tmp_path):
    for split in ("train", "all", "news.2016", "dev-1"):
        raw(tmp_path / "raw", split)
    report = sources.prepare_dataset(config(tmp_path / "raw"), tmp_path / "data")
    assert set(report.splits) == {"train", "dev-1"}
    assert len(sources.open_split(config(tmp_path / "raw"), tmp_path / "data", "dev-1")) == 4
    for split in ("all", "news.2016"):
        asked = config(tmp_path / "raw", test_split=split)
        with pytest.raises(DataError, match=f"data.test_split = '{split}' cannot be the name of a split"):
            sources.prepare_dataset(asked, tmp_path / "other")
    assert not (tmp_path / "other" / "parallel_text").exists()


def test_tensorflow_is_never_imported(tmp_path):
    raw(tmp_path / "raw")
    code = (
        "import sys, pathlib; from janus_jax.config import DataConfig; from janus_jax.data import sources\n"
        f"c = DataConfig(name='parallel_text', raw_dir={str(tmp_path / 'raw')!r})\n"
        f"d = pathlib.Path({str(tmp_path)!r})\n"
        "sources.prepare_dataset(c, d); print(list(sources.open_split(c, d, 'train'))[0])\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "('Ein Hund.', 'A dog.')\n"), done.stderr


def test_killed_half_way_leaves_nothing_that_looks_finished(tmp_path):
    raw(tmp_path / "raw")
    raw(tmp_path / "raw", "dev")
    code = (
        "import os, pathlib; from janus_jax.config import DataConfig; from janus_jax.data import sources\n"
        f"c = DataConfig(name='parallel_text', raw_dir={str(tmp_path / 'raw')!r})\n"
        f"sources.prepare_dataset(c, pathlib.Path({str(tmp_path / 'data')!r}),\n"
        "    lambda what, done, total: os.kill(os.getpid(), 9) if what == 'write train' else None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert any((tmp_path / "data").rglob("*incomplete*"))  # it was killed while it wrote
    cfg = config(tmp_path / "raw")
    with pytest.raises(DataError, match="run `janus-jax prepare` first"):
        sources.open_split(cfg, tmp_path / "data", "train")
    assert sources.prepare_dataset(cfg, tmp_path / "data").fresh
    assert len(sources.open_split(cfg, tmp_path / "data", "train")) == 3


def test_changed_raw_files_are_noticed_and_absent_ones_are_not_needed(tmp_path):
    cfg = config(raw(tmp_path / "raw"))
    sources.prepare_dataset(cfg, tmp_path / "data")
    with pytest.raises(DataError, match=r"other raw files or another data\.train_split"):
        sources.prepare_dataset(config(tmp_path / "raw", train_split="dev"), tmp_path / "data")
    raw(tmp_path / "raw", en=[*EN[:3], "Fore"])
    with pytest.raises(DataError, match=r"other raw files .* delete that folder"):
        sources.prepare_dataset(cfg, tmp_path / "data")
    assert not sources.prepare_dataset(config(tmp_path / "gone"), tmp_path / "data").fresh


def test_size_limits_the_training_split(tmp_path):
    cfg = config(raw(tmp_path / "raw"), size=2)
    raw(tmp_path / "raw", "dev")
    sources.prepare_dataset(cfg, tmp_path / "data")
    assert len(list(sources.open_split(cfg, tmp_path / "data", "train"))) == 2
    assert len(sources.open_split(cfg, tmp_path / "data", "dev")) == 4
    with pytest.raises(DataError, match=r"data.size = 9, but split 'train' has only 3 pairs"):
        sources.open_split(config(tmp_path / "raw", size=9), tmp_path / "data", "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, r"data\.raw_dir = .*raw is no folder"),
        (lambda f: f.mkdir(), r"train\.de \(or \.gz\) is missing"),
        (lambda f: (raw(f), (f / "train.en").unlink()), r"train\.en \(or \.gz\) is missing"),
        (lambda f: raw(f, en=EN[:2]), r"train\.de has 4, .*train\.en has 2"),
        (lambda f: (raw(f), (f / "train.de").write_bytes(b"a\nb\xff\n")), r"train\.de:2: not UTF-8"),
        (lambda f: raw(f, de=["a", "b", "c\0", "d"]), r"train\.de:3: NUL"),
        (lambda f: raw(f, de=[], en=[]), r"train\.de and .*train\.en are empty"),
        (lambda f: raw(f, de=["", "a"], en=["b", ""]), r"split 'train' of parallel_text has no pair"),
    ],
)
def test_bad_raw_data(tmp_path, make, message):
    make(tmp_path / "raw")
    with pytest.raises(DataError, match=message):
        sources.prepare_dataset(config(tmp_path / "raw"), tmp_path / "data")
    assert not (tmp_path / "data" / "parallel_text" / "de-en" / "1.0.0").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "multi40k"}, "data.name must be one of multi30k, "),
        ({"target": "de"}, "data.source and data.target must differ"),
        ({"name": "multi30k", "target": "ro"}, "must be two of cs, de, en, fr"),
        ({"name": "iwslt14", "source": "fr"}, "must be de and en"),
        ({"name": "wmt14", "source": "ro"}, "must be en and one of cs, de, fr, hi, ru"),
        ({"name": "wmt16", "target": "ro"}, "must be en and one of cs, de, fi, ro, ru, tr"),
        ({"name": "phrases", "source": "fr"}, "must be two of de, en, ro"),
        ({"raw_dir": ""}, "parallel_text needs data.raw_dir"),
    ],
)
def test_bad_keys(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        sources.prepare_dataset(config(tmp_path, **changes), tmp_path)


def test_unknown_split_lists_the_splits(tmp_path):
    cfg = config(raw(tmp_path / "raw"))
    sources.prepare_dataset(cfg, tmp_path)
    with pytest.raises(DataError, match="has no split 'val'; it has train"):
        sources.open_split(cfg, tmp_path, "val")


def test_damaged_metadata(tmp_path):
    cfg = config(raw(tmp_path / "raw"))
    path = sources.prepare_dataset(cfg, tmp_path).folder
    (path / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"is damaged .* delete that folder"):
        sources.open_split(cfg, tmp_path, "train")


def test_phrases_keep_all_references(tmp_path):
    cfg = DataConfig(name="phrases", source="en", target="de", size=40)
    report = sources.prepare_dataset(cfg, tmp_path)
    assert {k: v.pairs for k, v in report.splits.items()} == {"train": 40, "valid": 500, "test": 500}
    test = sources.open_split(cfg, tmp_path, "test")
    expected = phrases.generate("en", "de", 40)["test"]
    assert [(*test[i], test.references(i)) for i in range(20)] == list(expected[:20])
    assert not sources.prepare_dataset(cfg, tmp_path).fresh


def test_iwslt14_needs_its_three_splits(tmp_path):
    for split in ("train", "valid"):
        raw(tmp_path / "raw", split)
    cfg = config(tmp_path / "raw", name="iwslt14")
    with pytest.raises(MissingFileError, match=r"test\.de \(or \.gz\) is missing"):
        sources.prepare_dataset(cfg, tmp_path / "data")
    raw(tmp_path / "raw", "test")
    assert list(sources.prepare_dataset(cfg, tmp_path / "data").splits) == ["train", "valid", "test"]


def test_multi30k_from_a_local_folder_has_the_splits_that_are_there(tmp_path):
    raw(tmp_path / "raw", suffix=".gz")
    raw(tmp_path / "raw", "test_2018_flickr", suffix=".gz")
    cfg = config(tmp_path / "raw", name="multi30k")
    assert list(sources.prepare_dataset(cfg, tmp_path / "data").splits) == ["train", "test_2018_flickr"]


def test_multi30k_is_downloaded_and_checked(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    for split in catalogue._MULTI30K_SPLITS:
        raw(origin, split, suffix=".gz")
    monkeypatch.setattr(catalogue, "_MULTI30K_URL", origin.as_uri())
    cfg = DataConfig(name="multi30k")
    with pytest.raises(download.DownloadError, match=r"train\.de\.gz has sha256 .* name it by data\.raw_dir"):
        sources.prepare_dataset(cfg, tmp_path / "data")
    monkeypatch.setattr(catalogue, "_MULTI30K_SHA256", {})
    assert list(sources.prepare_dataset(cfg, tmp_path / "data").splits) == list(catalogue._MULTI30K_SPLITS)
    monkeypatch.setattr(catalogue, "_MULTI30K_URL", (tmp_path / "gone").as_uri())
    assert not sources.prepare_dataset(cfg, tmp_path / "data").fresh  # prepared: no network needed
    with pytest.raises(download.DownloadError, match=r"cannot download .* name it by data\.raw_dir"):
        sources.prepare_dataset(cfg, tmp_path / "elsewhere")


def test_the_pinned_hashes_are_those_of_the_real_files(corpora):
    folder = corpora / "multi30k"
    assert {p.name for p in folder.glob("*.gz")} == set(catalogue._MULTI30K_SHA256)
    for name, expected in catalogue._MULTI30K_SHA256.items():
        assert catalogue.lines.sha256(folder / name) == expected


# -- the public sets: their preparation needs TensorFlow and the network, so TFDS is stood in for -----


class PublicSet:
    """What is used of a TFDS builder of a translation set."""

    def __init__(self, prepared, error=None):
        self.prepared, self.error = prepared, error

    def is_prepared(self):
        return self.prepared

    def download_and_prepare(self):
        if self.error:
            raise self.error
        self.prepared = True

    def as_data_source(self, split):
        assert self.prepared
        return [{"de": f"{split} eins ".encode(), "en": b"one"}, {"de": "zwei", "en": "two"}]


def without_tensorflow(monkeypatch, present=False):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: present or None if name == "tensorflow" else real(name, *a),
    )


def test_wmt_without_tensorflow_names_the_remedy(tmp_path, monkeypatch):
    # The real catalogue of TFDS resolves the name; the set is not prepared in this empty folder.
    without_tensorflow(monkeypatch)
    for name, source, public in (
        ("wmt14", "de", "wmt14_translate/de-en"),
        ("wmt16", "ro", "wmt16_translate/ro-en"),
    ):
        cfg = DataConfig(name=name, source=source, target="en", raw_dir=str(tmp_path))
        with pytest.raises(DataError, match=rf"preparing {public} needs TensorFlow.*janus-jax\[prepare\]"):
            sources.prepare_dataset(cfg, tmp_path / "data")


@pytest.mark.parametrize("prepared", [True, False])
def test_wmt_is_copied_into_our_records(tmp_path, monkeypatch, prepared):
    tfds = importlib.import_module("tensorflow_datasets")
    asked = []

    def builder(name, **kwargs):
        asked.append((name, kwargs))
        return public

    public = PublicSet(prepared)
    monkeypatch.setattr(tfds, "builder", builder)
    without_tensorflow(monkeypatch, present=not prepared)
    cfg = DataConfig(name="wmt14", source="en", target="de", raw_dir="somewhere")
    report = sources.prepare_dataset(cfg, tmp_path)
    assert asked[0] == ("wmt14_translate/de-en", {"file_format": "array_record", "data_dir": "somewhere"})
    assert {k: v.pairs for k, v in report.splits.items()} == {"train": 2, "validation": 2, "test": 2}
    monkeypatch.undo()  # from here on the public set is not needed
    assert sources.open_split(cfg, tmp_path, "validation")[0] == ("one", "validation eins")
    assert not sources.prepare_dataset(cfg, tmp_path).fresh


def test_wmt_failure_of_tfds_is_one_clear_error(tmp_path, monkeypatch):
    tfds = importlib.import_module("tensorflow_datasets")
    monkeypatch.setattr(tfds, "builder", lambda *a, **k: PublicSet(False, OSError("no route to host")))
    without_tensorflow(monkeypatch, present=True)
    with pytest.raises(
        DataError, match=r"could not download and prepare wmt14_translate/de-en: no route to host"
    ):
        sources.prepare_dataset(DataConfig(name="wmt14"), tmp_path)
    assert not pathlib.Path(tmp_path, "wmt14", "de-en", "1.0.0").exists()
