import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import janus_jax
from janus_jax import engine, losses, run
from janus_jax.checkpoint import CheckpointError, NoCheckpointError
from janus_jax.config import LossConfig
from janus_jax.run import RunError
from janus_jax.text import Vocabulary, VocabularyError
from janus_jax.translator import DecodeError, Translator

LINES = ["Ein Hund sieht den Ball.", "", "Baum", "Ein Mann malt den Fluss.", "q\0z 日本"]


LONG = "wort " * 50


@pytest.fixture
def translator(tiny_translator):
    return tiny_translator


@pytest.mark.parametrize("decode", ["ar", "nar", "draft"])
def test_a_line_does_not_depend_on_the_others(translator, decode):
    together = translator.decode(LINES, decode)[0]
    assert len(together) == len(LINES)
    assert [len(found) for found in together] == [1] * len(LINES)
    for line, found in zip(LINES, together, strict=True):
        alone = translator.decode([line], decode, batch_size=1)[0][0]
        assert alone[0].text == found[0].text
        assert alone[0].tokens == found[0].tokens
        assert alone[0].score == pytest.approx(found[0].score, abs=1e-5)
    backwards = translator.decode(LINES[::-1], decode)[0][::-1]
    assert [f[0].text for f in backwards] == [f[0].text for f in together]


@pytest.mark.parametrize("decode", ["ar", "nar", "draft"])
def test_eight_devices_write_what_one_writes(tiny_run, translator, decode):
    params, _ = run.open_run(tiny_run.folder).params()
    config = dataclasses.replace(tiny_run.config, mesh=dataclasses.replace(tiny_run.config.mesh, data=8))
    spread = Translator(params, config, translator.vocabulary)
    assert spread(LINES, decode) == translator(LINES, decode)


def test_drafting_writes_what_greedy_search_writes_in_no_more_passes(translator):
    found, report = translator.decode([*LINES, LONG], "draft")
    expected, _ = translator.decode([*LINES, LONG], "ar", beam=1)
    assert [f[0].text for f in found] == [f[0].text for f in expected]
    assert 5 <= report.passes <= report.tokens + 5  # EOS of each is a symbol too


def test_options_are_checked_by_value_and_type_each_time(translator):
    assert translator.options("nar", iterations=1).iterations == 1
    assert translator.options("nar", iterations=1) == translator.options("nar", iterations=1)
    for value in (True, 1.0, [1], "1"):  # the first two equal 1
        with pytest.raises(DecodeError, match=r"decode\.iterations must be int, got"):
            translator.options("nar", iterations=value)


def test_options_that_are_nothing_to_a_program_compile_none(translator):
    translator(LINES, "nar", iterations=3)
    before = len(translator._engine._compiled)
    translator(LINES, "nar", iterations=3, beam=7, draft_block=3)
    assert len(translator._engine._compiled) == before


def test_no_more_programs_are_kept_than_a_process_can_hold(tiny_run, translator, monkeypatch):
    params, _ = run.open_run(tiny_run.folder).params()
    one = Translator(params, tiny_run.config, translator.vocabulary)
    monkeypatch.setattr(engine, "KEPT", 2)
    for beam in (1, 2, 3):
        assert one(LINES[:1], "ar", beam=beam) == translator(LINES[:1], "ar", beam=beam)
    kept = list(one._engine._compiled)
    assert [key[0].decode.beam for key in kept] == [2, 3]
    one(LINES[:1], "ar", beam=2)
    one(LINES[:1], "ar", beam=4)
    assert [key[0].decode.beam for key in one._engine._compiled] == [2, 4], "the one used longest ago goes"


def test_report(translator):
    _, report = translator.decode([*LINES, LONG], "nar")
    assert report.sentences == 6
    assert report.batches == 2  # five lines that are not blank, three rows a batch
    assert 5 <= report.passes <= 5 * 3
    [(line, tokens, kept)] = report.cut
    assert (line, kept) == (5, 24)
    assert tokens > 50
    assert report.speed()["sentences_per_s"] == pytest.approx(6 / report.seconds)
    found, report = translator.decode([*LINES, LONG], "nar")
    assert report.compile_seconds == 0
    assert report.tokens == sum(best.tokens for best, *_ in found)


def test_compiled_once_per_shape(tiny_run):
    fresh = Translator.from_run(tiny_run.folder)
    first = fresh.decode(LINES, "ar")[1]
    again = fresh.decode(LINES[::-1], "ar")[1]
    assert first.compile_seconds > 0
    assert again.compile_seconds == 0
    assert again.shapes == first.shapes
    fresh.set_params(jax.tree.map(np.zeros_like, run.open_run(tiny_run.folder).params()[0]))
    assert fresh.decode(LINES, "ar")[1].compile_seconds == 0


def test_no_batch_is_decoded_on_the_time_of_compiling(tiny_run, monkeypatch):
    told = []

    def noting(name, function):
        def call(*args, **options):
            told.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(jax, "block_until_ready", noting("wait", jax.block_until_ready))
    monkeypatch.setattr(jax.stages.Lowered, "compile", noting("compile", jax.stages.Lowered.compile))
    Translator.from_run(tiny_run.folder).decode([*LINES, LONG], "nar")
    assert told.count("compile") >= 2
    assert told == ["wait", "compile"] * told.count("compile")


def test_the_package_offers_it_without_importing_jax():
    code = "import sys, janus_jax; assert 'jax' not in sys.modules; print(janus_jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
    assert janus_jax.Translator is Translator
    with pytest.raises(AttributeError, match="no attribute 'Translater'"):
        _ = janus_jax.Translater


def test_nothing_and_blank_lines_need_no_model(translator):
    assert translator([], "ar") == []
    found, report = translator.decode(["", "  "], "nar", nbest=2)
    assert [[h.text for h in f] for f in found] == [[""], [""]]
    assert report.batches == 0


def test_nbest_is_ordered_and_starts_with_the_best(translator):
    for decode, n in (("ar", 2), ("nar", 3)):
        best = translator.decode(LINES, decode)[0]
        several = translator.decode(LINES, decode, nbest=n)[0]
        assert [f[0].text for f in several] == [f[0].text for f in best]
        for found in several:
            scores = [h.score for h in found]
            assert scores == sorted(scores, reverse=True)
        assert max(map(len, several)) == n


def test_of_candidates_of_the_same_length_one_is_written(translator):
    """Of five lengths around the limit only those up to it are left."""
    options = {"candidates": 5, "max_length_a": 0.0, "max_length_b": 4}
    best = translator(LINES, "nar", **options)
    several, _ = translator.decode(LINES, "nar", nbest=5, **options)
    assert [found[0].text for found in several] == best
    for found in several:
        assert len({h.tokens for h in found}) == len(found) <= 3
        assert np.isfinite([h.score for h in found]).all()


def test_ranks_of_candidates():
    scores = np.array([[-3.0, -1.0, -1.0, -2.0], [-np.inf, -2.0, -1.0, -1.0]])
    order, ordered = engine.ranked(scores, np.array([[4, 5, 5, 6], [2, 3, 4, 5]]))
    assert order.tolist() == [[1, 3, 0, 2], [2, 3, 1, 0]]
    assert ordered.tolist() == [[-1, -2, -3, -np.inf], [-1, -1, -2, -np.inf]]


def test_given_lengths_are_kept_whatever_the_batch(translator):
    lengths = [4, 9, 1, 7, 12]  # of a blank line none; others within 1.5 times the source and 10
    (alone, *_), _ = translator.decode(LINES[:1], "nar", lengths=[4], candidates=1)
    found, _ = translator.decode(LINES, "nar", lengths=lengths, candidates=1)
    assert [f[0].tokens for f in found] == [4, 0, 1, 7, 12]
    assert alone[0].text == found[0][0].text
    around, _ = translator.decode(LINES, "nar", lengths=lengths, candidates=3, nbest=3)
    tokens = [sorted(h.tokens for h in hypotheses) for hypotheses in around]
    assert tokens == [[3, 4, 5], [0], [1, 2], [6, 7, 8], [11, 12, 13]]  # of two that are equal one
    drafted, _ = translator.decode(LINES, "draft", lengths=lengths)
    assert [f[0].text for f in drafted] == translator(LINES, "ar", beam=1)


def test_rescoring_orders_candidates_by_their_ar_score(translator):
    plain = translator.decode(LINES, "nar", nbest=3, candidates=3)[0]
    rescored = translator.decode(LINES, "nar", nbest=3, candidates=3, rescore=True)[0]
    for a, b in zip(plain, rescored, strict=True):
        assert {h.text for h in a} == {h.text for h in b}
        assert [h.score for h in b] == sorted((h.score for h in b), reverse=True)
    assert [f[0].score for f in plain] != [f[0].score for f in rescored]


def test_refinement_ends_with_the_translation(translator):
    for line in (LINES[0], LINES[3], LONG):
        text, passes = translator.refine(line)
        assert len(passes) == 3
        assert text == translator([line], "nar", early_stop=False)[0]
        slots = len(passes[0].tokens)
        assert all(passes[0].filled)
        for before, after in itertools.pairwise(passes):
            assert len(after.tokens) == len(after.confidence) == slots
            kept = [i for i in range(slots) if not after.filled[i]]
            assert [after.tokens[i] for i in kept] == [before.tokens[i] for i in kept]
        assert sum(passes[-1].filled) < slots
    assert translator.refine(" ") == ("", [])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"decode": "both"}, "decode must be one of ar, nar, draft, got 'both'"),
        ({"beem": 3}, "unknown decoding option 'beem'; there are ban_unk, beam"),
        ({"beam": 0}, "^decode.beam must be at least 1, got 0$"),
        ({"max_length_a": float("inf")}, "^decode.max_length_a must be a finite number, got inf$"),
        ({"decode": "nar", "iterations": 2.5}, "decode.iterations must be int, got 2.5"),
        ({"nbest": 3}, "nbest = 3 needs beam of at least that; it is 2"),
        ({"decode": "draft", "nbest": 2}, "nbest = 2 needs another mode"),
        ({"decode": "nar", "nbest": 4}, "nbest = 4 needs candidates of at least that; it is 3"),
        ({"nbest": 0}, "nbest = 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"decode": "nar", "lengths": [3]}, "1 lengths for 5 lines"),
        ({"decode": "ar", "lengths": [3] * 5}, "lengths are for nar and draft"),
    ],
)
def test_requests_that_cannot_be_served(translator, request_, message):
    with pytest.raises(DecodeError, match=message):
        translator.decode(LINES, **request_)


def test_one_line_is_given_as_a_list(translator):
    for line in ("Hallo", b"Hallo"):
        with pytest.raises(DecodeError, match=r"must be a list of lines, got .*; pass \[line\] for one"):
            translator(line)


def test_drafts_under_the_least_limit_write_what_greedy_search_writes(translator):
    for most in (1, 2):
        options = {"max_length_a": 0.0, "max_length_b": most}
        assert translator(LINES, "draft", **options) == translator(LINES, "ar", beam=1, **options)


def test_a_mode_that_was_not_trained(tiny_run, translator):
    config = dataclasses.replace(tiny_run.config, loss=LossConfig(objective="cmlm"))
    assert not losses.streams_needed(config.loss)["ar"]
    other = Translator(run.open_run(tiny_run.folder).params()[0], config, translator.vocabulary)
    assert other.modes == ("nar",)
    with pytest.raises(DecodeError, match=r"objective 'cmlm' and decodes nar only"):
        other(LINES, "ar")


def test_a_model_without_an_ar_side_does_not_rescore(tiny_run, translator):
    decode = dataclasses.replace(tiny_run.config.decode, rescore=True)
    config = dataclasses.replace(tiny_run.config, loss=LossConfig(objective="cmlm"), decode=decode)
    other = Translator(run.open_run(tiny_run.folder).params()[0], config, translator.vocabulary)
    assert other.decode(LINES, "nar")[0] == translator.decode(LINES, "nar", rescore=False)[0]
    assert not other.options("nar").rescore
    assert not other.options("nar", rescore=False).rescore
    with pytest.raises(DecodeError, match=r"rescore needs a model .* 'cmlm'; leave it out, or train with"):
        other(LINES, "nar", rescore=True)


# -- run directories that cannot be used -----------------------------------------------------------


def test_choice_of_checkpoint(tiny_run):
    assert [Translator.from_run(tiny_run.folder, c).name for c in ("best", "latest", "2", "average:2")] == [
        "step 1",
        "step 2",
        "step 2",
        "average of steps 1, 2",
    ]
    for wrong in ("newest", "average:x", "-1"):
        with pytest.raises(RunError, match=r"must be best, latest, a step or average:N"):
            Translator.from_run(tiny_run.folder, wrong)
    with pytest.raises(NoCheckpointError, match=r"no checkpoint of step 7"):
        Translator.from_run(tiny_run.folder, "7")
    with pytest.raises(NoCheckpointError, match=r"cannot average the last 3"):
        Translator.from_run(tiny_run.folder, "average:3")


def test_no_run_directory(tmp_path):
    with pytest.raises(RunError, match=r"is not a run directory: it has no config.json"):
        Translator.from_run(tmp_path / "nothing")


def test_no_checkpoint(tiny_copy):
    shutil.rmtree(tiny_copy.folder / "checkpoints")
    with pytest.raises(NoCheckpointError, match=r"no checkpoint in .*checkpoints"):
        Translator.from_run(tiny_copy.folder)


def test_half_written_checkpoint(tiny_copy):
    for file in (tiny_copy.folder / "checkpoints" / "2").rglob("*"):
        if file.is_file() and "scores" not in file.parts:
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged"):
        Translator.from_run(tiny_copy.folder, "latest")
    assert Translator.from_run(tiny_copy.folder, "best").name == "step 1"
    # What kill -9 in the middle of a save leaves behind is no checkpoint.
    shutil.rmtree(tiny_copy.folder / "checkpoints" / "2")
    (tiny_copy.folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    assert Translator.from_run(tiny_copy.folder, "latest").name == "step 1"


def test_a_vocabulary_of_another_run(tiny_copy, tmp_path):
    text = ["Zug fährt ab", "train leaves", "Käse und Brot", "cheese and bread", "viele andere Wörter"]
    model = tiny_copy.config.model
    other = Vocabulary.train(text, tiny_copy.config.vocab, 290, model.ids)
    other.save(tiny_copy.folder)
    with pytest.raises(RunError, match=r"number of entries 290, the model has 300; put back the vocab.model"):
        Translator.from_run(tiny_copy.folder)
    lines = [p.read_text() for p in sorted(tiny_copy.raw.iterdir())]
    same_size = Vocabulary.train(
        [*text * 20, *"".join(lines).splitlines()], tiny_copy.config.vocab, 300, model.ids
    )
    same_size.save(tiny_copy.folder)
    with pytest.raises(RunError, match=r"sha256 [0-9a-f]{64}, the model has [0-9a-f]{64}"):
        Translator.from_run(tiny_copy.folder)


def test_a_damaged_or_missing_vocabulary(tiny_copy):
    model = tiny_copy.folder / "vocab.model"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(VocabularyError, match=r"is not the vocabulary that .*vocab.json describes"):
        Translator.from_run(tiny_copy.folder)
    model.unlink()
    with pytest.raises(VocabularyError, match=r"vocab.model is missing"):
        Translator.from_run(tiny_copy.folder)


def test_a_configuration_of_another_run(tiny_copy):
    path = tiny_copy.folder / "config.json"
    values = json.loads(path.read_text())
    values["model"]["ffn"] = 48
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"not the configuration of the checkpoint .*has shape \(16, 32\)|ffn"):
        Translator.from_run(tiny_copy.folder)
    path.write_text("{")
    with pytest.raises(RunError, match=r"config.json cannot be used"):
        Translator.from_run(tiny_copy.folder)
