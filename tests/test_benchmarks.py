"""Benchmarks run and say what they should; what they measure is nobody's business here."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import common, curve, forced, growth, peers, sentence
from janus_jax import ways
from janus_jax.config import ModelConfig
from janus_jax.convert import load_bart

TINY = peers.Size(dim=16, ffn=32, heads=2, layers=1, vocabulary=60)

# Answers as the peers' server does, in Python alone: writes the symbol 7, and takes a millisecond.
FAKE = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "load":
        systems = {"PyTorch float32, greedy": {"engine": "PyTorch", "precision": "float32", "beam": 1}}
        answer = {"systems": systems, "absent": {"CTranslate2 int8": "not here"}, "versions": {"torch": "0"}}
    elif asked["do"] == "run":
        tokens = [[7] * asked["length"]] * len(asked["source"])
        answer = {"seconds": [0.001] * asked["calls"], "tokens": tokens}
    else:
        break
    print(json.dumps(answer), flush=True)
"""


def test_rounds_go_over_all_systems_each_from_another_one_on():
    called = []
    systems = {name: (lambda name=name: called.append(name) or len(called)) for name in "abc"}
    found = common.interleaved(systems, 3)
    assert "".join(called) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_speed_up_is_taken_within_rounds():
    assert common.speed_up([1.0, 20.0, 3.0], [0.5, 10.0, 1.0]) == (2.0, 2.0, 3.0)


def test_exponent_is_that_of_the_upper_half():
    sizes = (1, 2, 4, 8, 16, 32)
    assert common.exponent(sizes, [7, 7, 7, 64, 256, 1024]) == pytest.approx(2.0)
    assert math.isnan(common.exponent((1,), [1.0]))
    assert math.isnan(common.exponent((1, 2), [0.0, 1.0]))


def test_markdown():
    rows = [["x", 1234, 1.23456, None], ["y", 5, 12345.6, math.nan]]
    lines = common.markdown(["", "a", "b", "c"], rows).splitlines()
    assert lines[2:] == ["| x | 1,234 | 1.23 | - |", "| y | 5 | 12,346 | - |"]


def test_curve(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curve, "BATCHES", (2, 4))
    systems = (curve.GREEDY, curve.System("NAR", "T = 2", ways.nar(2, 1)))
    found = curve.curve(
        str(tiny_run.folder), tmp_path, sentences=2, stream=4, rounds=2, memory=False, systems=systems
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "curve.json", "curve.md", "curve-latency.png", "curve-throughput.png",
    }  # fmt: skip
    stored = json.loads((tmp_path / "curve.json").read_text("utf-8"))
    greedy, nar = stored["systems"]["AR, greedy"], stored["systems"]["NAR, T = 2"]
    assert greedy["equal_to_greedy"] == 1.0
    assert greedy["times_greedy"]["1"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert greedy["scores"]["sentences"] == nar["scores"]["sentences"] == found["sentences"]["scored"] == 7
    assert nar["passes_per_sentence"] == 2.0
    assert set(nar["sentences_per_s"]) == {"2", "4"}
    assert "tok:13a" in capsys.readouterr().out


def test_a_curve_is_written_before_memory_is_measured(tiny_run, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(curve, "BATCHES", (2, 4))
    monkeypatch.setattr(curve, "_alone", killed)
    with pytest.raises(KeyboardInterrupt):
        curve.curve(str(tiny_run.folder), tmp_path, sentences=2, stream=4, rounds=1, systems=(curve.GREEDY,))
    stored = json.loads((tmp_path / "curve.json").read_text("utf-8"))
    assert stored["systems"]["AR, greedy"]["scores"]["sentences"] == 7


def test_a_place_that_takes_no_files_is_found_before_anything_is_measured(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert curve.main([f"--workdir={tiny_run.folder}", f"--output_dir={tmp_path / 'file'}"]) == 1
    assert "--output_dir=" in (told := capsys.readouterr().err)
    assert "cannot be written to" in told


def test_a_run_that_is_none_is_one_line(tmp_path, capsys):
    assert curve.main([f"--workdir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.curve: error: {tmp_path} is not a run directory")


def test_where_the_time_of_a_sentence_goes(tiny_run, tmp_path, capsys):
    systems = (curve.GREEDY, curve.System("NAR", "T = 2", ways.nar(2, 1)))
    sentence.sentence(str(tiny_run.folder), tmp_path, sentences=3, rounds=2, systems=systems)
    assert {p.name for p in tmp_path.iterdir()} == {"sentence.json", "sentence.md", "traces"}
    stored = json.loads((tmp_path / "sentence.json").read_text("utf-8"))
    assert stored["sentences"] == 3
    for name, row in stored["systems"].items():
        spans = row["spans_s"]
        asked = {"start the encoder", "wait for lengths"}
        assert {span for span in asked if spans[span]} == (set() if name == "AR, greedy" else asked)
        assert all(seconds > 0 for span, seconds in spans.items() if span not in asked)
        assert sum(spans.values()) + row["rest_s"] == pytest.approx(row["profiled_mean_s"])
        assert row["rest_s"] > 0
        assert 0 < row["device_s"] < row["profiled_mean_s"]
        assert row["device_events"] > 1
    assert "wait for the text" in capsys.readouterr().out


def test_a_sentence_of_a_run_that_is_none_is_one_line(tmp_path, capsys):
    assert sentence.main([f"--workdir={tmp_path}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.sentence: error: {tmp_path} is not a run directory")


def test_a_curve_of_some_systems(capsys):
    names = [s.name for s in curve.chosen_systems(["draft, strict", "NAR, 1 candidate"])]
    passes = [f"NAR, 1 candidate, T = {t}" for t in (1, 2, 4, 10)]
    assert names == ["AR, greedy", "AR, beam 5", *passes, "draft, strict"]
    assert curve.chosen_systems([]) == curve.SYSTEMS
    assert curve.main(["--workdir=nowhere", "--system=drafts"]) == 1
    assert "--system=drafts: there is none of this name; there are AR; AR, greedy;" in capsys.readouterr().err


def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "SYSTEMS", (growth.SYSTEMS[0], growth.SYSTEMS[2]))
    model = ModelConfig(dim=16, ffn=16, heads=2, encoder_layers=1, decoder_layers=1)
    base = growth.Point(length=4, batch=1, vocabulary=50, passes=1)
    axes = {"length": (4, 8), "passes": (1, 2)}
    found = growth.growth(tmp_path, model, base=base, axes=axes, rounds=1)
    assert set(found["points"]["length"]) == {"AR greedy", "NAR"}
    assert set(found["points"]["passes"]) == {"NAR"}
    assert all(row["temp_bytes"] > 0 for row in found["points"]["length"]["NAR"])
    assert {p.name for p in tmp_path.iterdir()} == {"growth.json", "growth.md", "growth.png"}


def test_growth_wants_rising_sizes(capsys):
    assert growth.main(["--batch=8,4"]) == 1
    assert "--batch: give at least two sizes, rising, got (8, 4)" in capsys.readouterr().err
    assert growth.main(["--vocabulary=5,8"]) == 1
    assert (
        "--vocabulary: sizes must be above 5, for symbols beside the special ones" in capsys.readouterr().err
    )


def test_the_length_is_forced(tmp_path):
    peers.write_bart(tmp_path, TINY, max_positions=16)
    model, params = load_bart(tmp_path / "model.safetensors", tmp_path / "config.json")
    source = peers.sources(2, 6, TINY.vocabulary, model)
    for program, option in (
        (forced.autoregressive, {"width": 1}),
        (forced.non_autoregressive, {"iterations": 1}),
    ):
        tokens = np.asarray(program(params, source, model=model, length=5, **option))
        assert tokens.shape == (2, 6)
        assert (tokens[:, -1] == model.ids.eos).all()


def compare(tmp_path, command):
    shape = peers.Shape(source=6, length=5, batches=(2,))
    return peers.compare(tmp_path, command, size=TINY, shape=shape, rounds=2, calls=1, settle=0)


def test_peers(tmp_path, monkeypatch, capsys):
    every = peers.ours
    monkeypatch.setattr(peers, "ours", lambda *args: dict(list(every(*args).items())[:1]))
    found = compare(tmp_path, [sys.executable, "-c", FAKE])
    assert found["versions"]["torch"] == "0"
    theirs, ours = (
        found["systems"][f"{e} float32, greedy"]["batches"]["2"] for e in ("PyTorch", "janus_jax")
    )
    assert theirs["equal_tokens"] == theirs["times_pytorch"]["median"] == 1.0
    assert theirs["sentences_per_s"] == pytest.approx(2000)
    assert ours["equal_sentences"] == 0.0
    assert "left out: CTranslate2 int8: not here" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"peers.json", "peers.md"}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(3)", "ended with code 3"),
        ("input(); print('hello')", "answered no JSON: 'hello"),
        ('input(); print(\'{"error": "no memory"}\')', "the peers' process: no memory"),
    ],
)
def test_a_peer_that_fails_is_told(tmp_path, script, message):
    with pytest.raises(common.BenchmarkError, match=message):
        compare(tmp_path, [sys.executable, "-c", script])


def test_a_peer_that_is_gone_before_it_is_asked_is_told():
    def ask() -> None:
        with peers.started([sys.executable, "-c", "raise SystemExit(3)"]) as peer:
            peer._process.wait()
            peer.ask(do="hello")

    with pytest.raises(common.BenchmarkError, match="ended with code 3"):
        ask()


def test_peers_without_their_environment(tmp_path):
    with pytest.raises(common.BenchmarkError, match=r"peers\.sh makes it"):
        compare(tmp_path, [str(tmp_path / "python")])
