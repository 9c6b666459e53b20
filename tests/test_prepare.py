"""`prepare` as a whole, on small files: everything is made, then nothing is left to do."""

import concurrent.futures
import dataclasses
import io
import pathlib
import random
import threading

import numpy as np
import pytest
from rich.console import Console

from janus_jax.config import Config, DataConfig, ModelConfig, SpecialIds, VocabConfig
from janus_jax.data.lines import DataError
from janus_jax.prepare import alone, data_folder, load_split, prepare
from janus_jax.text import MODEL_FILE, Vocabulary, VocabularyError

WORDS = [
    ("Hund", "dog"), ("Katze", "cat"), ("Wiese", "meadow"), ("Morgen", "morning"), ("rennt", "runs"),
    ("schläft", "sleeps"), ("grün", "green"), ("schnell", "quickly"), ("heute", "today"), ("über", "over"),
]  # fmt: skip


@pytest.fixture
def config(tmp_path):
    rng = random.Random(0)
    folder = tmp_path / "raw"
    folder.mkdir()
    for split, count in (("train", 120), ("val", 10), ("test", 10)):
        drawn = [rng.choices(WORDS, k=rng.randint(2, 8)) for _ in range(count)]
        drawn += [rng.choices(WORDS, k=90)] if split == "train" else []  # longer than the last bucket
        for side, language in enumerate(("de", "en")):
            text = "".join(" ".join(pair[side] for pair in line) + "\n" for line in drawn)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")
    data = DataConfig(name="parallel_text", raw_dir=str(folder), test_split="test")
    return Config(data=data, model=ModelConfig(vocab_size=310))


def run(config, workdir):
    out = io.StringIO()
    return prepare(config, workdir, Console(file=out, width=120)), out.getvalue()


def test_prepare_twice(config, tmp_path):
    workdir = tmp_path / "run"
    prepared, said = run(config, workdir)
    assert prepared.fresh == ("data set", "vocabulary", "encoded train", "encoded val", "encoded test")
    assert len(prepared.vocabulary) == 310
    assert {k: len(v) for k, v in prepared.splits.items()} == {"train": 121, "val": 10, "test": 10}
    assert "over-long training pairs, not trained on: 1" in said
    assert prepared.vocabulary.sha256[:16] in said
    assert "made: data set, vocabulary, encoded train" in said
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}

    again, said = run(config, workdir)
    assert again.fresh == ()
    assert "nothing to do" in said
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    assert Vocabulary.load(workdir).sha256 == prepared.vocabulary.sha256
    read, made = load_split(config, workdir, again.vocabulary, "val"), prepared.splits["val"]
    rows = np.arange(len(made))
    longest = int(made.target_lengths.max())
    np.testing.assert_array_equal(read.padded("target", rows, longest), made.padded("target", rows, longest))


def test_data_may_lie_elsewhere(config, tmp_path):
    elsewhere = dataclasses.replace(
        config, data=dataclasses.replace(config.data, dir=str(tmp_path / "shared"))
    )
    assert data_folder(config, tmp_path / "run") == tmp_path / "run" / "data"
    run(elsewhere, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["vocab.json", "vocab.model"]
    assert run(elsewhere, tmp_path / "second")[0].fresh == (
        "vocabulary",
    )  # the encoded splits are shared too


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"vocab_size": 300}, r"model\.vocab_size is 300 now, was 310"),
        ("model", {"ids": SpecialIds(start=2)}, r"model\.ids is .*start=2"),
        ("vocab", {"kind": "bpe"}, r"vocab is .*kind='bpe'"),
        ("vocab", {"byte_fallback": False}, r"vocab is .*byte_fallback=False"),
    ],
)
def test_a_vocabulary_with_other_settings_is_refused(config, tmp_path, section, changes, message):
    run(config, tmp_path)
    other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    with pytest.raises(VocabularyError, match=message):
        run(other, tmp_path)


def test_a_vocabulary_that_was_half_written_is_made_again(config, tmp_path):
    sha256 = run(config, tmp_path)[0].vocabulary.sha256
    (tmp_path / "vocab.json").unlink()
    assert run(config, tmp_path)[0].fresh == ("vocabulary",)
    (tmp_path / MODEL_FILE).write_bytes(b"other")
    with pytest.raises(VocabularyError, match="is not the vocabulary"):
        run(config, tmp_path)
    (tmp_path / "vocab.json").unlink()
    assert run(config, tmp_path)[0].vocabulary.sha256 == sha256


def test_a_split_that_is_not_there_fails_before_a_vocabulary_is_trained(config, tmp_path):
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, dev_split="dev"))
    with pytest.raises(DataError, match="has no split 'dev'; it has test, train, val"):
        run(wrong, tmp_path / "run")
    assert not (tmp_path / "run" / MODEL_FILE).exists()


def test_a_dev_set_that_fits_no_bucket_is_refused_at_once(config, tmp_path):
    folder = pathlib.Path(config.data.raw_dir)
    for language, word in (("de", "Hund"), ("en", "dog")):
        (folder / f"val.{language}").write_text(f"{' '.join([word] * 90)}\n" * 10, encoding="utf-8")
    with pytest.raises(DataError, match=r"data.dev_split 'val': none of its 10 pairs .*batch.buckets \(64\)"):
        run(config, tmp_path / "run")


def test_data_are_made_by_one_process_at_a_time(tmp_path):
    entered = threading.Event()

    def second():
        with alone(tmp_path):
            entered.set()

    waiting = threading.Thread(target=second)
    with alone(tmp_path):
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join(timeout=30)
    assert entered.is_set()


def test_two_runs_prepare_the_same_folder_at_the_same_time(config, tmp_path):
    shared = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(tmp_path / "shared")))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: run(shared, tmp_path / name)[0], ("w1", "w2")))
    assert found[0].vocabulary.sha256 == found[1].vocabulary.sha256
    assert sorted(one.dataset.fresh for one in found) == [False, True]


def test_too_large_a_vocabulary(config, tmp_path):
    large = dataclasses.replace(config, model=ModelConfig(vocab_size=4000), vocab=VocabConfig())
    with pytest.raises(VocabularyError, match="largest possible is"):
        run(large, tmp_path / "run")
