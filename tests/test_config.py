import json
import os
import pathlib

import ml_collections
import pytest

from janus_jax import cli, config
from janus_jax.config import Config, ConfigError, from_dict

ROOT = pathlib.Path(__file__).resolve().parents[1]
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"
FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_snapshot(path):
    """Every value of every experiment, so that a reviewer sees what a change of a file or a default does.

    `UPDATE_SNAPSHOTS=1 pytest tests/test_config.py` writes them anew.
    """
    found = cli.load_config_file(path)
    flat = {key: config.get(found, key) for key in config.key_names()}
    text = json.dumps(flat, indent=2, ensure_ascii=False) + "\n"
    snapshot = SNAPSHOTS / f"{path.stem}.json"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        snapshot.write_text(text, encoding="utf-8")
    assert snapshot.is_file(), f"no {snapshot}; see the docstring"
    assert json.loads(snapshot.read_text(encoding="utf-8")) == json.loads(text)


def test_no_snapshot_without_its_configuration():
    assert {p.stem for p in SNAPSHOTS.glob("*.json")} == {p.stem for p in FILES}


def test_round_trips():
    made = from_dict({"seed": 3, "batch": {"buckets": [8, 16]}, "model": {"dropout": 0}})
    assert made.batch.buckets == (8, 16)
    assert made.model.dropout == 0.0
    assert type(made.model.dropout) is float
    assert from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert config.from_config_dict(config.to_config_dict(made)) == made
    assert hash(made) == hash(from_dict(made.to_dict()))


def test_keys():
    names = config.key_names()
    assert {"seed", "data.name", "model.ids.mask", "decode.tokens"} <= set(names)
    assert len(names) == len(set(names))
    assert config.get(Config(), "model.ids.mask") == 4


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.dmi", "model.dim"),
        ("model.vocabsize", "model.vocab_size"),
        ("batch.dropout", "model.dropout"),
        ("lr", "optim.lr"),
        ("optimiser", "optim"),
        ("zzzzqqqq", None),
    ],
)
def test_nearest_key(typed, meant):
    assert config.nearest_key(typed) == meant


def test_differences():
    other = from_dict({"seed": 1, "model": {"dim": 64}})
    assert config.differences(Config(), other) == {"seed": (0, 1), "model.dim": (256, 64)}
    assert config.differences(Config(), Config()) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"unknown key 'modle'; did you mean 'model'\?"),
        ({"model": {"dmi": 1}}, r"unknown key 'model.dmi'; did you mean 'model.dim'\?"),
        ({"batch": {"order": "left"}}, "batch.order must be one of sentence, random, got 'left'"),
        ({"model": 3}, "model is a section, not a value: got 3"),
        ({"model": {"dim": "8"}}, r"model.dim must be int, got '8' \(str\)"),
        ({"model": {"dim": True}}, "model.dim must be int, got True"),
        ({"model": {"dropout": "x"}}, "model.dropout must be float"),
        ({"batch": {"buckets": [8, 9.5]}}, r"batch.buckets must be tuple\[int, ...\]"),
        (
            {"loss": dict.fromkeys(("ar", "nar", "kl_ar_aux", "kl_nar_aux", "kl_ar_nar"), 0.0)},
            "needs a weight that teaches AR or NAR",
        ),
        ({"init": {"checkpoint": "9x"}}, "init.checkpoint must be best, latest, a step or average:N"),
        ({"loss": {"objective": "mlm"}}, "loss.objective must be one of janus, ar, cmlm, rdrop, got 'mlm'"),
        ({"model": {"dim": 10, "heads": 4}}, r"model.heads \(4\) must divide model.dim \(10\)"),
        ({"model": {"dropout": 1.0}}, r"model.dropout must lie in \[0, 1\), got 1.0"),
        ({"optim": {"lr": float("nan")}}, "optim.lr must be at least 0, got nan"),
        ({"batch": {"buckets": [16, 8]}}, "batch.buckets must be increasing lengths"),
        ({"batch": {"buckets": []}}, "batch.buckets must be increasing lengths"),
        ({"batch": {"tokens": 10}}, r"batch.tokens \(10\) must hold a row of the largest bucket \(64\)"),
        ({"batch": {"buckets": [300]}}, r"model.max_positions \(256\) must be at least"),
        ({"batch": {"mask_rate": 0.0}}, r"batch.mask_rate must lie in \(0, 1\]"),
        ({"batch": {"span_mean": 0.0}}, r"batch.span_mean must lie in \(0, 100\], got 0.0"),
        ({"batch": {"span_mean": 5000.0}}, r"batch.span_mean must lie in \(0, 100\]"),
        ({"optim": {"eps": 0.0}}, "optim.eps must be above 0, got 0.0"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
        ({"decode": {"iterations": 10**9}}, "decode.iterations must be at most 1000, got 1000000000"),
        ({"decode": {"beam": 1001, "draft_block": 1001}}, r"(?s)decode.beam must .*decode.draft_block must"),
        ({"decode": {"length_penalty": -100.0}}, r"decode.length_penalty must lie in \[-10, 10\], got -100"),
        ({"loss": {"objective": "ar"}, "model": {"max_length": -5}}, "model.max_length must be at least 2"),
        (
            {"loss": {"ar": 0.0, "nar": 0.0, "kl_nar_aux": 0.0, "kl_ar_nar": 0.0, "kl_learners": "nar_aux"}},
            r"needs a weight that teaches AR or NAR: .* \(loss.kl_learners = nar_aux\)",
        ),
        ({"mesh": {"data": 0}}, "mesh.data must be -1"),
        ({"mesh": {"fsdp": 0}}, "mesh.fsdp must be at least 1, got 0"),
        ({"mesh": {"tensor": 3}}, r"mesh.tensor \(3\) must divide model.heads \(4\)"),
        (
            {"mesh": {"tensor": 4}, "model": {"vocab_size": 4002}},
            r"mesh.tensor \(4\) must divide model.vocab_size",
        ),
        ({"mesh": {"fsdp": 3}}, r"mesh.fsdp \(3\) must divide model.dim \(256\)"),
        ({"train": {"microbatches": -1}}, "train.microbatches must be at least 0, got -1"),
        ({"model": {"vocab_size": 4}}, r"model.ids.mask \(4\) must lie inside model.vocab_size \(4\)"),
        ({"model": {"ids": {"eos": 1}}}, "model.ids must differ from each other"),
        ({"model": {"ids": {"start": 3}}}, r"model.ids.start \(3\) must be bos \(1\) or eos \(2\)"),
        ({"model": {"ar_stream": "content"}}, "loss.objective = janus needs model.ar_stream = query"),
        ({"decode": {"max_length_a": float("inf")}}, "decode.max_length_a must be a finite number, got inf"),
        (
            {"decode": {"length_penalty": float("nan")}},
            "decode.length_penalty must be a finite number, got nan",
        ),
        ({"decode": {"length_penalty": float("-inf")}}, "decode.length_penalty must be a finite number"),
        ({"train": {"dev_sentences": -1}}, "train.best = bleu needs dev BLEU"),
        ({"model": {"max_length": 50}}, r"model.max_length \(50\) must be at least"),
    ],
)
def test_unusable_configurations(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_all_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        from_dict({"seeed": 1, "model": {"dim": "x"}, "train": {"steps": None}})
    assert len(str(caught.value).splitlines()) == 4


def test_mask_may_be_unk():
    assert from_dict({"model": {"ids": {"mask": 3}}}).model.ids.mask == 3


def test_config_dict_is_open_to_experiments():
    values = config.to_config_dict()
    assert isinstance(values, ml_collections.ConfigDict)
    values.model.dim = 512
    assert config.from_config_dict(values).model.dim == 512


@pytest.mark.parametrize(
    ("given", "shares", "parts"), [(3, 1, 3), (0, 1, 4), (0, 2, 2), (0, 3, 2), (0, 4, 1), (0, 512, 1)]
)
def test_micro_batches_make_up_for_missing_devices(given, shares, parts):
    """The global batch of 4096 slots stays, whatever the devices; none holds more than 1024 at a time."""
    made = from_dict({"batch": {"tokens": 4096, "device_tokens": 1024}, "train": {"microbatches": given}})
    assert config.microbatches(made, shares) == parts
