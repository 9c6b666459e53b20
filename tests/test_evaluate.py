import dataclasses
import io
import json

import pytest
from rich.console import Console

from janus_jax import evaluate, report, run
from janus_jax.config import DecodeConfig
from janus_jax.data.lines import DataError
from janus_jax.evaluate import EvaluationError, name_of
from janus_jax.translator import DecodeError


@pytest.fixture(scope="module")
def evaluations(tiny_run, tiny_translator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    opened = run.open_run(tiny_run.folder)
    return folder, [
        evaluate.evaluate(opened, tiny_translator, "test", mode, folder=folder) for mode in ("ar", "nar")
    ]


def test_hypotheses_and_scores_lie_beside_each_other(tiny_run, tiny_translator, evaluations):
    folder, (ar, nar) = evaluations
    names = {f"test.{name}.{suffix}" for name in ("ar-b2", "nar-T3-c3") for suffix in ("hyp", "json")}
    assert {p.name for p in folder.iterdir()} == names
    sources = (tiny_run.raw / "test.de").read_text().splitlines()
    assert ar.sources == sources
    assert [r for (r,) in ar.references] == (tiny_run.raw / "test.en").read_text().splitlines()
    for mode, one in (("ar", ar), ("nar", nar)):
        written = (folder / f"test.{one.name}.hyp").read_text().removesuffix("\n").split("\n")
        assert written == one.hypotheses == tiny_translator(sources, mode)
        kept = json.loads((folder / f"test.{one.name}.json").read_text())
        assert kept == json.loads(json.dumps(one.result))
        assert kept["checkpoint"] == "step 1"
        assert kept["scores"]["sentences"] == len(sources)
        assert "version:" in kept["scores"]["bleu_signature"]
        assert kept["vocabulary_sha256"] == tiny_translator.vocabulary.sha256
        assert kept["device"] == "cpu"
        assert kept["versions"]["jax"]
        lengths = [len(tiny_translator.vocabulary.encode(s)) for s in sources]
        cut = [{"line": i + 1, "tokens": n, "kept": 24} for i, n in enumerate(lengths) if n > 24]
        assert kept["cut"] == cut != []
        assert {"sentences_per_s", "tokens_per_s", "compile_seconds"} <= set(kept["speed"])
    assert ar.result["options"] == {
        "beam": 2, "length_penalty": 1.0, "max_length_a": 1.5, "max_length_b": 10, "ban_unk": True,
    }  # fmt: skip
    assert 1 <= nar.result["passes_per_sentence"] <= 3
    assert ar.result["lengths"] == nar.result["lengths"] == "predicted"


def test_true_lengths_are_those_of_the_references(tiny_run, tiny_translator, tmp_path):
    opened = run.open_run(tiny_run.folder)
    one = evaluate.evaluate(
        opened, tiny_translator, "test", "nar", true_length=True, candidates=1, folder=tmp_path
    )
    assert one.name == "nar-T3-c1-true_length"
    assert one.result["lengths"] == "of the references"
    encode = tiny_translator.vocabulary.encode
    lengths = [len(encode(r)) - 2 for (r,) in one.references]
    assert one.hypotheses == [
        found[0].text
        for found in tiny_translator.decode(one.sources, "nar", lengths=lengths, candidates=1)[0]
    ]
    assert one.hypotheses != tiny_translator(one.sources, "nar", candidates=1)
    with pytest.raises(DecodeError, match="lengths are for nar and draft"):
        evaluate.evaluate(opened, tiny_translator, "test", "ar", true_length=True, folder=tmp_path)


def test_the_first_examples_only(tiny_run, tiny_translator, tmp_path):
    opened = run.open_run(tiny_run.folder)
    one = evaluate.evaluate(opened, tiny_translator, "val", limit=2, checkpoint="1", folder=tmp_path)
    assert one.name == "ar-b2-step1-first2"
    assert len(one.hypotheses) == len(one.references) == 2
    assert len((tmp_path / "val.ar-b2-step1-first2.hyp").read_text().splitlines()) == 2
    assert evaluate.evaluate(opened, tiny_translator, "val", limit=99, folder=tmp_path).name == "ar-b2"


@pytest.mark.parametrize(
    ("decode", "options", "rest", "name"),
    [
        ("ar", {}, {}, "ar-b5"),
        ("ar", {"beam": 1, "length_penalty": 0.6}, {}, "ar-b1-lp0.6"),
        ("ar", {"iterations": 3, "rescore": True, "tokens": 9}, {}, "ar-b5"),
        ("nar", {"iterations": 4}, {}, "nar-T4-c3"),
        ("nar", {"beam": 1, "length_penalty": 0.6}, {}, "nar-T10-c3"),
        ("nar", {"rescore": True, "length_penalty": 0.6}, {}, "nar-T10-c3-lp0.6-rescore"),
        ("nar", {"early_stop": True, "ban_unk": False}, {}, "nar-T10-c3-early-no_ban_unk"),
        ("ar", {"max_length_a": 2.0, "max_length_b": 5}, {}, "ar-b5-la2-lb5"),
        ("ar", {}, {"checkpoint": "average:5", "limit": 10}, "ar-b5-average5-first10"),
        ("ar", {}, {"checkpoint": "1000"}, "ar-b5-step1000"),
        ("ar", {}, {"checkpoint": "latest"}, "ar-b5-latest"),
        ("draft", {"draft_block": 4, "draft_branches": 0}, {}, "draft"),  # the same text
        ("draft", {"draft_block": 4, "draft_top_k": 3}, {}, "draft-k3-block4"),
        ("draft", {"draft_branches": 2, "draft_top_k": 3}, {}, "draft-k3-branches2"),
        ("nar", {}, {"true_length": True, "checkpoint": "1000"}, "nar-T10-c3-true_length-step1000"),
    ],
)
def test_names_tell_ways_of_decoding_apart(decode, options, rest, name):
    assert name_of(decode, dataclasses.replace(DecodeConfig(), **options), **rest) == name


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(DecodeConfig)])
def test_no_option_that_matters_is_missing_from_the_name(option):
    default = getattr(DecodeConfig(), option)
    other = dataclasses.replace(
        DecodeConfig(), **{option: not default if isinstance(default, bool) else default + 1}
    )
    for mode in ("ar", "nar", "draft"):
        matters = option in evaluate.relevant(mode, other)
        assert (name_of(mode, other) != name_of(mode, DecodeConfig())) == matters


def test_tables(evaluations):
    console = Console(width=60, record=True, file=io.StringIO())
    evaluate.print_scores(evaluations[1], console)
    evaluate.print_examples(evaluations[1], 1, console)
    text = console.export_text()
    for expected in (
        "test, 7 sentences, step 1", "ar-b2", "nar-T3-c3", "BLEU, tokenised lower-case", "exact match, %",
        "compile time, s (not in the rates)", "case:lc", "by length of the reference", "6-10",
        "source     ", "reference  ", evaluations[1][0].hypotheses[0],
    ):  # fmt: skip
        assert expected in text


def test_refinement_pictures(tiny_translator, tmp_path):
    drawn = evaluate.draw_refinements(tiny_translator, ["Ein Hund.", " "], tmp_path / "eval")
    assert drawn == [tmp_path / "eval" / "refinement-1.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_a_place_that_takes_no_files_is_found_before_decoding(
    tiny_run, tiny_translator, tmp_path, monkeypatch
):
    opened = run.open_run(tiny_run.folder)
    monkeypatch.setattr(evaluate, "decode_together", None)
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file", "it is no folder"), (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(EvaluationError, match=rf"{folder} cannot be written to: {why}; .*--output_dir"):
            evaluate.evaluate(opened, tiny_translator, "test", folder=folder)


def test_scores_that_a_full_disk_cannot_keep_are_told(tiny_run, tiny_translator, tmp_path, monkeypatch):
    def full(path, value):
        raise report.ReportError(f"{path}: No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    with pytest.raises(
        EvaluationError, match=r"test ar-b5-first2 has BLEU [\d.]+, chrF [\d.]+, but is not kept: "
    ):
        evaluate.evaluate(
            run.open_run(tiny_run.folder), tiny_translator, "test", "ar", limit=2, folder=tmp_path, beam=5
        )


def test_what_cannot_be_evaluated(tiny_run, tiny_translator, tmp_path, monkeypatch):
    opened = run.open_run(tiny_run.folder)
    with pytest.raises(DataError, match=r"no split 'tset'; it has .*test"):
        evaluate.evaluate(opened, tiny_translator, "tset", folder=tmp_path)
    with pytest.raises(DecodeError, match=r"decode.beam must be at least 1"):
        evaluate.evaluate(opened, tiny_translator, "test", beam=0, folder=tmp_path)
    with pytest.raises(DataError, match=r"run `janus-jax prepare` first"):
        evaluate.evaluate(run.Run(tmp_path, opened.config), tiny_translator, "test")
    monkeypatch.setattr(evaluate, "open_split", lambda *_: [])
    with pytest.raises(EvaluationError, match=r"split 'test' in .* has no examples"):
        evaluate.evaluate(opened, tiny_translator, "test", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
