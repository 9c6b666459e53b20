"""An export decodes as the run does: in this process, and in one that has jax and little else."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import subprocess
import sys

import jax
import pytest

from janus_jax import cli, export, exported, run, text
from janus_jax.config import SpecialIds, VocabConfig
from janus_jax.export import ExportError
from janus_jax.exported import Exported, ExportedError
from janus_jax.translator import DecodeError, Translator

pytest.importorskip("flatbuffers", reason="jax.export needs it; a dependency since `janus-jax export`")

# Where a Python without our dependencies is, as `make export-check` says; else they are hidden from this one.
BARE_PYTHON = os.environ.get("JANUS_JAX_BARE_PYTHON", sys.executable)
HIDDEN = (
    "janus_jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "ml_collections",
    "absl",
    "etils",
)
HIDE = f"""
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError("hidden: " + name)
sys.meta_path.insert(0, Hide())
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""

BUCKETS = (8, 24)
NAR = {"candidates": 2, "iterations": 2, "rescore": True}
LINES = [
    "Ein Hund sieht den Ball.",
    "",
    "Baum",
    " \t\u00a0",
    "Ein Mann malt den Fluss.",
    "q\0z 日本 \u2581\ue000 [M] </s>",
    "wort " * 50,
    "Der\r",
    "Hund Ball",
]


@pytest.fixture(scope="module")
def long_run(tiny_run, tmp_path_factory):
    """The tiny run with two buckets, so that canvases are chosen from several, and batches are partial."""
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("export") / "run")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["batch"]["buckets"] = list(BUCKETS)
    path.write_text(json.dumps(values))
    return run.open_run(folder)


@pytest.fixture(scope="module")
def translator(long_run):
    return Translator.from_run(long_run.folder)


@pytest.fixture(scope="module")
def nar(long_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nar") / "made" / "here"
    export.export(long_run, folder, "nar", **NAR)
    return folder


@pytest.fixture(scope="module")
def ar(long_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ar") / "made"
    export.export(long_run, folder, "ar", platforms=["cpu"], beam=1)
    return folder


@pytest.fixture
def copy(ar, tmp_path):
    """An export that may be damaged."""
    return shutil.copytree(ar, tmp_path / "copy")


# -- it writes what the run writes -----------------------------------------------------------------


def same(folder, translator, decode, **options):
    ours, report = translator.decode(LINES, decode, **options)
    cut = []
    loaded = Exported.load(folder)
    texts = loaded.translate(LINES, on_cut=lambda *found: cut.append(found))
    assert texts == [found[0].text for found in ours]
    assert cut == report.cut != []
    scores = [best.score for best in loaded.decode_ids([loaded.encode(line) for line in LINES])]
    assert scores == pytest.approx([found[0].score for found in ours], abs=1e-5)
    return loaded


def test_nar_writes_what_the_translator_writes(nar, translator):
    loaded = same(nar, translator, "nar", **NAR)
    assert loaded.translate([]) == []
    assert loaded.translate(LINES[2:3]) == loaded.translate(LINES)[2:3]


def test_drafts_write_what_greedy_search_writes(long_run, translator, tmp_path):
    export.export(long_run, tmp_path / "x", "draft", platforms=["cpu"])
    loaded = same(tmp_path / "x", translator, "draft")
    assert loaded.translate(LINES) == translator(LINES, "ar", beam=1)


def test_greedy_ar_writes_what_the_translator_writes(ar, translator):
    same(ar, translator, "ar", beam=1)


def test_beam_search_in_bfloat16_writes_what_the_translator_writes(tiny_run, tmp_path):
    model = dataclasses.replace(tiny_run.config.model, dtype="bfloat16", scan_layers=True)
    config = dataclasses.replace(tiny_run.config, model=model)
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    export.export(run.open_run(folder), tmp_path / "x", "ar", platforms=["cpu"], length_penalty=0.6)
    same(tmp_path / "x", Translator.from_run(folder), "ar", length_penalty=0.6)


def test_ids_in_and_ids_out(ar, translator):
    loaded = Exported.load(ar)
    vocabulary = translator.vocabulary
    source = vocabulary.encode(LINES[0])
    best, nothing = loaded.decode_ids([source, [1, 2]])
    assert nothing == ([], 0.0)
    assert loaded.decode(best.ids) == loaded.translate([LINES[0]])[0] != ""
    assert not {0, 1, 2, 3, 4} & set(best.ids)
    for wrong in ([], [1], source[1:], source[:-1], [1, 300, 2], [1, -1, 2]):
        with pytest.raises(ExportedError, match=r"source 1 is no source .* begin with 1, end with 2"):
            loaded.decode_ids([source, wrong])
    with pytest.raises(ExportedError, match="batch_size must be at least 1, got 0"):
        loaded.translate(LINES, batch_size=0)
    with pytest.raises(ExportedError, match=r"must be a list of lines, got str; pass \[line\] for one"):
        loaded.translate(LINES[0])


def test_warming_up_leaves_nothing_to_compile(ar, monkeypatch):
    loaded = Exported.load(ar)
    assert loaded.warm_up(batch_size=2) == len(BUCKETS)  # rows: always 2
    sizes = {name: program._cache_size() for name, program in loaded._programs.items()}
    loaded.translate(LINES, batch_size=2)
    assert {name: program._cache_size() for name, program in loaded._programs.items()} == sizes


def test_the_loader_reads_text_as_the_package_does():
    assert exported._TO_ESCAPE.pattern == text._TO_ESCAPE.pattern
    assert exported._TO_UNESCAPE.pattern == text._TO_UNESCAPE.pattern
    assert (exported._ESCAPED, exported._ESCAPES) == (text._ESCAPED, text._ESCAPES)
    rng = random.Random(0)
    for _ in range(200):
        line = "".join(rng.choice("ab \t\r\u00a0\u2028\0\u2581\u2585\ue0000\ud800é") for _ in range(12))
        assert exported.clean_line(line) == text.clean_line(line)
        assert exported._escape(line) == text._escape(line)


@pytest.mark.parametrize("start", [1, 2])
def test_ids_are_read_as_the_vocabulary_reads_them(ar, start, monkeypatch):
    manifest = json.loads((ar / "manifest.json").read_text())
    model = (ar / "vocab.model").read_bytes()
    manifest["ids"]["start"] = start  # 2: as BART, which begins with the end symbol
    loaded = Exported(manifest, [], {}, model)
    vocabulary = text.Vocabulary(model, SpecialIds(start=start), VocabConfig())
    rng = random.Random(1)
    for _ in range(200):
        row = [rng.choice([0, 1, 2, 3, 4, *range(5, 300)]) for _ in range(10)]
        row[0] = rng.choice([row[0], 1, 2])
        assert loaded.decode(row) == text.clean_line(vocabulary.decode(row))


# -- it needs jax and little else ------------------------------------------------------------------


def bare(folder, data, *arguments, python=BARE_PYTHON):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or python == sys.executable}
    command = [python, "-c", HIDE, str(folder / "load.py"), *arguments]
    return subprocess.run(command, input=data, capture_output=True, env=environment, timeout=300)


def test_load_py_runs_where_nothing_of_ours_is(nar, translator):
    data = "".join(f"{line}\n" for line in LINES).encode()
    done = bare(nar, b"\xef\xbb\xbf" + data)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "".join(f"{t}\n" for t in translator(LINES, "nar", **NAR))
    assert "line 7: " in done.stderr.decode()
    assert "cut to the first 24" in done.stderr.decode()


def run_main(folder, data, capsysbinary, monkeypatch, *arguments):
    """`python folder/load.py`, in this process."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    main = runpy.run_path(str(folder / "load.py"))["main"]
    code = main(list(arguments), folder)
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode()


def test_load_py_says_what_is_wrong_in_one_line(copy, capsysbinary, monkeypatch):
    assert run_main(copy, b"", capsysbinary, monkeypatch) == (0, "", "")
    code, out, err = run_main(copy, b"good\nb\xffd\n", capsysbinary, monkeypatch)
    assert (code, out) == (1, "")
    assert err.startswith("load.py: error: <stdin>:2: not UTF-8 at byte 2 of the line")
    (copy / "manifest.json").unlink()
    code, out, err = run_main(copy, b"x\n", capsysbinary, monkeypatch)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is no export: it has no manifest.json" in err


# -- exports that cannot be run --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params.npz", "programs/ar-8.stablehlo", "vocab.model"])
def test_a_damaged_or_missing_file(copy, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportedError, match=rf"{name} is damaged.*copy or export the whole folder again"):
        Exported.load(copy)
    path.unlink()
    with pytest.raises(ExportedError, match=rf"{name} is missing"):
        Exported.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"has format 1, this loader runs format 2; use the load.py"),
        ({"kind": "something"}, r"is not the manifest of an export"),
        (
            {"platforms": ["tpu", "cuda"]},
            r"programs for tpu, cuda, and jax runs on cpu here; set JAX_PLATFORMS=",
        ),
        ({"calling_convention": 99}, r"calling convention 99; jax [\d.]+ runs \d+ to \d+"),
    ],
)
def test_an_export_of_another_kind(copy, change, message):
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportedError, match=message):
        Exported.load(copy)


def test_a_platform_that_does_not_start(ar, monkeypatch):
    def fail():
        raise AssertionError

    monkeypatch.setattr(jax.export, "default_export_platform", fail)
    with pytest.raises(ExportedError, match=r"jax cannot start .* is not installed.* holds programs for cpu"):
        Exported.load(ar)


def test_half_a_manifest(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ExportedError, match=r"manifest.json is damaged"):
        Exported.load(copy)


@pytest.mark.parametrize("key", exported.KEYS)
def test_a_manifest_without_a_key(copy, key):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ExportedError, match=rf"manifest.json is damaged \('{key}' is not what it was\)"):
        Exported.load(copy)


@pytest.mark.parametrize("package", ["sentencepiece", "flatbuffers"])
def test_a_package_that_is_missing(ar, package, monkeypatch):
    hidden = [name for name in sys.modules if name.partition(".")[0] == package]
    if package == "flatbuffers":  # jax imports it late, and once
        hidden.append("jax._src.export.serialization")
    for name in [*hidden, package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportedError, match=rf"pip install {package}"):
        Exported.load(ar).translate(["Hund"])


# -- the folder ------------------------------------------------------------------------------------


def test_what_the_folder_holds(nar, translator):
    manifest = json.loads((nar / "manifest.json").read_text())
    files = {str(p.relative_to(nar)) for p in nar.rglob("*") if p.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    assert files >= {"load.py", "params.npz", "vocab.model", "vocab.json", "programs/remember-8.stablehlo"}
    assert (nar / "load.py").read_bytes() == pathlib.Path(exported.__file__).read_bytes()
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["options"]["candidates"] == 2
    assert [entry["source"] for entry in manifest["programs"]] == list(BUCKETS)
    assert [sorted(map(int, e["write"])) for e in manifest["programs"]] == [[8, 23], [8, 24, 47]]
    assert len(manifest["params"]) == len(jax.tree.leaves(translator.params))
    for path in (nar / "programs").iterdir():
        assert b".py" not in path.read_bytes(), "a path of this machine"
    assert not [p for p in nar.parent.iterdir() if p != nar]


def test_the_same_run_gives_the_same_bytes(long_run, ar, tmp_path):
    again = tmp_path / "again"
    export.export(long_run, again, "ar", platforms=["cpu"], beam=1)
    for path in ar.rglob("*"):
        if path.is_file() and path.name != "vocab.json":
            assert path.read_bytes() == (again / path.relative_to(ar)).read_bytes(), path


def test_an_export_is_replaced_and_nothing_else_is(long_run, copy, tmp_path, monkeypatch):
    def again(folder):
        return export.export(long_run, folder, "ar", platforms=["cpu"], checkpoint="2", beam=1)

    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "load.pyc").write_bytes(b"")
    assert again(copy)["checkpoint"] == "step 2"
    assert json.loads((copy / "manifest.json").read_text())["checkpoint"] == "step 2"
    Exported.load(copy)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds an export, and notes.txt, which is not part of it"):
        again(copy)
    with pytest.raises(ExportError, match=r"is not empty, and holds no export"):
        again(long_run.folder)
    with pytest.raises(ExportError, match=r"is a file; name a folder"):
        again(copy / "notes.txt")
    with pytest.raises(ExportError, match=r"export to a folder of this machine"):
        again("memory://bucket/x")
    (tmp_path / "empty").mkdir()
    again(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "empty"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ExportError, match=r"is not empty, and holds no export"):
        again(tmp_path / "links")
    monkeypatch.chdir(tmp_path / "empty")
    for here in (".", ".."):
        with pytest.raises(ExportError, match=r"is the current folder, or has it inside"):
            again(here)
    with pytest.raises(ExportError, match=r"--output=~nobodyx/x: "):
        again("~nobodyx/x")
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind_and_the_old_export_in_place(long_run, copy, tmp_path, monkeypatch):
    before = (copy / "manifest.json").read_bytes()

    def full(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(text.Vocabulary, "save", full)
    for folder in (copy, tmp_path / "new"):
        with pytest.raises(ExportError, match=r"cannot write .*: No space left on device; nothing was left"):
            export.export(long_run, folder, "ar", platforms=["cpu"], beam=1)
    assert (copy / "manifest.json").read_bytes() == before
    Exported.load(copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_a_renaming_that_fails_puts_the_old_export_back(copy, tmp_path):
    with pytest.raises(FileNotFoundError):
        export._put(tmp_path / "not there", copy)
    Exported.load(copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_an_export_set_aside_by_a_killed_process_is_there_again(long_run, copy, tmp_path):
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    dead = tmp_path / f".copy.{gone.stdout.strip()}.old"
    copy.rename(dead)
    with pytest.raises(DecodeError, match="decode must be one of"):
        export.export(long_run, copy, "both")  # asked for in vain, and nothing is lost
    Exported.load(copy)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]
    alive = tmp_path / f".copy.{os.getppid()}.old"
    copy.rename(alive)
    with pytest.raises(DecodeError, match="decode must be one of"):
        export.export(long_run, copy, "both")
    assert [p.name for p in tmp_path.iterdir()] == [alive.name], "another process is at it"


def test_what_killed_processes_left_goes_with_the_next_export(copy, tmp_path):
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    for name in (f".copy.{gone}.tmp", f".copy.{gone}.old", f".copy.{os.getppid()}.tmp", f".other.{gone}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half", "utf-8")
    with export._appearing(copy) as folder:
        shutil.copytree(copy, folder, dirs_exist_ok=True)
    Exported.load(copy)
    kept = {"copy", f".copy.{os.getppid()}.tmp", f".other.{gone}.tmp"}
    assert {p.name for p in tmp_path.iterdir()} == kept, "another process's, and another export's"


def test_a_mount_point_is_refused_before_anything_is_compiled(long_run, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(ExportError, match=r"is a mount point, .*; name a folder inside it"):
        export.export(long_run, tmp_path, "ar")
    with pytest.raises(DecodeError, match="decode must be one of"):
        export.export(long_run, tmp_path / "inside", "both")


def test_requests_that_cannot_be_served(long_run, tmp_path):
    for arguments, error, message in (
        ({"decode": "both"}, DecodeError, "decode must be one of"),
        ({"decode": "ar", "beem": 3}, DecodeError, "unknown decoding option 'beem'"),
        ({"decode": "ar", "batch_size": 0}, DecodeError, "batch_size must be at least 1"),
        ({"decode": "ar", "platforms": ["gpu"]}, ExportError, "must be some of cpu,cuda,tpu,rocm, got 'gpu'"),
        ({"decode": "ar", "platforms": []}, ExportError, "must be some of"),
    ):
        with pytest.raises(error, match=message):
            export.export(long_run, tmp_path / "x", **arguments)
    assert not list(tmp_path.iterdir())


# -- the verb --------------------------------------------------------------------------------------


def test_the_verb(long_run, translator, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JANUS_JAX_CACHE", "")
    place = [f"--workdir={long_run.folder}", f"--output={tmp_path / 'x'}"]
    assert cli.main(["export", *place, "--decode=ar", "--beam=1", "--platforms=cpu", "--batch_size=2"]) == 0
    out = capsys.readouterr().out
    assert "ar of step 1 for cpu" in out
    assert f"python {tmp_path / 'x' / 'load.py'} < source.txt" in out
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert [entry["rows"] for entry in manifest["programs"]] == [2, 2]
    for wrong, code, message in (
        (["--decode=ar", "--iterations=3"], 2, "--iterations is an option of --decode=nar"),
        (["--platforms=cpu,gpu"], 1, "must be some of"),
    ):
        assert cli.main(["export", *place, *wrong]) == code
        assert message in capsys.readouterr().err
    assert cli.main(["export", f"--workdir={tmp_path / 'none'}", f"--output={tmp_path / 'y'}"]) == 1
    assert "is not a run directory" in capsys.readouterr().err
    assert cli.main(["export", f"--workdir={long_run.folder}"]) == 2
    assert "--output" in capsys.readouterr().err
