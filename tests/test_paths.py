"""Runs on an object store: the same run as in a folder, one holder at a time, and clear errors."""

from __future__ import annotations

import itertools
import json
import pathlib
import sys
import threading
import time

import pytest
from fsspec.registry import _registry

from janus_jax import checkpoint, cli, paths, plots, report, run, train
from janus_jax.config import Config, ModelConfig
from janus_jax.paths import LeaseError, PathError
from janus_jax.text import Vocabulary
from janus_jax.translate import output
from tests import bucket
from tests.test_report import _scalars, _train
from tests.test_train import STEPS, tiny


@pytest.fixture(scope="module")
def store():
    with bucket.served() as store:
        yield store


@pytest.fixture
def folder(store, request, tmp_path, monkeypatch):
    """A fresh folder of the store; what this machine caches lies in `tmp_path`."""
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    return paths.as_path(f"{bucket.URL}/{request.node.name}/run")


@pytest.fixture
def impatient(monkeypatch):
    """A lease whose times are short, so that tests are quick."""
    monkeypatch.setattr(paths, "HEARTBEAT", 0.03)
    monkeypatch.setattr(paths, "PATIENCE", 0.5)


# -- names --------------------------------------------------------------------------------------------


def test_a_local_name_stays_what_it_was():
    for name in ("runs/a", "/tmp/x", pathlib.Path("gs:") / "a", "."):
        assert type(paths.as_path(name)) is type(pathlib.Path())
        assert paths.as_path(name) == pathlib.Path(name)
        assert not paths.is_remote(name)


def test_a_url_keeps_both_slashes(store):
    path = paths.as_path(f"{bucket.URL}/a") / "b"
    assert str(path) == f"{path}" == "gs://bucket/a/b"
    assert paths.is_remote(path)
    assert paths.as_path(path) == path


@pytest.mark.parametrize("url", ["http://host/run", "file:///tmp/run", "gss://bucket/run"])
def test_a_protocol_that_is_not_supported(url, capsys):
    protocol = url.partition(":")[0]
    message = f"{url}: {protocol}:// is not supported; use a local folder or gs://bucket/folder"
    assert cli.main(["plot", f"--workdir={url}"]) == 1
    assert capsys.readouterr().err == f"janus-jax: error: {message}\n"


@pytest.mark.parametrize(
    ("url", "package", "remedy"),
    [
        ("gs://bucket/run", "gcsfs", "pip install 'janus-jax[gcs]'"),
        ("s3://bucket/run", "s3fs", "pip install fsspec s3fs"),
        ("az://bucket/run", "adlfs", "pip install fsspec adlfs"),
    ],
)
def test_a_missing_package_is_one_clear_error(url, package, remedy, monkeypatch, capsys):
    for name in ("gs", "gcs", "s3", "az"):
        monkeypatch.delitem(_registry, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for verb in ("prepare", "train", "evaluate", "translate", "bench", "plot", "demo"):
        assert cli.main([verb, f"--workdir={url}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(
            f"janus-jax: error: {url}: {url[:2]}:// needs the package {package}: {remedy} ("
        )
        assert error.count("\n") == 1


def test_a_run_needs_a_store_that_checkpoints_can_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setitem(_registry, "s3", bucket.Store)
    with pytest.raises(PathError, match=r"s3://b/run: a run cannot be kept on s3://, because Orbax"):
        train.train(tiny(), "s3://b/run")
    with pytest.raises(PathError, match="cannot be kept on s3://"):
        run.claim("s3://b/run", Config())


def test_what_a_client_says_becomes_one_line():
    error = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Forbidden, 403\nand more")
    told = "gcsfs: HttpError: Forbidden, 403; are bucket, credentials and network right?"
    assert cli.explain(error) == told
    assert paths.explain(ValueError("x")) is None


# -- what stays on this machine -----------------------------------------------------------------------


def test_data_are_local_whatever_the_run_is(monkeypatch, tmp_path):
    assert paths.data_folder("", tmp_path / "run") == tmp_path / "run" / "data"
    assert paths.data_folder("~/sets", "gs://b/r") == pathlib.Path("~/sets").expanduser()
    monkeypatch.setenv(paths.CACHE, str(tmp_path))
    found = paths.data_folder("", "gs://bucket/exp/one")
    assert found.parent == tmp_path / "data"
    assert found.name.startswith("one-")
    assert found == paths.data_folder("", "gs://bucket/exp/one/")
    assert found != paths.data_folder("", "gs://bucket/other/one")
    for nowhere in ("", "gs://bucket/cache"):
        monkeypatch.setenv(paths.CACHE, nowhere)
        assert paths.data_folder("", "gs://b/r").is_relative_to(
            pathlib.Path("~/.cache/janus_jax").expanduser()
        )
    with pytest.raises(PathError, match=r"data.dir = gs://b/d: prepared data must lie in a folder"):
        paths.data_folder("gs://b/d", tmp_path)


# -- one holder at a time -----------------------------------------------------------------------------


def test_a_lease_is_exclusive_while_its_holder_lives(folder, impatient):
    said: list[str] = []
    with run.locked(folder):
        with pytest.raises(LeaseError) as caught, paths.lease(folder / run.LOCK, said.append):
            pass
        with pytest.raises(run.RunError, match=r"is in use by another janus-jax process \(process \d+ on "):
            train.train(tiny(), folder)
        assert not (folder / "config.json").exists()
    assert f"if no such process runs, remove {folder}/.lock" in str(caught.value)
    assert said[0].startswith(f"{folder} was in use by process ")
    assert not (folder / run.LOCK).exists()
    with run.locked(folder):
        pass


@pytest.mark.parametrize("left", [b'{"host": "h", "pid": 7, "since": "s", "id": "x"}\n', b"", b"[]", b"\xff"])
def test_the_lease_of_a_killed_process_is_taken_over(left, folder, impatient, capsys):
    (folder / run.LOCK).write_bytes(left)
    with run.locked(folder):
        held = json.loads((folder / run.LOCK).read_text())
        assert held["id"] != "x"
    assert (
        "waiting up to 0.5 s for a sign of life\nthere was none: it is taken over" in capsys.readouterr().out
    )
    assert not (folder / run.LOCK).exists()


def test_a_bucket_that_does_not_exist(store, capsys):
    url = "gs://another/run"
    with pytest.raises(
        PathError, match=rf"cannot write to {url} \(FileNotFoundError: .*does the bucket exist"
    ):
        train.train(tiny(), url)
    assert cli.main(["translate", f"--workdir={url}", f"--input={__file__}"]) == 1
    assert f"{url} is not a run directory" in capsys.readouterr().err


def test_who_ends_while_another_waits_makes_room(folder, impatient):
    path = folder / run.LOCK
    path.write_bytes(b"{}")

    def sleep(seconds):
        path.unlink(missing_ok=True)

    with paths.lease(path, sleep=sleep):
        assert "id" in json.loads(path.read_text())


def test_of_two_that_take_over_at_once_one_gives_way(folder, impatient):
    path = folder / run.LOCK
    path.write_bytes(b"{}")
    waits = itertools.count()

    def sleep(seconds):
        if json.loads(path.read_text()).get("id"):  # after the take-over
            path.write_bytes(b'{"id": "the other"}')
        next(waits)

    with pytest.raises(LeaseError), paths.lease(path, sleep=sleep):
        pass
    assert next(waits) > 1
    assert json.loads(path.read_text()) == {"id": "the other"}


def test_who_lost_its_lease_is_told_and_leaves_the_file_alone(folder, impatient):
    path, told = folder / run.LOCK, threading.Event()
    messages: list[str] = []

    def lost(message):
        messages.append(message)
        told.set()

    with paths.lease(path, lost=lost):
        while not told.wait(0.01):  # again and again: a beat that has begun may overwrite it once
            path.write_bytes(b'{"id": "other", "host": "elsewhere", "pid": 1}')
    assert messages == [
        f"{folder} was taken over by process 1 on elsewhere, because this one gave no sign of life "
        "for 0.5 s; this one stops"
    ]
    assert json.loads(path.read_text())["id"] == "other"


def test_a_holder_shows_life(folder, impatient):
    with paths.lease(folder / run.LOCK):
        seen = set()
        deadline = time.monotonic() + 5
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add((folder / run.LOCK).read_text())
            time.sleep(0.01)
    assert len(seen) == 3


# -- the parts of a run -------------------------------------------------------------------------------


def test_a_folder_is_made_and_found_to_take_files_or_not(folder, tmp_path):
    paths.make_writable(folder / "anything")
    paths.make_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            paths.make_writable(place)


def test_a_remote_folder_is_claimed_and_opened_like_any_other(folder, tmp_path):
    opened = run.claim(folder, Config(seed=3))
    assert run.open_run(str(folder)).config == opened.config == Config(seed=3)
    assert json.loads((folder / "versions.json").read_text())["jax"]
    assert opened.data_folder.is_relative_to(tmp_path)
    (folder / "checkpoints" / "3" / "state").write_bytes(b"")
    with pytest.raises(run.RunError, match=f"{folder} belongs to a run with another configuration:"):
        run.claim(folder, Config(seed=3, model=ModelConfig(dim=64)))
    with pytest.raises(run.RunError, match=f"{folder}-2 is not a run directory: .* --workdir={folder}-2"):
        run.open_run(f"{folder}-2")
    (folder / "config.json").unlink()
    with pytest.raises(run.RunError, match=r"has checkpoints but no config.json"):
        run.claim(folder, Config(seed=3))


def test_a_vocabulary_travels(folder, tiny_run):
    vocabulary = Vocabulary.load(tiny_run.folder)
    vocabulary.save(folder)
    assert Vocabulary.load(folder).sha256 == vocabulary.sha256
    opened = run.claim(folder, tiny_run.config)
    opened.bind_vocabulary(vocabulary)
    assert opened.vocabulary().encode("Ein Hund.") == vocabulary.encode("Ein Hund.")
    (folder / "checkpoints" / run.BOUND).write_text("another")
    with pytest.raises(run.RunError, match="this is not the vocabulary of the model"):
        opened.vocabulary()


def test_metrics_are_uploaded_at_flush_and_resumed_from_the_store(folder, tmp_path):
    _train(tmp_path / "whole", 1, 12)
    writer = report.MetricsWriter(folder, tensorboard=False)
    writer.write(1, "train", {"loss": 1.0})
    assert report.read_metrics(folder) == []
    writer.flush()
    assert [row["step"] for row in report.read_metrics(folder)] == [1]
    writer.write(2, "train", {"loss": 0.5})
    writer._file.close()  # as kill -9 does
    _train(folder, 1, 9)
    assert [row["step"] for row in report.read_metrics(folder)][-1] == 9
    for spool in (tmp_path / "cache").rglob("metrics.jsonl"):
        spool.write_text("of another run")  # what is left on this machine does not count
    _train(folder, 5, 12, resume_step=4)
    assert report.comparable(report.read_metrics(folder)) == report.comparable(
        report.read_metrics(tmp_path / "whole")
    )
    with pytest.raises(report.ReportError, match=f"{folder}-2/metrics.jsonl: no metrics here"):
        report.read_metrics(f"{folder}-2")


def test_tensorboard_files_are_uploaded_too(folder, tmp_path):
    with report.MetricsWriter(folder) as writer:
        writer.write(5, "train", {"loss": 2.5})
    report.MetricsWriter(folder, resume_step=5).close()
    (tmp_path / "events").mkdir()
    for file in (folder / "tensorboard").iterdir():
        (tmp_path / "events" / file.name).write_bytes(file.read_bytes())
    assert _scalars(tmp_path / "events") == ({("train/loss", 5): 2.5}, [6])


def test_a_store_that_takes_no_more_is_a_clear_error(folder, store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = report.MetricsWriter(folder, tensorboard=False)
    writer.write(1, "train", {"loss": 1.0})
    monkeypatch.setattr(store, "put", full)
    for attempt in (writer.flush, lambda: report.write_json(folder / "x.json", {})):
        with pytest.raises(report.ReportError, match=rf"cannot write {folder}/.*: No space left on device"):
            attempt()
    monkeypatch.undo()
    writer.close()
    assert len(report.read_metrics(folder)) == 1


def test_files_and_pictures_are_written_in_one_piece(folder, store):
    report.write_json(folder / "x.json", {"a": 1})
    with output(folder / "x.txt") as file:
        file.write(b"a\n")
        assert not (folder / "x.txt").exists()
    plots.plot_training(
        [{"step": s, "kind": "train", "metrics": {"loss": 1 / s}} for s in (1, 2)], folder / "x.png"
    )
    assert sorted(p.name for p in folder.iterdir()) == ["x.json", "x.png", "x.txt"]
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")


# -- a whole run --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> str:
    """A run on the store that was broken off at step 8 and continued on a machine without its caches."""
    url, patch = f"{bucket.URL}/experiments/run", pytest.MonkeyPatch()
    config = tiny(train__tensorboard=True, train__keep_last=2)
    read = train._Training._read

    def killed(self, update):
        if update.step == 8:
            raise Killed
        read(self, update)

    with patch.context() as first:
        first.setenv(paths.CACHE, str(tmp_path_factory.mktemp("first")))
        first.setattr(train._Training, "_read", killed)
        with pytest.raises(Killed):
            train.train(config, url)
    with patch.context() as second:
        second.setenv(paths.CACHE, str(tmp_path_factory.mktemp("second")))
        assert train.train(config, url) == train.DONE
    return url


def test_a_remote_run_equals_a_local_one_bit_for_bit(trained, tmp_path):
    assert train.train(tiny(), tmp_path) == train.DONE
    here, there = report.read_metrics(tmp_path), report.read_metrics(trained)
    assert report.comparable(there) == report.comparable(here)
    assert [r["step"] for r in there if r["metrics"].get("event") == "resumed"] == [6]


def test_a_remote_run_is_complete_and_leaves_nothing_else(trained):
    names = {path.name for path in paths.as_path(trained).iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "training.png",
        "versions.json",
        "vocab.json",
        "vocab.model",
    }
    steps = checkpoint.list_steps(f"{trained}/checkpoints")
    assert {9, STEPS} <= set(steps) <= {6, 9, STEPS}  # the newest two and the best


def test_rows_are_in_the_store_before_the_checkpoint_of_their_step(folder, monkeypatch):
    save, found = checkpoint.Checkpoints.save, {}

    def watched(self, step, *args):
        found[step] = max(row["step"] for row in report.read_metrics(folder))
        return save(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", watched)
    assert train.train(tiny(train__steps=7), folder) == train.DONE
    assert found == {3: 3, 6: 6, 7: 7}


def test_every_verb_works_on_it_from_another_machine(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(paths.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    there = f"--workdir={trained}"
    assert cli.main(["evaluate", there, "--limit=3", "--refine=1", "--iterations=2", "--decode=ar,nar"]) == 0
    assert f"written: {trained}/eval/test.nar-T2-c3-first3.hyp, .json" in capsys.readouterr().out
    folder = paths.as_path(trained) / "eval"
    assert json.loads((folder / "test.ar-b5-first3.json").read_text())["scores"]["sentences"] == 3
    assert len((folder / "test.ar-b5-first3.hyp").read_text().splitlines()) == 3
    text = tmp_path / "text"
    text.write_text("half past six\n\nat noon\n")
    for target in (f"{trained}/eval/out.txt", tmp_path / "out.txt"):
        assert cli.main(["translate", there, "--decode=nar", f"--input={text}", f"--output={target}"]) == 0
    assert (folder / "out.txt").read_bytes() == (tmp_path / "out.txt").read_bytes()
    assert cli.main(["plot", there]) == 0
    assert cli.main(["train", there]) == 0
    assert "already trained" in capsys.readouterr().out
    for path in list(folder.iterdir()):
        path.unlink()
