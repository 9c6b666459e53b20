"""The demo as a user meets it, on an untrained model: training itself is tested in test_train."""

import dataclasses
import io
import json
import pathlib

import pytest
from rich.console import Console

from janus_jax import cli, demo
from janus_jax.config import ConfigError
from janus_jax.data import phrases
from janus_jax.demo import Refinement
from janus_jax.evaluate import Evaluation
from janus_jax.text import Vocabulary
from janus_jax.train import DONE, STOPPED

CONFIG = cli.load_config_file(pathlib.Path(__file__).resolve().parents[1] / "configs" / "demo.py")


@pytest.fixture
def shown(monkeypatch):
    """A console whose text can be read; few passes and sentences, since every way of decoding compiles."""
    monkeypatch.setattr(demo, "PASSES", (1, 2))
    monkeypatch.setattr(demo, "TRIED", 2)
    return Console(file=io.StringIO(), width=160)


def test_a_trained_run_is_decoded_shown_and_drawn(tiny_copy, shown, monkeypatch):
    trained = []
    monkeypatch.setattr(demo, "train", lambda *args: trained.append(args) or DONE)
    assert demo.demo(tiny_copy.config, tiny_copy.folder, shown) == 0
    assert trained == [(tiny_copy.config, tiny_copy.folder)]

    found = json.loads((tiny_copy.folder / "demo.json").read_text("utf-8"))
    assert list(found["modes"]) == ["AR, beam 2", "NAR, 1 pass", "NAR, 2 passes"]
    sources = (tiny_copy.raw / "test.de").read_text("utf-8").splitlines()
    references = (tiny_copy.raw / "test.en").read_text("utf-8").splitlines()
    assert [one["source"] for one in found["sentences"]] == sources[: demo.SENTENCES]
    assert [one["references"] for one in found["sentences"]] == [[r] for r in references[: demo.SENTENCES]]
    assert found["refinement"]["source"] in sources
    assert len(found["refinement"]["passes"]) == 2
    assert (tiny_copy.folder / "refinement.png").read_bytes().startswith(b"\x89PNG")

    text = shown.file.getvalue()
    for mode, result in found["modes"].items():
        row = next(line for line in text.splitlines() if line.strip().startswith(mode))
        scores, speed = result["scores"], result["speed"]
        expected = [100 * scores["exact_match"], scores["bleu"], scores["chrf"]]
        expected += [speed["sentences_per_s"], speed["compile_seconds"]]
        assert [float(cell) for cell in row.replace(mode, "").split()] == pytest.approx(expected, rel=0.01)
    for one in found["sentences"]:
        assert one["source"] in text
    assert found["refinement"]["output"] in text
    assert f"--workdir={tiny_copy.folder}" in text


def test_a_model_that_does_not_decode_both_ways_is_refused_before_training(tiny_run, shown, tmp_path):
    loss = dataclasses.replace(tiny_run.config.loss, objective="ar")
    with pytest.raises(ConfigError, match=r"loss.objective must be janus"):
        demo.demo(dataclasses.replace(tiny_run.config, loss=loss), tmp_path, shown)


def test_stopped_training_ends_the_demo(tiny_run, shown, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "train", lambda *_: STOPPED)
    assert demo.demo(tiny_run.config, tmp_path, shown) == STOPPED
    assert not list(tmp_path.iterdir())


def evaluation(hypotheses, references=None):
    sources = [f"s{i}" for i in range(len(hypotheses))]
    return Evaluation("", {}, sources, references or [("x",)] * len(hypotheses), hypotheses)


def test_sources_whose_output_changes():
    assert demo.unsettled(evaluation(["a", "b", "c"]), evaluation(["a", "x", "y"])) == ["s1", "s2"]
    assert demo.unsettled(evaluation(["a", "b"]), evaluation(["a", "b"])) == ["s0", "s1"]


def test_changes_of_a_refinement():
    passes = [["a", "b", "c"], ["a", "x", "y"], ["a", "x", "c"]]
    history = [{"tokens": p, "confidence": [1.0] * 3, "masked_before": [True] * 3} for p in passes]
    assert Refinement("", "", history).changes == 3
    assert Refinement("", "", history[:1]).changes == 0


def test_a_mode_is_right_with_any_wording(shown):
    modes = {
        "AR, beam 5": evaluation(["half past six"], [("six thirty", "half past six", "6:30")]),
        "NAR, 1 pass": evaluation(["half thirty six"], [("six thirty", "half past six", "6:30")]),
    }
    one = demo.example(modes, 0)
    assert [o["right"] for o in one["outputs"].values()] == [True, False]
    demo.print_sentences([one], shown)
    assert shown.file.getvalue().splitlines()[1:] == [
        "source          s0",
        "reference       six thirty   (and 2 other right wordings)",
        "AR, beam 5      half past six  ✓",
        "NAR, 1 pass     half thirty six  ✗",
    ]


def test_every_pair_of_the_demo_fits_its_batches():
    records = phrases.generate(
        CONFIG.data.source, CONFIG.data.target, CONFIG.data.size or phrases.TRAIN_PAIRS
    )
    text = (side for record in records["train"] for side in record[:2])
    vocabulary = Vocabulary.train(text, CONFIG.vocab, CONFIG.model.vocab_size, CONFIG.model.ids)
    sides = {side for split in records.values() for r in split for side in r[:2]}
    longest = max(sides, key=lambda side: len(vocabulary.encode(side)))
    assert len(vocabulary.encode(longest)) <= CONFIG.batch.buckets[-1], longest
    assert not any(CONFIG.model.ids.unk in vocabulary.encode(side) for side in sides)
