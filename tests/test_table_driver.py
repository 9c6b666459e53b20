"""launch/tables/run.py: what it makes of a command line, what it skips, how it cuts dev, how it stops."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

from janus_jax import config, tables
from tests import fabricate

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLES = ROOT / "launch" / "tables"


@pytest.fixture(scope="module")
def driver():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("tables_run", TABLES / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables_run"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["tables_run"]


def parsed(driver, tmp_path, *words):
    return driver.parse([*words, f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("multi30k",), "--scale"),
        (("multi30k", "--scale=huge"), "invalid choice: 'huge'"),
        (("multi30k", "--scale=cpu", "--rows=janu"), "did you mean janus?"),
        (("multi30k", "--scale=cpu", "--rows=ar,"), "unknown row ''"),
        (("multi30k", "--scale=cpu", "--seeds=2", "--config.seed=1"), "--seeds=2 has that seed already"),
        (("multi30k", "--scale=cpu", "--direction=enfr"), "--direction must be ende, deen or both"),
        (("multi30k", "--scale=cpu", "--seeds=0"), "must be a number from 1 up"),
        (("multi30k", "--scale=cpu", "--bench=maybe"), "--bench must be yes or no"),
        (("multi30k", "--scale=cpu", "--raw_dir=/nowhere"), "no such folder"),
        (("multi30k", "--scale=cpu", "--config.model.dim"), "write it as --config.KEY=VALUE"),
        (("multi30k", "--scale=cpu", "--config.model.dmi=3"), "did you mean --config.model.dim?"),
        (("multi30k", "--scale=cpu", "--config.decode.beam=3"), "rows are decoded in the ways of the table"),
        (("tatoeba", "--scale=cpu"), "--raw_dir=FOLDER is needed"),
    ],
)
def test_wrong_command_lines(driver, tmp_path, capsys, words, message):
    assert driver.main([*words, f"--out={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["multi30k", "tatoeba", "canlaw", "iwslt14", "wmt14", "wmt16"])
def test_every_scale_of_every_set_is_a_usable_configuration(driver, tmp_path, name):
    """Whoever has the data finds no key gone; planning checks the configuration."""
    for scale in driver.SETS[name].scales:
        words = (name, f"--scale={scale}", "--rows=random_order", f"--raw_dir={tmp_path}")
        (job,) = driver.plan(parsed(driver, tmp_path, *words))
        assert job.updates


def test_rows_are_on_equal_terms(driver, tmp_path):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=all")
    made = [settled(driver, job) for job in driver.plan(args)]
    assert len(made) == len(driver.ROWS) - 1 == len({str(one) for one in made})  # `aligned` is `janus`
    for key in tables.equal_terms():
        assert len({str(config.get(one, key)) for one in made}) == 1, key


def settled(driver, job):
    from janus_jax import cli

    args, overrides = cli.parse(job.train)
    return cli.resolve_config(args.config, None, overrides)


def test_the_cpu_scale_is_what_the_results_were_made_with(driver, tmp_path):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=janus", "--seeds=2")
    first, second = driver.plan(args)
    made = settled(driver, first)
    assert (made.train.steps, made.train.eval_every, made.train.checkpoint_every) == (2275, 455, 455)
    assert (made.data.source, made.data.target) == ("en", "de")
    assert [first.folder.name, second.folder.name] == ["janus", "janus-s1"]
    assert config.differences(made, settled(driver, second)).keys() == {"seed"}
    assert list(first.evaluate) == [way.name for way in tables.WAYS]


def test_a_row_that_changes_nothing_is_left_out(driver, tmp_path, capsys):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=janus,length_gradient")
    assert [job.row for job in driver.plan(args)] == ["janus", "length_gradient"]
    args.settings = {"model.length_gradient": "true"}  # of all rows
    assert [job.row for job in driver.plan(args)] == ["janus"]
    assert "at this scale length_gradient is janus: left out" in capsys.readouterr().err


def test_a_row_stays_what_its_name_says(driver, tmp_path):
    """Whatever is set for all."""
    words = ("--config.model.ar_positions=code", "--config.loss.objective=ar", "--config.seed=7", "--seeds=2")
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar,janus,figure,aligned", *words)
    made = {job.folder.name: settled(driver, job) for job in driver.plan(args)}
    positions = {name: one.model.ar_positions for name, one in made.items() if "-s" not in name}
    assert positions == {"ar": "code", "janus": "code", "figure": "figure", "aligned": "aligned"}
    assert (made["ar"].loss.objective, made["janus"].loss.objective) == ("ar", "janus")
    assert (made["janus"].seed, made["janus-s1"].seed) == (7, 1)


def test_a_dry_run_prints_commands_and_leaves_no_trace(driver, tmp_path, capsys):
    words = ["multi30k", "--scale=smoke", f"--out={tmp_path / 'out'}", "--dry-run"]
    assert driver.main(words) == 0
    lines = [w for w in capsys.readouterr().out.splitlines() if w.startswith("janus-jax ")]
    assert sum(line.startswith("janus-jax train") for line in lines) == 6
    assert lines[-1].startswith("janus-jax report")
    assert "--split=test" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    words = [str(TABLES / "run.py"), "multi30k", "--scale=smoke", f"--out={tmp_path}", "--dry-run"]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()  # before it prints
        assert (child.stderr.read(), child.wait()) == (b"", 141)


def test_what_is_finished_is_skipped(driver, tmp_path):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar")
    (job,) = driver.plan(args)
    wanted = settled(driver, job)
    run = fabricate.write(job.folder.parent, "ar")
    (run / "config.json").write_text(json.dumps(wanted.to_dict()))
    rows = [fabricate.event("started", 0, "a" * 12)]
    rows += [{"step": 2275, "kind": k, "metrics": {"bleu": 1.0}, "timing": {}} for k in ("train", "dev")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = wanted.data.test_split
    for way in ("ar-b1", "ar-b5"):
        for suffix in ("json", "hyp"):
            (run / "eval" / f"test.{way}.{suffix}").rename(run / "eval" / f"{split}.{way}.{suffix}")

    assert [c[0] for c in driver.plan(args)[0].commands] == ["train", "evaluate", "evaluate"]  # no checkpoint
    (run / "checkpoints" / "2275").mkdir(parents=True)
    assert [c[0] for c in driver.plan(args)[0].commands] == ["evaluate", "evaluate"]  # of step 400
    for way in ("ar-b1", "ar-b5"):
        found = fabricate.result(way, fabricate.hypotheses(3), step=2275)
        (run / "eval" / f"{split}.{way}.json").write_text(json.dumps(found))
    assert driver.plan(args)[0].commands == []
    (run / "eval" / f"{split}.ar-b5.hyp").unlink()
    assert driver.plan(args)[0].missing == ["ar-b5"]
    split = "--config.data.test_split=val"
    left = driver.plan(parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar", split))[0].commands
    assert [(c[0], "--split=val" in c) for c in left] == [("evaluate", True)] * 2
    other = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar", "--config.model.dropout=0.2")
    assert driver.plan(other)[0].commands[0][0] == "train"  # which says what differs


def test_dev_is_cut_alike_and_leaves_nothing_of_itself_in_train(driver, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out" / "raw"
    raw.mkdir()
    pairs = [(f"Sentence {i // 2}", f"Satz {i}") for i in range(100)]  # two translations each
    for split, chosen in (("train", pairs), ("valid", [("a b", "c d")])):
        for side, lang in enumerate(("en", "de")):
            (raw / f"{split}.{lang}").write_text("".join(f"{p[side]}\n" for p in chosen))
    driver.cut_dev(raw, out, ("en", "de"), 10)
    read = {s: (out / f"{s}.en").read_text().splitlines() for s in ("train", "val", "test")}
    assert len(read["val"]) == 10
    assert not set(read["val"]) & set(read["train"])
    assert len(read["train"]) == 100 - 2 * len(set(read["val"]))
    assert read["test"] == ["a b"]
    before = (out / "train.en").stat().st_mtime_ns
    driver.cut_dev(raw, out, ("en", "de"), 10)
    assert (out / "train.en").stat().st_mtime_ns == before
    (raw / "valid.en").write_text("x y\n")
    with pytest.raises(driver.Misused, match="cut from other files"):
        driver.cut_dev(raw, out, ("en", "de"), 10)
    (raw / "train.de").unlink()
    with pytest.raises(driver.Misused, match="missing"):
        driver.cut_dev(raw, tmp_path / "other", ("en", "de"), 10)


@pytest.mark.parametrize(
    ("codes", "expected", "ran"), [((0, 0), 0, 2), ((75, 0), 75, 1), ((130, 0), 75, 1), ((1, 0), 1, 1)]
)
def test_commands_of_a_job_stop_at_what_fails(driver, monkeypatch, codes, expected, ran):
    from janus_jax import cli

    waiting, calls = list(codes), []
    monkeypatch.setattr(cli, "main", lambda words: (calls.append(words), waiting.pop(0))[1])
    assert driver.work([["train"], ["evaluate"]], say=lambda *_, **__: None) == expected
    assert len(calls) == ran


@pytest.mark.parametrize("cuda", [True, False])
def test_gpus_are_for_a_jax_that_has_cuda(driver, tmp_path, monkeypatch, capsys, cuda):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: a)'\necho 'GPU 1: two (UUID: b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(driver, "_jax_has_cuda", lambda: cuda)
    assert driver.devices() == (["0", "1"] if cuda else [])
    assert ("jax has no CUDA" in capsys.readouterr().err) != cuda


def test_a_place_that_cannot_be_written(driver, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert driver.main(["multi30k", "--scale=cpu", f"--out={tmp_path / 'file' / 'out'}"]) == 2
    assert re.search(r"--out=.*: Not a directory; name a folder", capsys.readouterr().err)


def test_a_row_that_cannot_be_started_has_failed_and_hides_no_other(driver, tmp_path, capsys):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar,janus")
    jobs = [dataclasses.replace(job, train=["--help"], evaluate={}) for job in driver.plan(args)]
    jobs[0].folder.with_name("ar.log").mkdir(parents=True)
    codes = driver.run_jobs(jobs, [""], driver._Stop())
    assert {pathlib.Path(k).name: v for k, v in codes.items()} == {"ar": 1, "janus": 0}
    assert "ar: could not be started: " in capsys.readouterr().err


def test_a_row_that_fails_hides_no_other_and_gpus_are_shared(driver, tmp_path, monkeypatch, capsys):
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar,cmlm,janus")
    jobs, seen = driver.plan(args), []

    def run(commands, folder, device, shared, stop):
        seen.append((folder.name, device, shared))
        return 1 if folder.name == "ar" else 0

    monkeypatch.setattr(driver, "_run_apart", run)
    codes = driver.run_jobs(jobs, ["0", "1"], driver._Stop())
    assert {pathlib.Path(k).name: v for k, v in codes.items()} == {"ar": 1, "cmlm": 0, "janus": 0}
    assert {device for _, device, _ in seen} <= {"0", "1"}
    assert "ar: failed (exit code 1)" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system binds no process to cores")
def test_rows_side_by_side_have_cores_of_their_own(driver, tmp_path, monkeypatch):
    """As far as there are cores; a row by itself has them all."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, os, pathlib, sys\n"
        "[where] = [w for w in json.loads(sys.argv[2])[0] if w.startswith('--workdir=')]\n"
        "where = pathlib.Path(where.removeprefix('--workdir=') + '.cores')\n"
        "where.write_text(json.dumps(sorted(os.sched_getaffinity(0))))\n"
    )
    monkeypatch.setattr(driver, "__file__", str(worker))
    mine = os.sched_getaffinity(0)

    def told(rows, slots):
        jobs = driver.plan(parsed(driver, tmp_path, "multi30k", "--scale=cpu", f"--rows={rows}"))
        assert set(driver.run_jobs(jobs, slots, driver._Stop()).values()) == {0}
        return [set(json.loads(pathlib.Path(f"{j.folder}.cores").read_text())) for j in jobs]

    assert told("ar", ["", ""]) == [mine]
    assert told("ar,janus", ["0", "1"]) == [mine, mine]  # who has a GPU keeps all cores
    if len(mine) > 1:
        first, second = told("ar,janus", ["", ""])
        assert len(first) == len(second) == len(mine) // 2
        assert not first & second
    assert os.sched_getaffinity(0) == mine
    assert driver.cores(len(mine) + 1) == [set()] * (len(mine) + 1)


def test_where_no_process_can_be_bound_rows_share_the_cores(driver, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert driver.cores(2) == [set(), set()]


def test_sigterm_reaches_what_was_started(driver, tmp_path, monkeypatch):
    """The child saves and ends with 75, and nothing that waits is begun."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(driver, "__file__", str(worker))
    stop = driver._Stop()
    args = parsed(driver, tmp_path, "multi30k", "--scale=cpu", "--rows=ar,janus")

    def tell():
        while not (tmp_path / "ready").exists():
            threading.Event().wait(0.02)
        stop.note(signal.SIGTERM, None)

    teller = threading.Thread(target=tell)
    teller.start()
    codes = driver.run_jobs(driver.plan(args), [""], stop)
    teller.join()
    assert list(codes.values()) == [75]


@pytest.mark.parametrize("name", ["multi30k", "tatoeba", "canlaw", "iwslt14", "wmt14", "wmt16"])
def test_scripts_name_their_set(name):
    text = (TABLES / f"{name}.sh").read_text("utf-8")
    assert f'run.py" {name} "$@"' in text
    assert os.access(TABLES / f"{name}.sh", os.X_OK)


def test_the_scripts_tell_their_usage():
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [TABLES / "multi30k.sh", "--help"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--dry-run" in done.stdout
