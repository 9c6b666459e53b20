"""One small run laid out in several ways, and what it means that two of them learn the same."""

import dataclasses
import pathlib

import pytest

from janus_jax import report
from janus_jax.config import Config, MeshConfig, from_dict

STEPS, HALF = 10, 5
HEARTBEAT = 10
LIMIT = 240  # seconds after which a test gives up on its processes
LAYOUTS = {
    "one device": MeshConfig(data=1),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "cube": MeshConfig(fsdp=2, tensor=2),
}


def config_of(layout: MeshConfig, data: pathlib.Path) -> Config:
    values = {
        "data": {
            "name": "phrases",
            "source": "en",
            "target": "de",
            "dev_split": "valid",
            "test_split": "test",
            "size": 400,
            "dir": str(data),
        },
        "batch": {"buckets": [40], "tokens": 1000, "workers": 1, "prefetch": 2},  # 25 rows: fillers for 8
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
        # A large eps: with the usual one Adam makes a full step of rounding noise where a gradient is zero.
        "optim": {"lr": 3e-3, "warmup_steps": 4, "eps": 1e-4},
        "loss": {"chunk": 16},
        "train": {
            "steps": STEPS,
            "log_every": 1,
            "eval_every": STEPS,
            "checkpoint_every": HALF,
            "dev_sentences": -1,
            "best": "loss",
            "tensorboard": False,
        },
        "decode": {"beam": 2, "iterations": 2, "max_length_a": 1.0, "max_length_b": 2},
        "mesh": dataclasses.asdict(layout) | {"heartbeat_timeout": HEARTBEAT, "startup_timeout": LIMIT},
    }
    return from_dict(values)


def curve(folder: pathlib.Path) -> list[dict]:
    """The metrics of every update, each exactly once."""
    rows = [row for row in report.read_metrics(folder) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["metrics"] for row in rows]


def assert_same_curve(found: pathlib.Path, expected: pathlib.Path) -> None:
    """The same batches and masks to the last bit, the same losses to float tolerance."""
    for step, (ours, theirs) in enumerate(zip(curve(found), curve(expected), strict=True), start=1):
        assert ours.keys() == theirs.keys()
        for name in ("tokens", "masked", "lr"):
            assert ours[name] == theirs[name], (step, name)
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (step, name)
    dev, other = (
        [row["metrics"] for row in report.read_metrics(f) if row["kind"] == "dev"][-1]
        for f in (found, expected)
    )
    assert dev["loss"] == pytest.approx(other["loss"], rel=1e-4)
