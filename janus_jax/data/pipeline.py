"""Encoded pairs to batches: planned ahead, a pure function of (seed, step), read in the background.

`BatchPlan` decides which examples make up which batch.  Examples of similar length share a bucket,
and a bucket has one shape, so there are as few shapes as buckets:

  batch.tokens = 2048, buckets (16, 24, 32)  ->  128 x 16, 85 x 24, 64 x 32

Every epoch has the same number of batches and holds every example exactly once.  Which examples a
batch holds depends on no device: where its rows do not divide over devices and micro-batches, filler
rows make up the rest (88 x 24 for eight).  Each host reads its shares of the rows of each batch.

Letters: N examples, B rows of a global batch.
Room: host memory, through `encoded`; starts the reading threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from janus_jax.batch import (
    EVAL_STREAM,
    FILLER,
    TRAIN_STREAM,
    Batch,
    corrupted,
    example_rng,
)
from janus_jax.config import BatchConfig
from janus_jax.data.encoded import EncodedSource
from janus_jax.data.lines import DataError

WHOLE = ((0,), 1)  # all rows of a batch as one share
_ENDLESS = 1 << 40  # steps a training source claims to have
_EVAL_SEED = 0  # dev losses of different runs draw the same masks


class PlannedBatch(NamedTuple):
    """Which examples one global batch holds."""

    epoch: int
    length: int  # padded length of both sides
    indices: np.ndarray  # [B] int64 numbers of examples, -1 for filler rows


class BatchPlan:
    """The assignment of N examples to batches, for every epoch of one seed.

    Attributes:
      shapes: (rows, length) of each bucket that has examples; the rows count fillers.
      batches_per_epoch: the same in every epoch.
      overlong: numbers of the examples longer than the last bucket, which are in no batch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        config: BatchConfig,
        *,
        seed: int = 0,
        row_multiple: int = 1,
        shuffle: bool = True,
    ) -> None:
        """Plans batches of examples with these `lengths` [N] (the longer side of each).

        Args:
          lengths: of all examples, with BOS and EOS.
          config: buckets and token budget.
          seed: of the order of examples and batches.
          row_multiple: devices x micro-batches; it divides the rows of every batch, fillers counted.
          shuffle: False keeps the order of length, the same in every epoch.

        Raises:
          DataError: the token budget is too small for one row per device and micro-batch, or no
            example fits into any bucket.
        """
        buckets = np.array(config.buckets)
        self._seed, self._shuffle, self._lengths = seed, shuffle, lengths
        order = np.argsort(lengths, kind="stable")
        bucket_of = np.searchsorted(buckets, lengths[order])
        self.overlong = np.sort(order[bucket_of == len(buckets)])
        self._members: list[np.ndarray] = []
        self._rows: list[int] = []  # of each bucket, without fillers
        self.shapes: list[tuple[int, int]] = []
        for bucket, length in enumerate(config.buckets):
            members = order[bucket_of == bucket]
            rows = config.tokens // length
            if len(members) and rows < row_multiple:
                raise DataError(
                    f"batch.tokens = {config.tokens} does not hold {row_multiple} rows (devices x "
                    f"micro-batches) of length {length}: raise it to {row_multiple * length} or more"
                )
            if len(members):
                self._members.append(members)
                self._rows.append(rows)
                self.shapes.append((-(-rows // row_multiple) * row_multiple, length))
        if not self.shapes:
            raise DataError(
                f"none of {len(lengths)} examples fits into the largest of batch.buckets "
                f"({config.buckets[-1]})"
            )
        # Batches in plan order, bucket after bucket: the bucket of each, and where its rows end.
        counts = [-(-len(m) // rows) for m, rows in zip(self._members, self._rows, strict=True)]
        self._bucket = np.repeat(np.arange(len(counts)), counts)
        self._end = np.cumsum(np.array(self._rows)[self._bucket])
        self.batches_per_epoch = len(self._bucket)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.batches_per_epoch)
        slots, order = self._epoch(epoch if self._shuffle else 0)
        number = order[place]
        bucket, end = self._bucket[number], self._end[number]
        rows, length = self.shapes[bucket]
        indices = np.full(rows, FILLER, np.int64)
        indices[: self._rows[bucket]] = slots[end - self._rows[bucket] : end]
        return PlannedBatch(epoch, length, indices)

    def padding(self) -> dict[int, float]:
        """{length: share of the slots of one side of its batches that hold no token}.

        A token is one of the longer side of its pair; filler rows hold none.
        """
        slots = np.bincount(self._bucket) * [rows * length for rows, length in self.shapes]
        tokens = [int(self._lengths[m].sum()) for m in self._members]
        shares = 1 - np.array(tokens) / slots
        return {length: float(s) for (_, length), s in zip(self.shapes, shares, strict=True)}

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of all batches in plan order, one after the other, and the order of the batches."""
        rng = np.random.default_rng((self._seed, epoch))
        slots = np.full(self._end[-1], FILLER, np.int64)
        start = 0
        for bucket, (members, rows) in enumerate(zip(self._members, self._rows, strict=True)):
            slots[start : start + len(members)] = rng.permutation(members) if self._shuffle else members
            start += rows * int((self._bucket == bucket).sum())
        order = np.arange(self.batches_per_epoch)
        return slots, rng.permutation(order) if self._shuffle else order


def train_batches(
    examples: EncodedSource,
    config: BatchConfig,
    *,
    seed: int,
    start_step: int = 0,
    part: tuple[Sequence[int], int] = WHOLE,
    row_multiple: int = 1,
) -> Iterator[Batch]:
    """The training batches of this host from `start_step` on, without end.

    Args:
      examples: the training split.
      config: buckets, token budget, corruption, reading threads.
      seed: of order and corruption.
      start_step: the first batch, as in an uninterrupted run.
      part: (which shares of the rows this host reads, of how many); their number divides `row_multiple`.
      row_multiple: devices x micro-batches.

    Raises:
      DataError: see `BatchPlan`.
      ValueError: shares that there are not, or that do not divide `row_multiple`.
    """
    plan = BatchPlan(examples.lengths, config, seed=seed, row_multiple=row_multiple)
    source = _Batches(examples, plan, config, seed, TRAIN_STREAM, _ENDLESS, _checked(part, row_multiple))
    return _read(source, config, start_step)


def eval_batches(
    examples: EncodedSource,
    config: BatchConfig,
    *,
    part: tuple[Sequence[int], int] = WHOLE,
    row_multiple: int = 1,
) -> Iterator[Batch]:
    """One pass in order of length, every example that fits a bucket exactly once.

    The masks are the same each time and in every run, so that losses can be compared over time.
    Arguments and errors as in `train_batches`; `BatchPlan(...).overlong` lists what does not fit.
    """
    plan = BatchPlan(examples.lengths, config, row_multiple=row_multiple, shuffle=False)
    checked = _checked(part, row_multiple)
    source = _Batches(examples, plan, config, _EVAL_SEED, EVAL_STREAM, plan.batches_per_epoch, checked)
    return _read(source, config, 0)


class _Batches:
    """The rows of one host: element i is padded batch i."""

    def __init__(
        self,
        examples: EncodedSource,
        plan: BatchPlan,
        config: BatchConfig,
        seed: int,
        stream: int,
        steps: int,
        part: tuple[Sequence[int], int],
    ) -> None:
        self._examples, self._plan, self._config = examples, plan, config
        self._seed, self._stream, self._steps, self._part = seed, stream, steps, part

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        planned = self._plan.batch(step)
        shares, of = self._part
        mine = planned.indices.reshape(of, -1)[list(shares)].ravel()
        source, target = (self._examples.padded(side, mine, planned.length) for side in ("source", "target"))
        rngs = [
            None if i == FILLER else example_rng(self._seed, planned.epoch, i, self._stream)
            for i in mine.tolist()
        ]
        return corrupted(mine.astype(np.int32), source, target, rngs, self._config, self._examples.ids)


def _checked(part: tuple[Sequence[int], int], row_multiple: int) -> tuple[Sequence[int], int]:
    shares, of = part
    if not shares or not all(0 <= share < of for share in shares) or row_multiple % of:
        raise ValueError(f"shares {list(shares)} of {of} of rows that are a multiple of {row_multiple}")
    return part


def _read(source: _Batches, config: BatchConfig, start: int) -> Iterator[Batch]:
    """`source` from element `start` on, read ahead by threads."""
    options = grain.ReadOptions(num_threads=config.workers, prefetch_buffer_size=max(config.prefetch, 1))
    dataset = grain.MapDataset.source(source).slice(slice(start, None))
    return iter(dataset.to_iter_dataset(options))
