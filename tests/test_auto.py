"""`--decode=auto`: the choice, and what is kept of the measurement."""

import dataclasses
import errno
import json
import shutil

import pytest

from janus_jax import auto, run, ways
from janus_jax.auto import Measured, pick
from janus_jax.cli import main
from janus_jax.translator import Translator

FOUND = [
    Measured("nar", {"iterations": 1}, bleu=20.0, sentences_per_s=900.0, alone_per_s=90.0),
    Measured("draft", {}, bleu=30.0, sentences_per_s=300.0, alone_per_s=70.0),
    Measured("ar", {"beam": 1}, bleu=30.0, sentences_per_s=400.0, alone_per_s=60.0),
    Measured("ar", {"beam": 5}, bleu=31.0, sentences_per_s=100.0, alone_per_s=20.0),
]


@pytest.mark.parametrize(
    ("keep", "batch_size", "chosen"), [(0.5, None, 0), (0.9, None, 2), (0.9, 1, 1), (0.98, 8, 3), (1.0, 1, 3)]
)
def test_the_fastest_that_is_good_enough(keep, batch_size, chosen):
    assert pick(FOUND, keep, batch_size) is FOUND[chosen]


def test_every_way_is_one_way():
    every = (*auto.WAYS, *auto.WITHOUT_AR)
    assert len({(way.decode, *way.options.items()) for way in every}) == len(every)
    assert len({way.label for way in every}) == len(every)


def test_a_model_with_one_side_has_ways_of_its_own():
    assert auto.tried(["ar", "nar", "draft"]) == list(auto.WAYS)
    assert auto.tried(["ar"]) == [ways.GREEDY, ways.BEAM]
    labels = [way.label for way in auto.tried(["nar"])]
    assert labels == [
        "NAR T = 1, 1 candidate",
        "NAR T = 4, 1 candidate",
        "NAR T = 4",
        "NAR T = 10",
        "NAR T = 10, 7 candidates",
    ]


def test_measured_once_and_kept_by_machine(tiny_run, tmp_path, monkeypatch, capfd):
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    opened = run.open_run(tmp_path / "run")
    translator = Translator.from_run(opened.folder)
    monkeypatch.setattr(auto, "WAYS", (ways.GREEDY, ways.STRICT, ways.nar(1)))
    monkeypatch.setattr(auto, "SENTENCES", 3)
    monkeypatch.setattr(auto, "ALONE", 2)
    (opened.folder / auto.FILE).write_text("not JSON")  # can be made anew
    first = auto.choose(opened, translator)
    [(here, kept)] = json.loads((opened.folder / auto.FILE).read_text()).items()
    assert "cpu" in here
    assert [way["decode"] for way in kept] == ["ar", "draft", "nar"]
    assert all(way["sentences_per_s"] > 0 and way["alone_per_s"] > 0 for way in kept)
    assert kept[0]["bleu"] == kept[1]["bleu"]  # strict drafts write what greedy search writes
    measure = auto.measure
    monkeypatch.setattr(auto, "measure", None)  # not again
    assert auto.choose(opened, translator) == first
    assert f"auto: {first.name}" in capfd.readouterr().err
    source = tmp_path / "source"
    source.write_text("Ein Hund.\n\n")
    command = ["translate", f"--workdir={opened.folder}", f"--input={source}", f"--output={tmp_path / 'out'}"]
    assert main([*command, "--decode=auto", "--keep=1"]) == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 2
    asked = []

    def decode(self, lines, mode, *, batch_size=None, **options):
        asked.append(options)
        return decode_lines(self, lines, mode, batch_size=batch_size, **options)

    decode_lines = Translator.decode
    monkeypatch.setattr(auto, "measure", measure)
    monkeypatch.setattr(Translator, "decode", decode)
    assert main([*command, "--decode=auto", "--max_length_b=3"]) == 0  # measured with what is asked for
    assert len(asked) > 4
    assert all(options["max_length_b"] == 3 for options in asked)
    assert len(json.loads((opened.folder / auto.FILE).read_text())) == 2
    assert main([*command, "--decode=ar", "--keep=1"]) == 2
    assert "--keep is an option of --decode=auto" in capfd.readouterr().err
    assert main([*command, "--decode=auto", "--nbest=2"]) == 2
    assert "--nbest=2 needs a mode, such as --decode=ar" in capfd.readouterr().err


def test_a_measurement_holds_for_the_devices_and_options_it_was_made_with(tiny_run, tiny_translator):
    def here(**changed):
        config = dataclasses.replace(tiny_run.config, **changed)
        return auto._here(
            Translator(tiny_translator.params, config, tiny_translator.vocabulary, name="step 1"), {}
        )

    def decoding(**options):
        return dataclasses.replace(tiny_run.config.decode, **options)

    plain = here()
    assert plain == auto._here(tiny_translator, {})
    assert plain != here(mesh=dataclasses.replace(tiny_run.config.mesh, data=2))
    for options in ({"max_length_a": 1.0}, {"length_penalty": 0.6}, {"tokens": 512}, {"ban_unk": False}):
        assert plain != here(decode=decoding(**options)) == auto._here(tiny_translator, options)
    assert plain != here(data=dataclasses.replace(tiny_run.config.data, dev_split="test"))
    assert plain == here(decode=decoding(beam=4, iterations=7, candidates=2)), "each way sets its own"


def test_where_nothing_can_be_written_it_is_measured_each_time(tiny_run, monkeypatch, capfd):
    def refuse(path, value):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(auto.report, "write_json", refuse)
    monkeypatch.setattr(auto, "measure", lambda *_: FOUND)
    opened = run.open_run(tiny_run.folder)
    assert auto.choose(opened, Translator.from_run(opened.folder), keep=1.0) == FOUND[3]
    err = capfd.readouterr().err
    assert f"auto: the measurement is not kept: {opened.folder / auto.FILE}: Read-only file system" in err
    assert not (opened.folder / auto.FILE).exists()
