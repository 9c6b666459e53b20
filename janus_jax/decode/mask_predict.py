"""Non-autoregressive decoding: all slots at once, then the least certain again (mask-predict).

The model is two functions: `look(tokens [B, N, T], memory) -> states [B, N, T, D]` over whole canvases, and
`project(states [.., D]) -> logits [.., V]`, which is asked for masked slots only, some at a time: no
[B, N, T, V] is ever there.  A canvas of length n is BOS, n - 2 slots, EOS, then pad; N canvases a
sentence try N lengths.  With P passes:

    canvas   BOS  [M]   [M]   [M]   EOS   pad      before pass 0
    filled   BOS  a     b     c     EOS   pad      arg max in every masked slot, with its log p
    canvas   BOS  a     [M]   [M]   EOS   pad      the (n - 2)(P - 1 - s) / P least certain masked again
    ...                                            after pass s, none after the last

A pass that changes nothing is no fixed point: the next one masks fewer slots and so sees more.  To stop
there (`early_stop`) saves half of ten passes and keeps repetitions that the others would have mended.

A kept slot keeps its symbol and log p, and can be masked again later.  Every row goes by its own
length and stops by itself, at the latest when it has nothing left to fill (a short one before pass P),
so its result depends on no other row.  Against the reference (docs/method.md section 5): the score counts
generated symbols only, so an empty candidate does not always win; a row that stops early keeps its
last filling, without masks; a pad, if not banned, is a symbol like any other.

On several devices run it inside `jax.shard_map` over B: each device then makes the passes that its own
rows need.  Automatic sharding gives the same results, one small reduction a pass.

Letters: B batch, N length candidates, T slots, D width of a state, V vocabulary, P passes, n length of
one canvas.
Room: pure core.  Imports config, leaving and reading; knows no model; touches no file, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from janus_jax.config import SpecialIds
from janus_jax.decode import reading
from janus_jax.decode.leaving import parts, until_done
from janus_jax.decode.reading import Project

Look = Callable[[jax.Array, Any], jax.Array]

EMPTY = 2  # length of a canvas without slots: BOS and EOS


class MaskPredictOptionsError(ValueError):
    """Options of mask-predict that cannot be used; the message names them and the remedy."""


@dataclass(frozen=True)
class MaskPredictOptions:
    """What is fixed when decoding is compiled (hashable: fit for a static argument of jit)."""

    ids: SpecialIds = field(default_factory=SpecialIds)  # bos, eos, pad and mask are used
    max_length: int = 128  # T, BOS and EOS counted
    iterations: int = 10  # P, decoder passes; the reference's max_iter + 1
    banned: tuple[int, ...] = ()  # symbols that are never emitted
    early_stop: bool = True  # a row stops when a pass changes nothing, too
    history: bool = False  # return what every pass did

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
          MaskPredictOptionsError: no pass, or no room for BOS and EOS.
        """
        for name, least in (("iterations", 1), ("max_length", EMPTY)):
            if getattr(self, name) < least:
                raise MaskPredictOptionsError(f"{name} must be at least {least}, got {getattr(self, name)}")


class History(NamedTuple):
    """Every pass, in order; from the pass where a row stopped on, its slices repeat the result."""

    tokens: jax.Array  # [P, B, N, T] int32, after the pass
    log_probs: jax.Array  # [P, B, N, T] float32, of each kept symbol; 0 on BOS, EOS and pad
    remasked: jax.Array  # [P, B, N, T] bool, slots that the next pass fills anew


class MaskPredictResult(NamedTuple):
    """All candidates, in the order of their lengths."""

    tokens: jax.Array  # [B, N, T] int32, BOS ... EOS pad
    log_probs: jax.Array  # [B, N, T] float32, of each symbol when it was filled; 0 on BOS, EOS and pad
    lengths: jax.Array  # [B, N] int32, BOS and EOS counted
    scores: jax.Array  # [B, N] float32, mean log p of generated symbols; see `mean_log_prob`
    passes: jax.Array  # [B, N] int32, passes that the row took part in
    history: History | None  # if asked for


class Choice(NamedTuple):
    """One candidate of each sentence."""

    tokens: jax.Array  # [B, T] int32
    log_probs: jax.Array  # [B, T] float32
    lengths: jax.Array  # [B] int32
    scores: jax.Array  # [B] float32, the score that it was chosen by
    passes: jax.Array  # [B] int32
    candidate: jax.Array  # [B] int32, which of the N


class _Rows(NamedTuple):
    """State of the loop."""

    made: jax.Array  # [] int32, passes so far
    memory: Any  # the model's
    lengths: jax.Array  # [B, N] int32
    canvas: jax.Array  # [B, N, T] int32, with the masks that it fills
    tokens: jax.Array  # [B, N, T] int32, after the last pass; the result so far
    log_probs: jax.Array  # [B, N, T] float32
    stopped: jax.Array  # [B, N] bool
    passes: jax.Array  # [B, N] int32
    history: History | None


def candidate_lengths(
    length_logits: jax.Array, candidates: int, *, min_length: int = EMPTY, max_length: int | jax.Array
) -> jax.Array:
    """[B, N] int32: the N lengths around the likeliest one (BOS and EOS counted), shortest first.

    With l the arg max (the lowest of equals) brought inside the bounds: l - N // 2, ..., each brought
    inside the bounds, so that near a bound some are equal.

        l = 7, N = 3: 6 7 8        l = 7, N = 4: 5 6 7 8        l = 1, N = 3: 2 2 3

    Args:
      length_logits: [B, C], a score for each length 0..C-1.
      candidates: N.
      min_length: least length, 2 at least: BOS and EOS.
      max_length: greatest length, for all or [B] for each sentence; wins over `min_length`.
    """
    likeliest = jnp.argmax(length_logits, axis=-1).astype(jnp.int32)
    return lengths_around(likeliest, candidates, min_length=min_length, max_length=max_length)


def lengths_around(
    middle: jax.Array, candidates: int, *, min_length: int = EMPTY, max_length: int | jax.Array
) -> jax.Array:
    """`candidate_lengths` around given lengths [B] int32, BOS and EOS counted."""
    greatest = jnp.broadcast_to(jnp.asarray(max_length, jnp.int32), middle.shape)
    middle = jnp.clip(middle, min_length, greatest)
    offsets = jnp.arange(candidates, dtype=jnp.int32) - candidates // 2
    return jnp.clip(middle[:, None] + offsets, min_length, greatest[:, None])


def mask_predict(
    look: Look,
    project: Project,
    memory: Any,
    lengths: jax.Array,
    options: MaskPredictOptions,
    *,
    axes: Any = None,
) -> MaskPredictResult:
    """Fill and refine a canvas of each given length (docs/method.md section 5).

    Args:
      look: (tokens [B, N, T] int32, memory) -> states [B, N, T, D].
      project: states [.., D] -> logits [.., V]; softmax is taken here, in float32, before symbols are
        banned.
      memory: what the model knows of the sources, a pytree.
      lengths: [B, N] int32, BOS and EOS counted; brought inside 2..T.
      options: static.
      axes: where B lies in the leaves of `memory`, ints in a prefix of its tree: then sentences none of whose
        rows goes on leave the batch, and `look` must know of the sentences by `memory` alone.

    Raises:
      MaskPredictOptionsError: a banned symbol outside the vocabulary.
    """
    lengths = jnp.clip(lengths, EMPTY, options.max_length).astype(jnp.int32)
    canvas = blank_canvas(lengths, options)

    def advance(rows: _Rows) -> _Rows:
        stopped = rows.stopped[..., None]
        open_slots = (rows.canvas == options.ids.mask) & ~stopped
        states = look(rows.canvas, rows.memory)
        symbols, log_p = reading.fill(project, states, open_slots, options.banned, MaskPredictOptionsError)
        tokens = jnp.where(open_slots, symbols, jnp.where(stopped, rows.tokens, rows.canvas))
        log_probs = jnp.where(open_slots, log_p, rows.log_probs)
        remasked = least_certain(log_probs, rows.lengths, rows.made, options.iterations) & ~stopped
        canvas = jnp.where(remasked, options.ids.mask, tokens)
        passes = rows.passes + ~rows.stopped
        ends = rows.stopped | ~jnp.any(canvas == options.ids.mask, axis=-1)
        if options.early_stop:
            ends |= jnp.all(tokens == rows.tokens, axis=-1)
        done = History(tokens, log_probs, remasked & ~ends[..., None])
        history = rows.history and jax.tree.map(
            lambda b, v: lax.dynamic_update_index_in_dim(b, v, rows.made, 0), rows.history, done
        )
        return rows._replace(
            made=rows.made + 1,
            canvas=canvas,
            tokens=tokens,
            log_probs=log_probs,
            stopped=ends,
            passes=passes,
            history=history,
        )

    zeros = jnp.zeros(canvas.shape, jnp.float32)
    start = _Rows(
        made=jnp.int32(0),
        memory=memory,
        lengths=lengths,
        canvas=canvas,
        tokens=canvas,
        log_probs=zeros,
        stopped=jnp.zeros(lengths.shape, bool),
        passes=jnp.zeros(lengths.shape, jnp.int32),
        history=_blank_history(canvas.shape, options.iterations) if options.history else None,
    )
    kept = {"tokens": 0, "log_probs": 0, "passes": 0, "history": 1}
    known = parts(start, model="memory", axes=axes, kept=kept, shared=["made"])

    def as_needed(start: _Rows) -> _Rows:
        return until_done(
            advance,
            start,
            lambda rows: rows.stopped.all(axis=1),
            known,
            go_on=lambda rows: rows.made < options.iterations,
        )

    def all_passes(start: _Rows) -> _Rows:
        return lax.fori_loop(0, options.iterations, lambda _, rows: advance(rows), start)

    if options.early_stop or options.history:
        final = as_needed(start)
    else:
        # A row with fewer slots than passes ends before the last: some P / n passes, so a few where n is not
        # very small.  On a GPU, whose host would wait to learn that before each pass, all rows make them all.
        final = lax.platform_dependent(start, cpu=as_needed, tpu=as_needed, default=all_passes)
    return MaskPredictResult(
        tokens=final.tokens,
        log_probs=final.log_probs,
        lengths=lengths,
        scores=mean_log_prob(final.log_probs, lengths),
        passes=final.passes,
        history=final.history and _repeat_results(final.history, final),
    )


def blank_canvas(lengths: jax.Array, options: MaskPredictOptions) -> jax.Array:
    """[..., T] int32: BOS, masks, EOS, then pad, for lengths [...] of 2..T."""
    ids, ends = options.ids, lengths[..., None]
    place = jnp.arange(options.max_length)
    inner = jnp.where(place == ends - 1, ids.eos, jnp.where(place < ends, ids.mask, ids.pad))
    return jnp.where(place == 0, ids.bos, inner).astype(jnp.int32)


def least_certain(log_probs: jax.Array, lengths: jax.Array, index: jax.Array, iterations: int) -> jax.Array:
    """The slots that are masked again after pass `index` (from 0) of `iterations`.

    floor((n - 2) * (P - 1 - index) / P) of the n - 2 slots, in exact integers; those with the lowest
    log-probability, of equals the leftmost.  Never BOS, EOS or padding.

    Args:
      log_probs: [..., T] float32.
      lengths: [...] int32.
      index: [] int32.
      iterations: P.

    Returns:
      [..., T] bool.
    """
    count = (lengths - EMPTY) * (iterations - 1 - index) // iterations
    order = jnp.argsort(jnp.where(_slots(log_probs, lengths), log_probs, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return rank < count[..., None]


def mean_log_prob(log_probs: jax.Array, lengths: jax.Array) -> jax.Array:
    """Score of each candidate: the mean log-probability of its generated symbols.

    An empty candidate has none: it scores -inf, so that any other wins, or 0 where all candidates of
    the sentence are empty.

    Args:
      log_probs: [B, N, T] float32.
      lengths: [B, N] int32.

    Returns:
      [B, N] float32.
    """
    total = jnp.sum(jnp.where(_slots(log_probs, lengths), log_probs, 0.0), axis=-1)
    empty = lengths <= EMPTY
    mean = total / jnp.maximum(lengths - EMPTY, 1)
    return jnp.where(empty & ~jnp.all(empty, axis=-1, keepdims=True), -jnp.inf, mean)


def choose(result: MaskPredictResult, scores: jax.Array | None = None) -> Choice:
    """The best candidate of each sentence; of equals the first, hence the shortest.

    Args:
      result: of `mask_predict`.
      scores: [B, N], to choose by instead of `result.scores`: an AR model's, say.
    """
    scores = result.scores if scores is None else scores
    best = jnp.argmax(scores, axis=1).astype(jnp.int32)
    pick = jax.vmap(lambda values, i: values[i])
    return Choice(
        tokens=pick(result.tokens, best),
        log_probs=pick(result.log_probs, best),
        lengths=pick(result.lengths, best),
        scores=pick(scores, best),
        passes=pick(result.passes, best),
        candidate=best,
    )


def _slots(log_probs: jax.Array, lengths: jax.Array) -> jax.Array:
    """[..., T] bool: places between BOS and EOS."""
    place = jnp.arange(log_probs.shape[-1])
    return (place > 0) & (place < lengths[..., None] - 1)


def _blank_history(shape: tuple[int, ...], iterations: int) -> History:
    shape = (iterations, *shape)
    return History(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))


def _repeat_results(history: History, final: _Rows) -> History:
    """`history` with the result in the passes that a row, or the whole loop, did not make."""
    made = (jnp.arange(history.tokens.shape[0])[:, None, None] < final.passes)[..., None]
    return History(
        tokens=jnp.where(made, history.tokens, final.tokens),
        log_probs=jnp.where(made, history.log_probs, final.log_probs),
        remasked=history.remasked & made,
    )
