"""Batches of token ids: their shape, and how targets are corrupted, all rows of a batch at once.

A batch is a dict of arrays in the original token order, padded on the right to one length:

  source  [B, S] int32   BOS ... EOS PAD...
  target  [B, T] int32   BOS ... EOS PAD...
  masked  [B, T] bool    the set M: True where NAR and AUX must predict; never BOS, EOS or padding
  index   [B]    int32   number of the example in its split; -1 for a filler row, which is all PAD
  turn    [B, T] int32   with batch.order = random alone: when a place in M has its turn, from 0; 0 elsewhere

Letters: B batch, S source length, T target length, n length of one target.
Room: pure core.  Imports config only; numpy on the host, no files, no devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from janus_jax.config import BatchConfig, SpecialIds

Batch = dict[str, np.ndarray]

FILLER = -1  # index of a row that holds no example
TRAIN_STREAM, EVAL_STREAM = 0, 1  # streams of `example_rng`

_LONGEST_SPAN = 127  # the table of span lengths ends here at the latest
_SMALLEST_PROBABILITY = 1e-7  # ... and where the tail of the Poisson falls below this


def spec(rows: int, length: int, order: str = "sentence") -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of a batch of `rows` rows, source and target padded to `length`."""
    tokens, ids = (rows, length), np.dtype(np.int32)
    turn = {"turn": (tokens, ids)} if order == "random" else {}
    return {
        "source": (tokens, ids),
        "target": (tokens, ids),
        "masked": (tokens, np.dtype(np.bool_)),
        "index": ((rows,), ids),
        **turn,
    }


# -- corruption --------------------------------------------------------------------------------


def corrupted(
    index: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    rngs: Sequence[np.random.Generator | None],
    config: BatchConfig,
    ids: SpecialIds,
) -> Batch:
    """The batch of padded pairs with their sets M, and the turns that `batch.order` asks for.

    Args:
      index: [B] int32, FILLER where a row holds no example.
      source: [B, S] int32, BOS ... EOS PAD...; a filler row is all PAD.
      target: [B, T] int32, likewise.
      rngs: of each row, used up in order of row; None for fillers.  See `example_rng`.
      config: names the sampler and its parameters; M is the same in every order.
      ids: special symbols.
    """
    masked = corrupt(target, rngs, config, ids)
    turn = {"turn": draw_turns(masked, rngs)} if config.order == "random" else {}
    return {"source": source, "target": target, "masked": masked, "index": index, **turn}


def corrupt(
    target: np.ndarray, rngs: Sequence[np.random.Generator | None], config: BatchConfig, ids: SpecialIds
) -> np.ndarray:
    """Draws the masked set M of each target (docs/method.md section 4).

    Args:
      target: [B, T] int32, BOS ... EOS PAD...
      rngs: where the draws of each row come from; a row's M depends on no other row, nor on T.
      config: names the sampler and its parameters.
      ids: a token that equals `ids.mask` looks masked to the decoder, so it counts as masked.

    Returns:
      [B, T] bool, False at a target's first and last position and beyond.  All False is possible in
      short targets.
    """
    lengths = np.sum(target != ids.pad, axis=1)
    if config.sampler == "span":
        masked = mask_span(lengths, target.shape[1], rngs, config.mask_rate, config.span_mean)
    else:
        masked = mask_uniform(lengths, target.shape[1], rngs)
    return (masked | (target == ids.mask)) & _inner(lengths, target.shape[1])


def draw_turns(masked: np.ndarray, rngs: Sequence[np.random.Generator | None]) -> np.ndarray:
    """A random order over each M, [B, T] bool -> [B, T] int32: turns from 0 on; 0 outside M."""
    turns = np.zeros(masked.shape, np.int32)
    for row, places, rng in zip(turns, masked, rngs, strict=True):
        if rng:
            row[places] = rng.permutation(int(places.sum()))
    return turns


def capacity(length: int, config: BatchConfig, ids: SpecialIds) -> int | None:
    """The most positions that `corrupt` can mask in a target of up to `length` tokens: a static size.

    None where that is all inner positions, so that there is nothing to save: uniform masks, a budget that
    large, and texts that may hold `ids.mask` themselves, because unk serves as mask.
    """
    if config.sampler != "span" or ids.mask == ids.unk:
        return None
    budget = math.ceil(config.mask_rate * length)  # what the lengths of the spans add up to
    return budget if budget < length - 2 else None


def mask_span(
    lengths: np.ndarray,
    width: int,
    rngs: Sequence[np.random.Generator | None],
    rate: float,
    mean: float,
) -> np.ndarray:
    """[B] lengths n -> [B, width] bool: unions of spans whose lengths add up to ceil(rate n).

    Span lengths are Poisson(mean), zero included, drawn until they exhaust the budget but at most n
    of them; the last one takes what is left of it.  Starts are distinct and uniform over all n
    positions.  Spans may overlap, one that would run past the end shrinks to one position, and BOS
    and EOS are unmasked afterwards: fewer than `rate` end up masked, in short targets perhaps none.
    """
    drawn = np.full((2, len(lengths), width), 2.0)  # beyond the length: later than every draw
    for rng, n, first, second in zip(rngs, lengths.tolist(), *drawn, strict=True):
        if rng:
            rng.random(out=first[:n])
            rng.random(out=second[:n])
    n, place = lengths[:, None], np.arange(width)
    budget = np.ceil(rate * n).astype(np.int64)
    spans = _span_lengths(mean).searchsorted(drawn[0], side="right") * (place < n)
    total = spans.cumsum(axis=1)
    count = np.minimum(np.sum(total < budget, axis=1, keepdims=True) + 1, n)  # there are n distinct starts
    spans += (place == count - 1) * (budget - total)
    starts = drawn[1].argsort(axis=1)
    ends = starts + np.where(starts + spans > n, 1, spans)
    # +1 where a span begins, -1 behind its end: positive running sums lie inside some span.
    row = np.arange(len(lengths))[:, None] * (width + 1)
    size, taken = len(lengths) * (width + 1), place < count
    begins, behind = (np.bincount((row + edge)[taken], minlength=size) for edge in (starts, ends))
    masked = (begins - behind).reshape(-1, width + 1)[:, :width].cumsum(axis=1) > 0
    return masked & _inner(lengths, width)


def mask_uniform(lengths: np.ndarray, width: int, rngs: Sequence[np.random.Generator | None]) -> np.ndarray:
    """[B] lengths n -> [B, width] bool: k of the n - 2 inner positions, k uniform in 1 ... n - 2 (CMLM).

    None where n < 3.
    """
    share = np.zeros(len(lengths))
    drawn = np.full((len(lengths), width), 2.0)
    for row, (rng, n) in enumerate(zip(rngs, lengths.tolist(), strict=True)):
        if rng and n > 2:
            share[row] = rng.random()
            rng.random(out=drawn[row, 1 : n - 1])
    inner = lengths - 2
    count = (share * inner).astype(np.int64) + 1
    masked = np.zeros((len(lengths), width), np.bool_)
    np.put_along_axis(masked, drawn.argsort(axis=1), np.arange(width) < count[:, None], axis=1)
    return masked & _inner(lengths, width)


def _inner(lengths: np.ndarray, width: int) -> np.ndarray:
    """[B, width] bool: neither the first nor the last position of a target, nor beyond it."""
    place = np.arange(width)
    return (place > 0) & (place < lengths[:, None] - 1)


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
