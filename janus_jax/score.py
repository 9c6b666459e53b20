"""Scores of translations: strings in, metrics out.

Hypotheses and references are detokenised text, one string per sentence; each sentence has one or
more accepted wordings.  What the figures are:

  bleu          sacreBLEU as it stands: cased, tokenizer 13a, exponential smoothing.  The headline.
  chrf          sacreBLEU's chrF (character 6-grams, beta 2).
  bleu_tok_lc   the same BLEU after lower-casing both sides (tokenizer 13a, signature `case:lc`), for
                papers that report tokenised lower-case BLEU.  Those used the Moses tokenizer, so it comes
                close to their figures and is not the same; never print it beside a cased BLEU unlabelled.
  exact_match   share of sentences equal to one of their wordings (blanks collapsed, case kept).

Tokens, wherever they are counted, are those of 13a.  Rates and ratios are shares, BLEU and chrF
percentages.  BLEU of a corpus without a single 4-gram is 0 by definition, even when all is right.

Letters: n sentences, R resamples.
Room: pure core.  Imports nothing of ours; touches no file, no device, no clock.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

LENGTH_EDGES = (5, 10, 15, 20, 30, 40)  # upper ends of the length buckets; the last bucket is open


class ScoreError(ValueError):
    """Hypotheses and references that cannot be scored; the message says which and why."""


@dataclass(frozen=True)
class Bucket:
    """BLEU of the sentences whose first wording has a length in this range."""

    tokens: str  # "<=5", "6-10", ..., ">40"
    sentences: int
    bleu: float  # over the n-gram orders that occur, so that a bucket of 3-token sentences is not 0
    length_ratio: float


@dataclass(frozen=True)
class Scores:
    """Everything known about one set of hypotheses; see the head of the module."""

    sentences: int
    bleu: float
    bleu_signature: str
    brevity_penalty: float
    chrf: float
    chrf_signature: str
    bleu_tok_lc: float
    bleu_tok_lc_signature: str
    exact_match: float
    length_ratio: float  # tokens of the hypotheses / of the reference nearest in length
    repetition: float  # share of tokens equal to the token before them
    repetition_reference: float  # the same of the first wordings: what is natural in this text
    repeating_lines: float  # share of sentences with at least one such token
    empty: int  # sentences translated to nothing
    by_length: tuple[Bucket, ...]  # buckets without a sentence are left out

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; buckets as a list of dicts."""
        return {**dataclasses.asdict(self), "by_length": [dataclasses.asdict(b) for b in self.by_length]}


@dataclass(frozen=True)
class Comparison:
    """Paired bootstrap of the BLEU of two systems on the same sentences."""

    bleu_a: float
    bleu_b: float
    difference: float  # b - a
    interval: tuple[float, float]  # central 95 % of the resampled differences
    # Of no difference, as sacreBLEU's `--paired-bs` computes it: with one tail, once the difference is clear,
    # so about half of a two-sided one.
    p_value: float
    samples: int
    seed: int
    signature: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "interval": list(self.interval)}


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """All scores of `hypotheses` (n strings) against `references` (n tuples of accepted wordings).

    Raises:
      ScoreError: unequal counts, nothing to score, a sentence without a wording, or a bare string
        where the wordings of a sentence are due.
    """
    _check(references, hypotheses=hypotheses)
    streams = _streams(references)
    bleu, lower, chrf = BLEU(force=True), BLEU(force=True, lowercase=True), CHRF()
    cased = bleu.corpus_score(hypotheses, streams)
    lowered = lower.corpus_score(hypotheses, streams)
    characters = chrf.corpus_score(hypotheses, streams)
    tokens = [tokenize(h) for h in hypotheses]
    first = [tokenize(r[0]) for r in references]
    return Scores(
        sentences=len(hypotheses),
        bleu=cased.score,
        bleu_signature=str(bleu.get_signature()),
        brevity_penalty=cased.bp,
        chrf=characters.score,
        chrf_signature=str(chrf.get_signature()),
        bleu_tok_lc=lowered.score,
        bleu_tok_lc_signature=str(lower.get_signature()),
        exact_match=sum(map(is_exact, hypotheses, references)) / len(hypotheses),
        length_ratio=_ratio(cased.sys_len, cased.ref_len),
        repetition=_ratio(sum(map(repeats, tokens)), sum(map(len, tokens))),
        repetition_reference=_ratio(sum(map(repeats, first)), sum(map(len, first))),
        repeating_lines=sum(repeats(t) > 0 for t in tokens) / len(tokens),
        empty=sum(not h.strip() for h in hypotheses),
        by_length=by_length(hypotheses, references),
    )


def compare(
    hypotheses_a: Sequence[str],
    hypotheses_b: Sequence[str],
    references: Sequence[Sequence[str]],
    seed: int = 12345,
    samples: int = 1000,
) -> Comparison:
    """Is system b better or worse than a?  Paired bootstrap resampling of cased BLEU (Koehn 2004).

    The resamples and the p-value are those of sacreBLEU's own test with the same seed (its class reads
    the seed from the environment and cannot take 0, hence not called), except that a tie counts as
    chance: two equal systems have p = 1, not the smallest p there is.

    Raises:
      ScoreError: as `score`.
    """
    _check(references, hypotheses_a=hypotheses_a, hypotheses_b=hypotheses_b)
    bleu = BLEU(force=True)
    streams = _streams(references)
    real_a = bleu.corpus_score(hypotheses_a, streams).score
    real_b = bleu.corpus_score(hypotheses_b, streams).score
    n = len(references)
    drawn = np.random.default_rng(seed).choice(n, size=(samples, n), replace=True)
    times_drawn = np.stack([np.bincount(row, minlength=n) for row in drawn])  # [R, n]
    a, b = (
        np.array([_bleu_of(s) for s in times_drawn @ _statistics(h, references)])  # [R]
        for h in (hypotheses_a, hypotheses_b)
    )
    spread = np.abs(b - a)
    beyond = int(np.sum(spread - spread.mean() >= abs(real_b - real_a)))
    low, high = np.percentile(b - a, (2.5, 97.5))
    return Comparison(
        bleu_a=real_a,
        bleu_b=real_b,
        difference=real_b - real_a,
        interval=(float(low), float(high)),
        p_value=(beyond + 1) / (samples + 1),
        samples=samples,
        seed=seed,
        signature=str(bleu.get_signature()),
    )


def by_length(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    edges: Sequence[int] = LENGTH_EDGES,
) -> tuple[Bucket, ...]:
    """BLEU by the length of the first wording in tokens; a bucket's range ends at its edge, included."""
    members: list[list[int]] = [[] for _ in range(len(edges) + 1)]
    for i, wordings in enumerate(references):
        members[bisect.bisect_left(edges, len(tokenize(wordings[0])))].append(i)
    names = [f"<={edges[0]}", *(f"{a + 1}-{b}" for a, b in itertools.pairwise(edges)), f">{edges[-1]}"]
    buckets = []
    for name, chosen in zip(names, members, strict=True):
        if chosen:
            result = BLEU(force=True, effective_order=True).corpus_score(
                [hypotheses[i] for i in chosen], _streams([references[i] for i in chosen])
            )
            ratio = _ratio(result.sys_len, result.ref_len)
            buckets.append(Bucket(tokens=name, sentences=len(chosen), bleu=result.score, length_ratio=ratio))
    return tuple(buckets)


def tokenize(text: str) -> list[str]:
    """The tokens that BLEU counts (13a)."""
    return _TOKENIZER(text.rstrip()).split()


def repeats(tokens: Sequence[str]) -> int:
    """How many tokens equal the one before: the typical fault of parallel prediction."""
    return sum(a == b for a, b in itertools.pairwise(tokens))


def is_exact(hypothesis: str, wordings: Sequence[str]) -> bool:
    """True where the hypothesis is one of the wordings, blanks collapsed and case kept."""
    return hypothesis.split() in [w.split() for w in wordings]


_TOKENIZER = Tokenizer13a()


def _check(references: Sequence[Sequence[str]], **systems: Sequence[str]) -> None:
    for name, hypotheses in systems.items():
        if len(hypotheses) != len(references):
            raise ScoreError(
                f"{name.replace('_', ' ')} and references differ in number: {len(hypotheses)} and "
                f"{len(references)}; each sentence needs exactly one hypothesis"
            )
    if not references:
        raise ScoreError("nothing to score: the set has no sentences")
    for i, wordings in enumerate(references):
        if isinstance(wordings, str):
            raise ScoreError(f"sentence {i}: references are tuples of wordings, got the string {wordings!r}")
        if not wordings:
            raise ScoreError(f"sentence {i}: has no reference wording")


def _streams(references: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Wordings as sacreBLEU wants them: stream k holds the k-th wording of each sentence, or None."""
    return [list(stream) for stream in itertools.zip_longest(*references)]


def _statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """BLEU's sufficient statistics [n, 10]: lengths of both sides, matches and totals of 1- to 4-grams."""
    bleu = BLEU(force=True)
    rows = []
    for hypothesis, wordings in zip(hypotheses, references, strict=True):
        one = bleu.corpus_score([hypothesis], [[w] for w in wordings])
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.array(rows, np.int64)


def _bleu_of(statistics: np.ndarray) -> float:
    """Corpus BLEU from summed statistics [10]."""
    sys_len, ref_len, *counts = statistics.tolist()
    return BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp").score


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
