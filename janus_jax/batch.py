"""Batches of token ids: their shape, how they are assembled, and how targets are corrupted.

A batch is a dict of arrays in the original token order, padded on the right to one length:

  source  [B, S] int32   BOS ... EOS PAD...
  target  [B, T] int32   BOS ... EOS PAD...
  masked  [B, T] bool    the set M: True where NAR and AUX must predict; never BOS, EOS or padding
  index   [B]    int32   number of the example in its split; -1 for a filler row, which is all PAD

Letters: B batch, S source length, T target length, n length of one target.
Room: pure core.  Imports config only; numpy on the host, no files, no devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from janus_jax.config import BatchConfig, SpecialIds

Batch = dict[str, np.ndarray]

FILLER = -1  # index of a row that holds no example
TRAIN_STREAM, EVAL_STREAM = 0, 1  # streams of `example_rng`

_LONGEST_SPAN = 127  # the table of span lengths ends here at the latest
_SMALLEST_PROBABILITY = 1e-7  # ... and where the tail of the Poisson falls below this


@dataclass(frozen=True, slots=True)
class Example:
    """One pair of a split, ready to be put in a batch."""

    index: int  # its number in the split
    source: np.ndarray  # [S] int32, BOS ... EOS
    target: np.ndarray  # [n] int32, BOS ... EOS
    masked: np.ndarray  # [n] bool


def spec(rows: int, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of a batch of `rows` rows, source and target padded to `length`."""
    tokens, ids = (rows, length), np.dtype(np.int32)
    return {
        "source": (tokens, ids),
        "target": (tokens, ids),
        "masked": (tokens, np.dtype(np.bool_)),
        "index": ((rows,), ids),
    }


def assemble(examples: Sequence[Example | None], rows: int, length: int, pad: int) -> Batch:
    """The batch of `examples`, in order, followed by filler rows up to `rows`; None is a filler row too.

    Raises:
      ValueError: more examples than rows, or an example longer than `length`.
    """
    if len(examples) > rows:
        raise ValueError(f"{len(examples)} examples do not fit into {rows} rows")
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec(rows, length).items()}
    source, target, masked, index = (batch[k] for k in ("source", "target", "masked", "index"))
    source.fill(pad)
    target.fill(pad)
    index.fill(FILLER)
    for row, example in enumerate(examples):
        if example is None:
            continue
        s, n = len(example.source), len(example.target)
        if max(s, n) > length:
            raise ValueError(f"example {example.index} has {s} and {n} tokens, more than {length}")
        source[row, :s] = example.source
        target[row, :n] = example.target
        masked[row, :n] = example.masked
        index[row] = example.index
    return batch


# -- corruption --------------------------------------------------------------------------------


def corrupt(target: np.ndarray, rng: np.random.Generator, config: BatchConfig, ids: SpecialIds) -> np.ndarray:
    """Draws the masked set M of one target (METHOD section 4).

    Args:
      target: [n] int32, BOS ... EOS without padding.
      rng: where the draw comes from; see `example_rng`.
      config: names the sampler and its parameters.
      ids: a token that equals `ids.mask` looks masked to the decoder, so it counts as masked.

    Returns:
      [n] bool, False at the first and the last position.  All False is possible in short targets.
    """
    n = len(target)
    if config.sampler == "span":
        masked = mask_span(n, rng, config.mask_rate, config.span_mean)
    else:
        masked = mask_uniform(n, rng)
    masked |= target == ids.mask
    masked[:1] = masked[-1:] = False
    return masked


def capacity(length: int, config: BatchConfig, ids: SpecialIds) -> int | None:
    """The most positions that `corrupt` can mask in a target of up to `length` tokens: a static size.

    None where that is all inner positions, so that there is nothing to save: uniform masks, a budget that
    large, and texts that may hold `ids.mask` themselves, because unk serves as mask.
    """
    if config.sampler != "span" or ids.mask == ids.unk:
        return None
    budget = math.ceil(config.mask_rate * length)  # what the lengths of the spans add up to
    return budget if budget < length - 2 else None


def mask_span(n: int, rng: np.random.Generator, rate: float, mean: float) -> np.ndarray:
    """[n] bool: a union of spans whose lengths add up to ceil(rate n); first and last never masked.

    Span lengths are Poisson(mean), zero included, drawn until they exhaust the budget but at most n
    of them; the last one takes what is left of it.  Starts are distinct and uniform over all n
    positions.  Spans may overlap, one that would run past the end shrinks to one position, and BOS
    and EOS are unmasked afterwards: fewer than `rate` end up masked, in short targets perhaps none.
    """
    budget = math.ceil(rate * n)
    lengths = _span_lengths(mean).searchsorted(rng.random(n), side="right")
    total = lengths.cumsum()
    spans = min(int(total.searchsorted(budget)) + 1, n)  # there are n distinct starts
    lengths = lengths[:spans]
    lengths[-1:] += budget - total[spans - 1 : spans]
    starts = rng.random(n).argsort()[:spans]
    ends = starts + np.where(starts + lengths > n, 1, lengths)
    # +1 where a span begins, -1 behind its end: positive running sums lie inside some span.
    edges = np.bincount(starts, minlength=n + 1) - np.bincount(ends, minlength=n + 1)
    masked = edges[:n].cumsum() > 0
    masked[:1] = masked[-1:] = False
    return masked


def mask_uniform(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] bool: k of the n - 2 inner positions, k uniform in 1 ... n - 2 (CMLM); none if n < 3."""
    masked = np.zeros(n, np.bool_)
    inner = n - 2
    if inner > 0:
        k = int(rng.random() * inner) + 1
        masked[1 + np.argsort(rng.random(inner))[:k]] = True
    return masked


@functools.lru_cache(maxsize=8)
def _span_lengths(mean: float) -> np.ndarray:
    """Cumulative probabilities of the span lengths 0, 1, ...: Poisson(mean), cut off and renormalised."""
    probabilities: list[float] = []
    for k in range(_LONGEST_SPAN + 1):
        probabilities.append(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)))
        if k > mean and probabilities[-1] < _SMALLEST_PROBABILITY:
            break
    cumulative = np.cumsum(probabilities)
    cumulative /= cumulative[-1]
    cumulative.setflags(write=False)  # shared by all callers
    return cumulative


def example_rng(seed: int, epoch: int, index: int, stream: int = TRAIN_STREAM) -> np.random.Generator:
    """The generator of one example in one epoch: a pure function of its arguments.

    Hosts, batches and order play no part, so corruption is the same on any number of machines and
    after a resume.  The arguments fill the key of a counter-based generator, none is hashed:
    different arguments never share a sequence.

    Args:
      seed: below 2**56.
      epoch: below 2**24.
      index: number of the example in its split, below 2**40.
      stream: below 2**8; keeps evaluation apart from training.
    """
    if not (0 <= seed < 1 << 56 and 0 <= epoch < 1 << 24 and 0 <= index < 1 << 40 and 0 <= stream < 1 << 8):
        raise ValueError(f"out of range: seed {seed}, epoch {epoch}, index {index}, stream {stream}")
    key = np.array([stream << 56 | seed, epoch << 40 | index], np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its key as it is: a third of the time of `Philox(key=...)`."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        if (n_words, dtype) != (2, np.uint64):
            raise ValueError("this key is for Philox: two words of 64 bits")
        return self._key
