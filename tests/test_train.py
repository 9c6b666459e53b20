"""Training as a user meets it: it resumes bit for bit, stops when told, and says what went wrong."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from janus_jax import checkpoint, prepare, report, run, train
from janus_jax.config import Config, from_dict
from janus_jax.text import VocabularyError

STEPS = 12


def tiny(**changes) -> Config:
    values = {
        "data": {
            "name": "phrases",
            "source": "en",
            "target": "de",
            "dev_split": "valid",
            "test_split": "test",
            "size": 400,
        },
        "batch": {"buckets": [40], "tokens": 240, "workers": 1, "prefetch": 2},
        "model": {
            "vocab_size": 400,
            "dim": 16,
            "ffn": 32,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "max_positions": 48,
            "dropout": 0.1,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 4},
        "train": {
            "steps": STEPS,
            "log_every": 1,
            "eval_every": 6,
            "checkpoint_every": 3,
            "dev_sentences": 4,
            "dev_iterations": 2,
            "tensorboard": False,
        },
        "mesh": {"data": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return from_dict(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> pathlib.Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.train(tiny(data__dir=str(data)), folder) == train.DONE
    return folder


def rows(folder: pathlib.Path) -> list[dict]:
    return report.comparable(report.read_metrics(folder))


def test_a_run_leaves_a_complete_directory(finished):
    names = {p.name for p in finished.iterdir()}
    assert {
        "config.json",
        "versions.json",
        "vocab.model",
        "vocab.json",
        "metrics.jsonl",
        "training.png",
    } <= names
    assert checkpoint.list_steps(finished / "checkpoints") == [3, 6, 9, 12]
    train_rows = [r for r in rows(finished) if r["kind"] == "train"]
    assert [r["step"] for r in train_rows] == list(range(1, STEPS + 1))
    terms = {
        "ar",
        "nar",
        "aux",
        "length",
        "kl_nar_aux",
        "kl_ar_aux",
        "kl_ar_nar",
        "nll_ar",
        "grad_norm",
        "lr",
    }
    assert terms <= set(train_rows[0]["metrics"])
    dev = [r["metrics"] for r in rows(finished) if r["kind"] == "dev"]
    assert len(dev) == 2
    assert {"loss", "bleu_ar", "bleu_nar", "bleu"} <= set(dev[0])
    assert dev[1]["loss"] < dev[0]["loss"]


def test_a_finished_run_is_left_alone(finished, data, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train.train(tiny(data__dir=str(data)), finished) == train.DONE
    assert "already trained" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_keeps_what_it_was_trained_with(finished, data):
    before = (finished / "config.json").read_bytes(), (finished / "versions.json").read_bytes()
    assert train.train(tiny(data__dir=str(data), train__eval_every=7), finished) == train.DONE
    assert ((finished / "config.json").read_bytes(), (finished / "versions.json").read_bytes()) == before


def test_other_training_data_are_refused(finished, data, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    bound = folder / "checkpoints" / run.BOUND_DATA
    assert len(bound.read_text().strip()) == 64
    bound.write_text("0" * 64 + "\n")  # as if these had been made with others
    with pytest.raises(run.RunError, match="made with other training data"):
        train.train(tiny(data__dir=str(data), train__steps=STEPS + 1), folder)


def test_a_finished_run_goes_on_when_more_is_asked_for(finished, data, tmp_path):
    assert train.train(tiny(data__dir=str(data), train__steps=STEPS // 2), tmp_path) == train.DONE
    assert train.train(tiny(data__dir=str(data)), tmp_path) == train.DONE
    assert rows(tmp_path) == rows(finished)


QUICK = {"train__dev_sentences": -1, "train__best": "loss"}
STILL = {"optim__lr": 0.0, "optim__init_lr": 0.0, **QUICK}  # updates that leave the parameters as they are


def trees_equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("chosen", ["best", "average:2"])
def test_a_run_starts_from_the_parameters_of_another(finished, data, tmp_path, chosen, capsys):
    config = tiny(
        data__dir=str(data), init__run=str(finished), init__checkpoint=chosen, train__steps=2, seed=7, **STILL
    )
    assert train.train(config, tmp_path) == train.DONE
    wanted, what = run.open_run(finished).params(chosen)
    opened = run.open_run(tmp_path)
    found, _ = opened.params("latest")
    assert trees_equal(found, wanted)
    assert opened.vocabulary().sha256 == run.open_run(finished).vocabulary().sha256
    assert f"starting from {finished}, {what}" in " ".join(capsys.readouterr().out.split())
    (started,) = [r for r in report.read_metrics(tmp_path) if r["kind"] == "event"]
    assert started["metrics"]["init"] == f"{finished}, {what}"


def test_a_start_below_home(finished, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    config = tiny(data__dir=str(data), init__run=f"~/{finished.name}", train__steps=1, **STILL)
    assert prepare.prepare(config, tmp_path).vocabulary.sha256 == run.open_run(finished).vocabulary().sha256
    (finished / "vocab.json").rename(finished / "kept")
    try:
        with pytest.raises(VocabularyError, match=r"init\.run = .* has no vocab\.model and vocab\.json"):
            prepare.prepare(config, tmp_path / "other")
    finally:
        (finished / "kept").rename(finished / "vocab.json")


def test_an_exponential_average_starts_from_them_too(finished, data, tmp_path):
    config = tiny(data__dir=str(data), init__run=str(finished), train__steps=1, optim__ema=0.5, **STILL)
    assert train.train(config, tmp_path / "averaged") == train.DONE
    wanted, _ = run.open_run(finished).params()
    assert trees_equal(run.open_run(tmp_path / "averaged").params()[0], wanted)
    # of a run that keeps an average, that is what is taken, as decoding does
    later = checkpoint.restore_params(tmp_path / "averaged" / "checkpoints", part="ema")
    config = tiny(data__dir=str(data), init__run=str(tmp_path / "averaged"), train__steps=1, **STILL)
    assert train.train(config, tmp_path / "next") == train.DONE
    assert trees_equal(run.open_run(tmp_path / "next").params()[0], later)


def test_a_run_goes_on_without_the_one_that_it_started_from(finished, data, tmp_path):
    origin = shutil.copytree(finished, tmp_path / "origin")
    config = {"data__dir": str(data), "init__run": str(origin), **QUICK}
    assert train.train(tiny(**config, train__steps=2), tmp_path / "whole") == train.DONE
    assert train.train(tiny(**config, train__steps=1), tmp_path / "cut") == train.DONE
    shutil.rmtree(origin)
    assert train.train(tiny(**config, train__steps=2), tmp_path / "cut") == train.DONE
    a, b = (run.open_run(tmp_path / name).params("latest")[0] for name in ("whole", "cut"))
    assert trees_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init__run": "nowhere"}, "init.run: nowhere is not a run directory"),
        ({"model__heads": 4, "model__norm": "pre"}, "model.heads: 2 there, 4 here\n  model.norm:"),
        ({"model__vocab_size": 300}, "model.vocab_size: 400 there, 300 here"),
        ({"vocab__kind": "bpe"}, "start from another init.run"),
        ({"init__checkpoint": "99"}, "no checkpoint of step 99"),
        ({"init__checkpoint": "average:9"}, "cannot average the last 9"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(finished, data, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train.train(tiny(**{"data__dir": str(data), "init__run": str(finished)} | changes), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    if "vocab__kind" not in changes:  # the others are told before anything is made
        assert not (tmp_path / "run" / "config.json").exists()


def test_a_start_with_the_vocabulary_of_another_is_refused(finished, data, tmp_path):
    """Prepared, and then the origin was made anew."""
    origin = shutil.copytree(finished, tmp_path / "origin")
    config = tiny(data__dir=str(data), init__run=str(origin))
    run.claim(tmp_path / "run", config)
    prepare.prepare(config, tmp_path / "run")
    other = tiny(data__dir=str(tmp_path / "data"), data__size=300)
    prepare.prepare(other, tmp_path / "other")
    for name in ("vocab.model", "vocab.json"):
        shutil.copy(tmp_path / "other" / name, origin / name)
    (origin / "checkpoints" / run.BOUND).unlink()
    with pytest.raises(run.RunError, match=r"prepared with another vocabulary than that of init\.run"):
        train.train(config, tmp_path / "run")


def test_sigterm_saves_and_the_next_start_goes_on_bit_for_bit(finished, data, tmp_path):
    def stop_after_two_rows() -> None:
        while not (tmp_path / "metrics.jsonl").exists() or len(report.read_metrics(tmp_path)) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_two_rows)
    watcher.start()
    config = tiny(data__dir=str(data))
    assert train.train(config, tmp_path) == train.STOPPED
    watcher.join()
    stopped_at = checkpoint.find_step(tmp_path / "checkpoints")
    assert 2 <= stopped_at < STEPS
    assert train.train(config, tmp_path) == train.DONE
    assert rows(tmp_path) == rows(finished)


def test_stopped_before_there_is_anything_to_draw(data, tmp_path, monkeypatch, capsys):
    def stop_at_once(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)

    config = tiny(data__dir=str(data), train__log_every=1000, train__eval_every=1000)
    monkeypatch.setattr(train._Training, "_read", stop_at_once)
    assert train.train(config, tmp_path) == train.STOPPED
    assert "no training curves: nothing to draw in" in capsys.readouterr().err


def test_kill_9_and_the_next_start_goes_on_bit_for_bit(finished, data, tmp_path):
    config = tiny(data__dir=str(data))
    (tmp_path / "wanted.json").write_text(json.dumps(config.to_dict()))
    script = (
        "import json, pathlib, sys\n"
        "from janus_jax import train\n"
        "from janus_jax.config import from_dict\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "train.train(from_dict(json.loads((folder / 'wanted.json').read_text())), folder)\n"
    )
    kill_at = int(np.random.default_rng(20221).integers(4, STEPS))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and f'"step": {kill_at}, "kind": "train"' in metrics.read_text()
    ):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert train.train(config, tmp_path) == train.DONE
    assert rows(tmp_path) == rows(finished)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_exploding_update_is_named(policy, data, tmp_path):
    config = tiny(
        data__dir=str(data),
        train__nonfinite=policy,
        train__max_grad_norm=1e-9,
        train__max_skipped=3,
        train__steps=6,
    )
    with pytest.raises(train.TrainingError) as error:
        train.train(config, tmp_path)
    message = str(error.value)
    step = 1 if policy == "stop" else 3
    assert f"update {step} was not applied" in message
    assert "training examples" in message
    assert "optim.lr" in message
    skipped = [r for r in report.read_metrics(tmp_path) if r["metrics"].get("event") == "skipped"]
    assert [r["step"] for r in skipped] == list(range(1, step + 1))


def test_two_processes_cannot_share_a_workdir(data, tmp_path):
    with run.locked(tmp_path), pytest.raises(run.RunError, match="in use"):
        train.train(tiny(data__dir=str(data)), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_another_configuration_is_refused_before_anything_is_written(finished, data):
    before = sorted(p.name for p in finished.iterdir())
    with pytest.raises(run.RunError, match=r"model\.dim: 16 there, 32 asked for"):
        train.train(tiny(data__dir=str(data), model__dim=32), finished)
    assert sorted(p.name for p in finished.iterdir()) == before
