"""Scores against sacreBLEU's command line conventions, worked examples and hand counts."""

import gzip
import json
import logging

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from janus_jax.score import ScoreError, by_length, compare, is_exact, repeats, score, tokenize

REFERENCES = [
    ("A dog runs across the green meadow.",),
    ("Two men are sitting on a bench in the park.", "Two men sit on a park bench."),
    ("It is half past two.", "It's 2:30 p.m.", "It is two thirty in the afternoon."),
]
HYPOTHESES = [
    "a dog runs over the green meadow.",
    "Two men sit on a bench bench in the park.",
    "It's  2:30 p.m.",
]


def test_single_reference_figures_are_sacrebleus_own():
    single = [r[:1] for r in REFERENCES]
    result = score(HYPOTHESES, single)
    stream = [[r[0] for r in single]]
    assert result.bleu == BLEU().corpus_score(HYPOTHESES, stream).score
    assert result.bleu_tok_lc == BLEU(lowercase=True).corpus_score(HYPOTHESES, stream).score
    assert result.chrf == CHRF().corpus_score(HYPOTHESES, stream).score
    assert result.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result.bleu_tok_lc_signature.startswith("nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:")
    assert result.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_lower_casing_only_matters_to_the_labelled_extra():
    upper = [h.upper() for h in HYPOTHESES]
    assert score(upper, REFERENCES).bleu_tok_lc == score(HYPOTHESES, REFERENCES).bleu_tok_lc
    assert score(upper, REFERENCES).bleu < score(HYPOTHESES, REFERENCES).bleu


def test_any_wording_counts_and_their_number_may_vary():
    best = [r[-1] for r in REFERENCES]
    result = score(best, REFERENCES)
    assert result.bleu == pytest.approx(100)
    assert result.chrf == pytest.approx(100)
    assert result.exact_match == 1
    assert "nrefs:var" in result.bleu_signature
    assert score(best, [r[:1] for r in REFERENCES]).bleu < 60


def test_more_wordings_never_lower_bleu_precision():
    few = score(HYPOTHESES, [r[:1] for r in REFERENCES])
    assert score(HYPOTHESES, REFERENCES).bleu > few.bleu


def test_exact_match_collapses_blanks_and_keeps_case():
    assert is_exact(" It's  2:30 p.m. ", REFERENCES[2])
    assert not is_exact("it's 2:30 p.m.", REFERENCES[2])
    assert score(HYPOTHESES, REFERENCES).exact_match == pytest.approx(1 / 3)


def test_repetition_is_counted_in_tokens_and_in_lines():
    assert tokenize("the the dog.") == ["the", "the", "dog", "."]
    assert repeats(list("aaabb")) == 3
    result = score(
        ["the the the cat", "no no", "fine here", ""], [("the cat",), ("no",), ("fine",), ("very very",)]
    )
    assert result.repetition == pytest.approx(3 / 8)
    assert result.repeating_lines == 2 / 4
    assert result.repetition_reference == pytest.approx(1 / 6)
    assert result.empty == 1


def test_length_ratio_takes_the_wording_nearest_in_length():
    result = score(["one two three"], [("one two three four five six", "one two")])
    assert result.length_ratio == 3 / 2
    assert result.brevity_penalty == 1


def test_buckets_partition_the_sentences_by_reference_length():
    references = [(" ".join(["w"] * n),) for n in (1, 5, 6, 10, 11, 40, 41, 90)]
    hypotheses = [r[0] for r in references]
    buckets = by_length(hypotheses, references)
    assert [(b.tokens, b.sentences) for b in buckets] == [
        ("<=5", 2),
        ("6-10", 2),
        ("11-15", 1),
        ("31-40", 1),
        (">40", 2),
    ]
    assert all(b.bleu == pytest.approx(100) and b.length_ratio == 1 for b in buckets)


def test_a_bucket_of_very_short_sentences_is_not_zero_but_the_corpus_is():
    result = score(["yes", "oh no"], [("yes",), ("oh no",)])
    assert result.bleu == 0
    assert result.by_length[0].bleu == pytest.approx(100)


@pytest.mark.parametrize(
    ("hypothesis", "reference"),
    [("", "a b c d e"), ("a", "a"), ("", ""), ("x y", "a b"), ("\u2581 ok", "ok")],
)
def test_tiny_corpora_neither_warn_nor_crash(hypothesis, reference, caplog):
    caplog.set_level(logging.WARNING)
    result = score([hypothesis], [(reference,)])
    assert 0 <= result.bleu <= 100
    assert 0 <= result.chrf <= 100
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["sentences"] == 1
    assert not caplog.records


def test_text_that_looks_tokenised_does_not_log(caplog):
    score(["a b ."] * 150, [("a b .",)] * 150)
    assert not caplog.records


def test_unusable_input_is_named():
    with pytest.raises(ScoreError, match="2 and 3"):
        score(HYPOTHESES[:2], REFERENCES)
    with pytest.raises(ScoreError, match="nothing to score"):
        score([], [])
    with pytest.raises(ScoreError, match=r"sentence 1: .*no reference"):
        score(["a", "b"], [("a",), ()])
    with pytest.raises(ScoreError, match=r"sentence 0: .*string"):
        score(["a"], ["a"])
    with pytest.raises(ScoreError, match=r"hypotheses b and references .* 1 and 3"):
        compare(HYPOTHESES, HYPOTHESES[:1], REFERENCES)


@pytest.fixture(scope="module")
def english(corpora) -> list[str]:
    with gzip.open(corpora / "multi30k" / "val.en.gz", "rt", encoding="utf-8") as f:
        return [line.rstrip("\n") for _, line in zip(range(60), f, strict=False)]


def test_bootstrap_agrees_with_sacrebleus_own(english, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "7")
    a = [s.replace("man", "person").replace(" in ", " at ") for s in english]
    b = [" ".join(s.split()[:-1]) if i % 3 else s for i, s in enumerate(english)]
    ours = compare(a, b, [(s,) for s in english], seed=7, samples=200)
    _, theirs = PairedTest([("a", a), ("b", b)], {"BLEU": BLEU()}, [english], test_type="bs", n_samples=200)()
    result_a, result_b = theirs["BLEU"]
    assert (ours.bleu_a, ours.bleu_b) == (result_a.score, result_b.score)
    assert ours.p_value == pytest.approx(result_b.p_value)
    assert ours.interval[0] < ours.difference < ours.interval[1]


def test_bootstrap_sees_a_clear_difference_and_none_where_there_is_none(english):
    references = [(s, s.lower()) for s in english]
    worse = [" ".join(s.split()[::2]) for s in english]
    clear = compare(english, worse, references, seed=0, samples=200)
    assert clear.difference < -40
    assert clear.p_value < 0.02
    assert clear.interval[1] < 0
    none = compare(worse, worse, references, seed=0, samples=200)
    assert (none.difference, none.interval) == (0, (0, 0))
    assert none.p_value == 1
    assert clear == compare(english, worse, references, seed=0, samples=200)
    assert json.loads(json.dumps(clear.to_dict()))["seed"] == 0
