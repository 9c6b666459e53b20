"""`janus-jax report`: what stands in a table, and what is set apart, from real run directories."""

import csv
import json
import shutil

import pytest

from janus_jax import report
from janus_jax.cli import main


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """A folder with a finished JANUS run, decoded in two ways, and runs with something wrong with each."""
    folder = tmp_path_factory.mktemp("table")
    good = shutil.copytree(tiny_run.folder, folder / "janus")
    config = json.loads((good / "config.json").read_text())
    config["train"]["steps"] = 2  # of its two checkpoints the first is the best
    (good / "config.json").write_text(json.dumps(config))
    (good / report.METRICS_FILE).unlink(missing_ok=True)
    with report.MetricsWriter(good, tensorboard=False, resume_step=-1) as writer:
        writer.write(0, "event", {"event": "started", "device": "cpu", "commit": "abc"})
        for step, bleu in ((1, 2.0), (2, 1.0)):
            writer.write(step, "train", {"loss": 1.0}, {"step_s": 0.1})
            writer.write(step, "dev", {"bleu_ar": bleu, "bleu_nar": bleu, "bleu": bleu})
    half = shutil.copytree(good, folder / "half")
    config["train"]["steps"] = 4
    (half / "config.json").write_text(json.dumps(config))
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for way in ("ar", "draft"):
        command = ["evaluate", f"--workdir={good}", f"--decode={way}", "--show=0"]
        assert main([*command, "--beam=1"] if way == "ar" else command) == 0
    return folder


def test_one_table_with_what_is_wrong_beside_it(runs, tmp_path, capsys):
    assert main(["report", str(runs), f"--output={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().out
    assert "Set apart" in told
    text = (tmp_path / "out" / "table.md").read_text()
    for name, why in (("half", "unfinished"), ("broken", "config.json")):
        assert any(name in line and why in line for line in text.splitlines()), (name, text)
    rows = list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    named = [row for row in rows if "janus" in row]
    assert named, "the finished run is there"
    assert not any("half" in row and "unfinished" not in " ".join(row) for row in rows), (
        "and the others are not"
    )
    scores = [json.loads(p.read_text())["scores"]["bleu"] for p in (runs / "janus" / "eval").glob("*.json")]
    assert len(scores) == 2
    assert scores[0] == scores[1], "strict drafts are greedy search's text"
    assert f"{scores[0]:.2f}" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page, "pictures are inside"
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_run_by_itself_is_a_table_of_one_row(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs / "janus")
    assert main(["report", ".", f"--output={tmp_path}", "--any_commit"]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"janus"}
    assert {row["way"] for row in rows if row["bleu"]} == {"ar-b1", "draft"}
    assert "half" not in (tmp_path / "table.md").read_text()


def test_a_run_that_cannot_be_read_is_an_error_and_leaves_nothing(runs, capsys):
    assert main(["report", str(runs / "broken")]) == 1
    assert "no run can be read: broken: config.json" in capsys.readouterr().err
    assert [path.name for path in (runs / "broken").iterdir()] == ["config.json"]


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) != 0
    assert str(tmp_path) in capsys.readouterr().err
