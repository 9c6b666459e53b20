import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import types

import pytest

import janus_jax
from janus_jax import cli, config, export, mesh, run
from janus_jax.config import Config, DecodeConfig
from janus_jax.translator import Translator

VERBS = ("prepare", "train", "evaluate", "translate", "bench", "compile", "plot", "demo")
BASE = "from janus_jax import config\ndef get_config():\n    c = config.to_config_dict()\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv(cli.CACHE, os.environ["JAX_COMPILATION_CACHE_DIR"])
    monkeypatch.delenv(cli.DEBUG, raising=False)


@pytest.mark.parametrize("portable", [True, False])
def test_portable_numbers_are_asked_for_before_devices_start(monkeypatch, portable):
    calls = []
    monkeypatch.setattr(mesh, "ask_for_portable_numbers", lambda: calls.append("ask"))
    monkeypatch.setattr(mesh, "check_devices", lambda: calls.append("start"))
    cli.start_devices(Config(mesh=config.MeshConfig(portable=portable)))
    assert calls == ["ask", "start"][not portable :]


@pytest.fixture
def config_file(tmp_path):
    def write(body, name="experiment.py"):
        path = tmp_path / name
        path.write_text(BASE + body + "\n    return c\n")
        return path

    return write


@pytest.fixture
def standard_input(monkeypatch):
    def give(data):
        monkeypatch.setattr(
            sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
        )

    return give


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a function in the place of the shell `janus_jax.<verb>`."""

    def put(verb, function):
        monkeypatch.setattr(janus_jax, verb, types.SimpleNamespace(**{verb: function}), raising=False)

    return put


def fails(capsys, code, *argv):
    """The one message of a command that fails with `code`."""
    assert cli.main([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("janus-jax: error: ")
    assert "Traceback" not in err
    return err.removeprefix("janus-jax: error: ").removesuffix("\n")


# -- help ------------------------------------------------------------------------------------------


def test_help_is_quick_and_names_every_verb():
    code = "import sys; from janus_jax import cli; cli.main(['--help']); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in VERBS:
        assert f"\n    {verb}" in done.stdout


def test_python_m():
    done = subprocess.run([sys.executable, "-m", "janus_jax", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'trian'" in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    assert f"  janus-jax {verb} --" in capsys.readouterr().out


def test_every_decoding_option_has_a_flag_and_a_help():
    assert list(cli.DECODE_HELP) == [f.name for f in dataclasses.fields(DecodeConfig)]
    assert cli.ONLY_FOR == {
        "beam": "ar", "iterations": "nar", "candidates": "nar", "early_stop": "nar", "rescore": "nar",
        "draft_block": "draft", "draft_branches": "draft", "draft_top_k": "draft", "draft_margin": "draft",
    }  # fmt: skip


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("janus-jax 0.")


# -- configuration ---------------------------------------------------------------------------------


def test_overrides_of_every_type():
    rest, overrides = cli.split_overrides(
        [
            "train", "--config=x.py", "--config.seed=3", "--config.optim.lr", "1e-3",
            "--config.data.name=a=b", "--config.batch.buckets=8,16", "--noconfig.train.tensorboard",
            "--config.model.remat", "--workdir=w", "--config.decode.early_stop=true", "--config.seed=4",
        ]
    )  # fmt: skip
    assert rest == ["train", "--config=x.py", "--workdir=w"]
    changed = cli.override(config.from_dict({"batch": {"buckets": [8]}}), overrides)
    assert config.differences(Config(), changed) == {
        "seed": (0, 4),
        "optim.lr": (5e-4, 1e-3),
        "data.name": ("multi30k", "a=b"),
        "batch.buckets": ((16, 24, 32, 48, 64), (8, 16)),
        "train.tensorboard": (True, False),
        "model.remat": (False, True),
        "decode.early_stop": (False, True),
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.dmi=3", ".model.dmi: unknown configuration key; did you mean --config.model.dim?"),
        ("--config.model.dim=x", ".model.dim must be a whole number, got 'x'"),
        ("--config.model.dim=1.5", ".model.dim must be a whole number, got '1.5'"),
        ("--config.optim.lr=fast", ".optim.lr must be a number, got 'fast'"),
        ("--config.train.tensorboard=2", ".train.tensorboard must be true or false, got '2'"),
        ("--config.batch.buckets=a,b", ".batch.buckets must be whole numbers separated by commas, got 'a,b'"),
        (
            "--config.model=3",
            ".model is a section; set one of its keys, such as --config.model.vocab_size=...",
        ),
        ("--config.model.dim", ".model.dim needs a value: --config.model.dim=..."),
        ("--noconfig.model.dim", ".model.dim: only a key that is true or false can be negated this way"),
        ("--model.dim=3", "unknown flag --model.dim; did you mean --config.model.dim?"),
        ("--wrokdir=3", "unknown flag --wrokdir; did you mean --workdir?"),
        ("extra", "unexpected argument 'extra' (see janus-jax train --help)"),
    ],
)
def test_what_is_not_understood_costs_one_line(capsys, tmp_path, config_file, argument, message):
    argv = ["train", f"--config={config_file('')}", f"--workdir={tmp_path / 'w'}"]
    if message.startswith("."):
        message = argument.partition(".")[0] + message
    assert fails(capsys, 2, *argv, argument) == message
    assert not (tmp_path / "w").exists()


def test_values_that_do_not_go_together(capsys, tmp_path, config_file):
    message = fails(capsys, 1, "train", "--config", config_file(""), "--workdir=w", "--config.model.heads=3")
    assert message == "unusable configuration:\n  model.heads (3) must divide model.dim (256)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "    return c)\n", ":4: unmatched ')'"),
        (BASE + "    c.modle.dim = 3\n    return c\n", ":4: AttributeError: "),
        (BASE + "    c.model.dmi = 3\n    return c\n", ": unusable configuration:\n  unknown key"),
        (BASE, ": get_config() must return a ConfigDict, got NoneType; start from configs/base.py"),
        ("import no_such_module\n", ":1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n", " has no function get_config()"),
    ],
)  # fmt: skip
def test_a_configuration_file_that_cannot_be_used(capsys, tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    found = fails(capsys, 1, "train", f"--config={path}", "--workdir=w")
    assert found.startswith(f"{path}{message}")


def test_no_configuration_file(capsys, tmp_path):
    path = tmp_path / "none.py"
    assert (
        fails(capsys, 1, "train", f"--config={path}", "--workdir=w")
        == f"--config={path}: No such file or directory"
    )
    message = f"--config=FILE is needed: {tmp_path} has no config.json to go on with"
    assert fails(capsys, 2, "train", f"--workdir={tmp_path}") == message
    assert fails(capsys, 2, "bench") == "give --config=FILE, or --workdir=DIR of a run"


def test_a_configuration_imports_its_neighbours(tmp_path):
    folder = tmp_path / "my_experiments"
    folder.mkdir()
    (folder / "common.py").write_text(BASE + "    c.seed = 7\n    return c\n")
    (folder / "one.py").write_text(
        "from my_experiments import common\n"
        "def get_config():\n    c = common.get_config()\n    c.model.dim = 64\n    return c\n"
    )
    before = list(sys.path)
    found = cli.load_config_file(folder / "one.py")
    assert (found.seed, found.model.dim) == (7, 64)
    assert sys.path == before


# -- verbs -----------------------------------------------------------------------------------------


def test_train_goes_on_with_the_configuration_of_the_run(tmp_path, config_file, stand_in):
    asked = []
    stand_in("train", lambda c, folder: asked.append((c, folder)) or 75)
    folder = tmp_path / "w"
    path = config_file("    c.seed = 5")
    assert (
        cli.main(["train", "--config", str(path), "--workdir", str(folder), "--config.train.steps=7"]) == 75
    )
    run.claim(folder, asked[0][0])
    assert cli.main(["train", f"--workdir={folder}", "--config.train.steps=9"]) == 75
    assert [(c.seed, c.train.steps, f) for c, f in asked] == [(5, 7, folder), (5, 9, folder)]


def test_bench_takes_a_run_or_a_configuration(tiny_run, config_file, stand_in):
    asked = []
    stand_in("bench", lambda c, folder: asked.append((c, folder)) or 0)
    assert cli.main(["bench", f"--workdir={tiny_run.folder}"]) == 0
    assert cli.main(["bench", f"--config={config_file('    c.seed = 5')}"]) == 0
    assert asked == [(tiny_run.config, tiny_run.folder), (dataclasses.replace(Config(), seed=5), None)]


def test_bench_of_a_run_wants_its_model(tiny_run, capsys):
    told = fails(capsys, 1, "bench", f"--workdir={tiny_run.folder}", "--config.model.ffn=8")
    assert told.startswith("what is asked for is not the configuration of the checkpoint in ")
    assert told.endswith("; leave out --config and the keys of `model`")


def test_demo(tmp_path, config_file, stand_in):
    stand_in("demo", lambda c, folder: 3 * (c.seed == 5 and folder == tmp_path / "w"))
    assert cli.main(["demo", f"--config={config_file('    c.seed = 5')}", f"--workdir={tmp_path / 'w'}"]) == 3


def test_prepare_claims_the_folder_and_says_when_there_is_nothing_to_do(tiny_copy, capsys):
    assert cli.main(["prepare", f"--workdir={tiny_copy.folder}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    message = fails(capsys, 1, "prepare", f"--workdir={tiny_copy.folder}", "--config.seed=9")
    assert "belongs to a run with another configuration:\n  seed: 0 there, 9 asked for" in message
    with run.locked(tiny_copy.folder):
        assert "is in use by another" in fails(capsys, 1, "prepare", f"--workdir={tiny_copy.folder}")


def test_evaluate_both_ways(tiny_run, tmp_path, capsys):
    argv = [
        "evaluate",
        f"--workdir={tiny_run.folder}",
        f"--output-dir={tmp_path}",
        "--iterations=3",
        "--refine=1",
    ]
    assert cli.main([*argv, "--max-length-b", "10", "--show=1", "--limit=5", "--checkpoint=1"]) == 0
    out = capsys.readouterr().out
    names = ("ar-b2-step1-first5", "nar-T3-c3-step1-first5")
    for name in names:
        assert f"written: {tmp_path}/test.{name}.hyp, .json" in out
    files = {f"test.{name}.{suffix}" for name in names for suffix in ("hyp", "json")} | {"refinement-1.png"}
    assert {p.name for p in tmp_path.iterdir()} == files
    assert out.count("\nsource ") == 1
    assert json.loads((tmp_path / f"test.{names[1]}.json").read_text())["checkpoint"] == "step 1"


def test_evaluate_refuses_options_of_the_other_mode(tiny_run, capsys):
    argv = ["evaluate", f"--workdir={tiny_run.folder}", "--decode=ar"]
    assert (
        fails(capsys, 2, *argv, "--iterations=3")
        == "--iterations is an option of --decode=nar, this is --decode=ar"
    )
    both = ("--decode=nar", "--true_length", "--refine=1")
    assert "leave out --true_length" in fails(capsys, 2, *argv[:-1], *both)
    assert "--true_length is about --decode=nar, this is --decode=ar" in fails(
        capsys, 2, *argv, "--true_length"
    )
    assert "data.DataError" not in fails(capsys, 1, *argv, "--split=tset")
    assert fails(capsys, 1, *argv, "--beam=0") == "decode.beam must be at least 1, got 0"
    message = "--config.decode.beam: evaluate takes its configuration from the run directory; use --beam=3"
    assert fails(capsys, 2, *argv, "--config.decode.beam=3") == message
    message = fails(capsys, 2, *argv, "--bean=3")
    assert message == "unknown flag --bean; did you mean --beam?"
    assert "must be true or false, got 'maybe'" in fails(capsys, 2, *argv, "--rescore=maybe")
    assert "must be a number from 1 up, got '0'" in fails(capsys, 2, *argv, "--batch_size=0")


@pytest.mark.parametrize("mode", ["ar", "nar"])
def test_translate_is_a_filter(tiny_run, tiny_translator, capsysbinary, standard_input, mode):
    standard_input("Ein Hund.\r\n\n \nBaum\0\n日本".encode())
    assert cli.main(["translate", f"--workdir={tiny_run.folder}", f"--decode={mode}"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert out.split("\n") == [*tiny_translator(["Ein Hund.", "", "", "Baum\0", "日本"], mode), ""]


def test_translate_files(tiny_run, tiny_translator, tmp_path, capsys):
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Ein Hund.\nBaum\n")
    argv = ["translate", f"--workdir={tiny_run.folder}", f"--input={source}", f"--output={target}"]
    assert cli.main(argv) == 0
    assert target.read_text().splitlines() == tiny_translator(["Ein Hund.", "Baum"])
    assert capsys.readouterr().out == ""
    target.write_text("old")
    source.write_bytes(b"good\nb\xffd\n")
    assert f"{source}:2: not UTF-8 at byte 2 of the line" in fails(capsys, 1, *argv)
    assert target.read_text() == "old"
    assert (
        fails(capsys, 1, *argv[:2], f"--input={tmp_path / 'no'}")
        == f"{tmp_path / 'no'}: No such file or directory"
    )


def test_sigterm_leaves_no_half_file(tiny_run, tmp_path, capsys, monkeypatch):
    def end(*_, **__):
        assert any(name.startswith(".out") for name in os.listdir(tmp_path / "to"))
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    source, folder = tmp_path / "in", tmp_path / "to"
    folder.mkdir()
    source.write_text("Ein Hund.\n")
    place = [f"--workdir={tiny_run.folder}", f"--output={folder / 'out'}"]
    monkeypatch.setattr(Translator, "decode", end)
    assert fails(capsys, 143, "translate", *place, f"--input={source}") == "terminated"
    monkeypatch.setattr(export, "_write_programs", end)
    assert fails(capsys, 143, "export", *place) == "terminated"
    assert not list(folder.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_translate_nothing(tiny_run, capsys, standard_input):
    standard_input(b"")
    assert cli.main(["translate", f"--workdir={tiny_run.folder}"]) == 0
    assert capsys.readouterr().out == ""


def test_bad_utf8_is_found_before_the_model_is_loaded(tmp_path, capsys, standard_input):
    standard_input(b"fine\n\xff\n")
    message = fails(capsys, 1, "translate", f"--workdir={tmp_path}")
    assert message.startswith("<stdin>:2: not UTF-8 at byte 1 of the line")


def test_a_missing_folder_for_the_output_is_found_before_the_model_is_loaded(tmp_path, capsys):
    message = fails(capsys, 1, "translate", f"--workdir={tmp_path}", f"--output={tmp_path / 'no' / 'out'}")
    assert message.endswith(f"there is no folder {tmp_path / 'no'}; make it, or name another file")


def test_plot(tmp_path, capsys):
    rows = [{"step": s, "kind": "train", "metrics": {"loss": 3.0 / s}, "timing": {}} for s in (1, 2, 3)]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert cli.main(["plot", f"--workdir={tmp_path / 'a'},{tmp_path / 'b'}"]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'a' / 'training.png'}\n"
    assert (tmp_path / "a" / "training.png").read_bytes().startswith(b"\x89PNG")
    picture = tmp_path / "one.svg"
    assert cli.main(["plot", f"--workdir={tmp_path / 'a'}", f"--output={picture}"]) == 0
    assert "<svg" in picture.read_text()
    assert capsys.readouterr().out == f"written: {picture}\n"
    assert "no metrics here" in fails(capsys, 1, "plot", f"--workdir={tmp_path}")


# -- errors ----------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint(tmp_path, tiny_run, capsys, standard_input):
    for name in ("config.json", "vocab.model", "vocab.json"):
        (tmp_path / name).write_bytes((tiny_run.folder / name).read_bytes())
    standard_input(b"x\n")
    assert "no checkpoint in" in fails(capsys, 1, "translate", f"--workdir={tmp_path}")
    assert "no checkpoint in" in fails(capsys, 1, "evaluate", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x/y"), 1, "/x/y: No space left on device"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (config.ConfigError("bad"), 1, "bad"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore"),
            1,
            "out of memory: RESOURCE",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_expected_errors(capsys, monkeypatch, stand_in, tiny_run, error, code, message):
    def fail(*_):
        raise error

    stand_in("train", fail)
    assert fails(capsys, code, "train", f"--workdir={tiny_run.folder}").startswith(message)
    monkeypatch.setenv(cli.DEBUG, "1")
    assert cli.main(["train", f"--workdir={tiny_run.folder}"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_defects_keep_their_traceback(stand_in, tiny_run):
    stand_in("train", lambda *_: [][0])
    with pytest.raises(IndexError):
        cli.main(["train", f"--workdir={tiny_run.folder}"])


def test_a_reader_that_goes_away_ends_it_quietly(tiny_run, tmp_path):
    metrics = '{"step": 1, "kind": "train", "metrics": {"loss": 1.0}, "timing": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(metrics)
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "janus_jax", "plot", f"--workdir={tmp_path}"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_where_compiled_programs_are_kept(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(mesh, "set_compilation_cache", asked.append)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in (str(tmp_path / "here"), "~/there", "", None, "gs://bucket/cache"):
        monkeypatch.setenv(cli.CACHE, value) if value is not None else monkeypatch.delenv(cli.CACHE)
        cli.use_compilation_cache()
    assert asked == [str(tmp_path / name) for name in ("here", "there", *2 * (".cache/janus_jax",))]
    assert not os.path.exists("gs:")
    assert all(os.path.isdir(folder) for folder in asked)
    assert capsys.readouterr().err == ""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cli.CACHE, str(tmp_path / "file" / "cache"))
    cli.use_compilation_cache()
    assert "compiled programs are not kept" in capsys.readouterr().err
    assert len(asked) == 4
