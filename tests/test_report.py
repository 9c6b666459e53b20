"""Metric files that survive kill -9, output with and without a terminal."""

import contextlib
import io
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from janus_jax import plots, report
from janus_jax.report import (
    MetricsWriter,
    ReportError,
    Timer,
    commit,
    comparable,
    peak_memory,
    progress,
    read_metrics,
    refinement_text,
    table,
    versions,
    write_json,
)

# -- numbers ------------------------------------------------------------------------------------------


def _train(folder, first, last, resume_step=-1):
    """Rows as a run of steps first..last would write them; loss is a function of the step alone."""
    with MetricsWriter(folder, tensorboard=False, resume_step=resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(
                step, "train", {"loss": np.float32(1 / step), "lr": 0.1 * step}, {"s": os.getpid() * 0.1}
            )
            if step % 4 == 0:
                writer.write(step, "dev", {"bleu_ar": 3.0 * step})


def test_rows_come_back_as_written(tmp_path):
    with MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 0.1 + 0.2, "n": np.int32(7)}, {"step_s": 0.25})
        writer.write(1, "event", {"what": "grüße 🙂", "ok": True, "none": None})
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "kind": "train", "metrics": {"loss": 0.1 + 0.2, "n": 7}, "timing": {"step_s": 0.25}},
        {"step": 1, "kind": "event", "metrics": {"what": "grüße 🙂", "ok": True, "none": None}, "timing": {}},
    ]


@pytest.mark.parametrize(
    "value", [np.float32(0.1), np.float32(1e-38), 1 / 3, 5e-324, -0.0, 1.7976931348623157e308]
)
def test_floats_keep_every_bit(tmp_path, value):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"x": value})
    back = read_metrics(tmp_path)[0]["metrics"]["x"]
    assert struct.pack("d", back) == struct.pack("d", float(value))


def test_nan_and_infinity_are_valid_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"a": math.nan, "b": np.float32(np.inf), "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["metrics"] == {"a": None, "b": None, "c": None}


def test_resume_gives_the_rows_of_an_uninterrupted_run(tmp_path):
    _train(tmp_path / "whole", 1, 12)
    _train(tmp_path / "cut", 1, 9)
    file = tmp_path / "cut" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # died while writing
    _train(tmp_path / "cut", 5, 12, resume_step=4)
    assert comparable(read_metrics(tmp_path / "cut")) == comparable(read_metrics(tmp_path / "whole"))
    assert all("timing" not in row for row in comparable(read_metrics(tmp_path / "cut")))
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]  # no temporary file stays


def test_a_fresh_start_keeps_nothing_of_a_run_that_never_saved(tmp_path):
    _train(tmp_path, 1, 3)
    _train(tmp_path, 1, 2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_kill_minus_nine_loses_no_row(tmp_path):
    code = f"""
import os, signal
from janus_jax.report import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r}, tensorboard=False)
for step in range(5):
    writer.write(step, "train", {{"loss": step / 3}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["metrics"]["loss"] for r in read_metrics(tmp_path)] == [s / 3 for s in range(5)]


@pytest.mark.parametrize("tail", [b'{"step": 9, "ki', b"\x00\x00\x00", b'{"step": 9}\n', b"\xff\n"])
def test_a_half_written_last_line_is_dropped(tmp_path, tail):
    _train(tmp_path, 1, 2)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    assert len(read_metrics(tmp_path)) == 2
    MetricsWriter(tmp_path, tensorboard=False, resume_step=2).close()
    assert file.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    _train(tmp_path, 1, 3)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "garbage", *lines[1:]]) + "\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl:2: damaged row"):
        read_metrics(tmp_path)
    for damaged in (
        '{"step": 1, "kind": "train"}',
        '{"step": 1, "kind": "train", "metrics": {"a": []}, "timing": {}}',
    ):
        file.write_text("\n".join([lines[0], damaged, *lines[1:]]) + "\n")
        with pytest.raises(ReportError, match=r"metrics\.jsonl:2: damaged row"):
            read_metrics(tmp_path)
    with pytest.raises(ReportError, match="no metrics here"):
        read_metrics(tmp_path / "nowhere")


def test_a_full_disk_and_an_unwritable_folder_are_clear_errors(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.close()
    with open("/dev/full", "ab", buffering=0) as full:
        writer._file = full
        with pytest.raises(ReportError, match=r"cannot write .*metrics\.jsonl: No space left"):
            writer.write(1, "train", {"loss": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)


def test_unusable_rows_are_named(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ReportError, match=r"kind must be one of train, dev, event, got 'test'"):
            writer.write(1, "test", {})
        with pytest.raises(ReportError, match=r"metrics\.loss must be a number"):
            writer.write(1, "train", {"loss": np.zeros(3)})
    assert read_metrics(tmp_path) == []


def _scalars(folder):
    """What TensorBoard would read: {(tag, step): value} and the steps at which a session starts."""
    from tensorboardX.proto.event_pb2 import Event

    found, starts = {}, []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            starts += [event.step] if event.HasField("session_log") else []
    return found, starts


def test_tensorboard_holds_the_same_numbers_and_purges_on_resume(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(5, "train", {"loss": 2.5, "what": "text"}, {"step_s": 0.25})
        writer.write(6, "dev", {"bleu_ar": 31.5})
        before_close, starts = _scalars(tmp_path / "tensorboard")
    assert before_close == {
        ("train/loss", 5): 2.5,
        ("train_timing/step_s", 5): 0.25,
        ("dev/bleu_ar", 6): 31.5,
    }
    assert starts == []
    MetricsWriter(tmp_path, tensorboard=True, resume_step=5).close()
    assert _scalars(tmp_path / "tensorboard")[1] == [6]


def test_write_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"b": (1, 2.5), "c": np.float32(np.nan), "p": pathlib.Path("q")})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"b": [1, 2.5], "c": None, "p": "q"}
    with pytest.raises(ReportError, match=r"b\.c\[1\] must be a number"):
        write_json(tmp_path / "a" / "x.json", {"b": {"c": [1, object()]}})
    assert json.loads((tmp_path / "a" / "x.json").read_text())["p"] == "q"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReportError, match="cannot write"):
        write_json(tmp_path / "folder", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder"]


def test_versions_and_memory():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["numpy"] == np.__version__
    assert found["commit"] == commit()
    assert {"janus-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"} <= set(found)
    assert peak_memory().host > 20e6
    assert peak_memory(None, {}).device is None
    assert peak_memory({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}).device == 9


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    (tmp_path / "janus_jax").mkdir()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "janus_jax" / "report.py"))
    assert commit() is None, "in no checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit() is None, "a checkout without a commit"
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert commit() == head[:12]
    (tmp_path / "file").write_text("two")
    assert commit() == head[:12] + "-dirty"


# -- stopwatch ----------------------------------------------------------------------------------------


class Clock:
    """A clock that only moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_timer_adds_up_spans_and_starts_again():
    clock = Clock()
    timer = Timer(clock)
    for _ in range(2):
        with timer("data"):
            clock.now += 1
    with contextlib.suppress(KeyError), timer("step"):
        clock.now += 5
        raise KeyError
    assert timer.totals() == {"data": 2, "step": 5}
    assert timer.take() == {"data": 2, "step": 5}
    assert timer.take() == {}


# -- terminal -----------------------------------------------------------------------------------------


def test_progress_in_a_pipe_is_a_plain_line_every_ten_seconds(capsys):
    clock = Clock()
    with progress(1000, "train [M]", start=400, clock=clock) as p:
        for step in range(401, 501):
            clock.now += 0.5
            p.update(step, loss=1 / 3, **{"tok/s": 12345.6})
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 5  # 50 seconds
    assert lines[-1] == "train [M]   500/1,000   50%   2 step/s   ETA 0:04:10   loss 0.3333   tok/s 12,346"
    assert "\x1b" not in captured.err
    assert "\r" not in captured.err


def test_progress_says_where_it_stopped_also_when_broken_off(capsys):
    clock = Clock()
    with contextlib.suppress(KeyError), progress(None, "decode", unit="sentence", clock=clock) as p:
        p.advance(3)
        clock.now += 4
        p.say("a note [M]")
        p.advance(1)
        raise KeyError
    assert capsys.readouterr().err.splitlines() == ["a note [M]", "decode   4   4 s/sentence"]


def test_progress_rate_leaves_out_the_first_step_which_compiles(capsys):
    clock = Clock()
    with progress(100, "train", clock=clock) as p:
        clock.now += 60
        p.advance()
        assert "ETA" not in p.status()
        clock.now += 1
        p.advance()
        assert p.status() == "2/100   2%   1 step/s   ETA 0:01:38"
    capsys.readouterr()


def test_progress_on_a_terminal_is_one_live_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Console(
        file=Terminal(), force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"}
    )
    with progress(10, "train", console=console) as p:
        for _ in range(10):
            p.advance(loss=0.5)
        p.say("saved [1]")
    text = console.file.getvalue()
    assert "\x1b[" in text
    assert "10/10   100%" in text
    assert "saved [1]" in text


def test_table_is_readable_in_a_pipe(capsys):
    long = "x" * 150
    table(
        "Scores [M]",
        ["mode [T]", "BLEU", "n"],
        [["AR [beam]", 37.126, 1000], [long, None, 2], ["c", 0.0123, 3]],
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Scores [M]"
    assert long in "\n".join(lines)  # neither cut nor folded
    header, first, _, third = (
        next(x for x in lines if key in x) for key in ("BLEU", "37.13", long, "0.0123")
    )
    assert header.index("BLEU") + 4 == first.index("37.13") + 5 == third.index("0.0123") + 6  # right-aligned
    assert header.index("mode [T]") == first.index("AR [beam]")
    assert "1,000" in first
    assert "\x1b" not in "".join(lines)


def _history(final, passes):
    """A refinement: every pass predicts what the last left masked, most confident from the left."""
    n = len(final)
    history = []
    masked = [True] * n
    for t in range(passes):
        tokens = [f if not m or t == passes - 1 else final[0] for f, m in zip(final, masked, strict=True)]
        confidence = [min(1.0, (t + 1) / passes * (j + 1) / n) for j in range(n)]
        history.append({"tokens": tokens, "confidence": confidence, "masked_before": masked})
        masked = [j < n * (passes - 1 - t) // passes for j in range(n)]
    return history


def test_refinement_as_text():
    assert refinement_text(_history(["▁a", "▁漢", "c\n"], 2), source="S", output="O") == (
        "source  S\n"
        "\n"
        " 1 in   ·    ·    ·\n"
        " 1 out  [▁a] [▁a] [▁a]\n"
        "\n"
        " 2 in   ·    ▁a   ▁a\n"
        " 2 out  [▁a] ▁漢  c□\n"
        "\n"
        "output  O\n"
    )


def test_refinement_text_breaks_wide_sentences_into_blocks_that_lose_nothing():
    final = [f"▁piece{j}" for j in range(30)]
    text = refinement_text(_history(final, 3), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert set(final) <= set(text.replace("[", " ").replace("]", " ").split())
    assert text.count(" 1 in ") == text.count(" 3 out") > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ["a"]}, "pass 2: .* lengths .1, 2, 2., expected 2"),
        ({"confidence": [-0.5, 0.5]}, "pass 2: confidences are probabilities"),
        ({"confidence": [math.nan, 0.5]}, "pass 2: confidences are probabilities"),
    ],
)
def test_unusable_histories_are_named(change, message, tmp_path):
    history = _history(["a", "b"], 2)
    history[1] |= change
    with pytest.raises(ReportError, match=message):
        refinement_text(history)
    with pytest.raises(ReportError, match=message):
        plots.plot_refinement(history, tmp_path / "x.png")
    with pytest.raises(ReportError, match="at least one pass"):
        refinement_text([])


def test_a_silent_writer_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with report.SilentWriter() as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.flush()
    assert not list(tmp_path.iterdir())
