"""Draft and verify: NAR proposes what follows, AR accepts as much of it as it would have written itself.

One decoder pass does both jobs at once, for two different moments:

    accepted   Ein  Hund                                     (a = 2, the last of them is fed again)
    block      Hund bellt  laut  im        AR verifies the draft that the pass before made
    AR says    bellt sehr  ..              "bellt" is right, "laut" is not: AR's own "sehr" takes its place
    accepted   Ein  Hund  bellt sehr       2 more with one pass
    canvas     BOS Ein Hund [M] [M] .. EOS  meanwhile NAR has drafted the next block, knowing "Ein Hund"

so that a pass costs one trip through the network and not two.  The next draft knows the prefix as it was
before this pass; what AR changed in between makes it miss now and then, which costs less than a pass
for each draft would.  Each pass accepts one symbol at least, AR's own, so there are never more passes than
greedy search takes steps.

Strict (`top_k` = 1): a drafted symbol is accepted when it is AR's arg max, so the result is that of greedy
search, symbol for symbol.  Tolerant: when it is among AR's `top_k` and at most `margin` below the best in
log-probability; AR then goes on from it.

Sentences go at their own pace: each has its own place, and ends by itself, so its result depends on no other
one.  A draft's canvas ends where the predicted length says; when the text outgrows it, it grows by at
most SPARE slots; beyond them AR writes on alone, a symbol a pass.

Letters: B sentences, K block (symbols verified in a pass), T slots of the canvas (BOS counted),
L max_length, D width of a state, V vocabulary.
Room: pure core.  Imports config and decode only; knows no model; touches no file, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from janus_jax.decode import beam, reading, symbols
from janus_jax.decode.beam import BeamOptions
from janus_jax.decode.leaving import parts, until_done
from janus_jax.decode.reading import Project

Look = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]

STRIDE = 3  # slots that a canvas grows by, beyond the next symbol, when the text outgrows it
SPARE = 6  # slots that it may grow by in all
LEAST = 3  # slots of a canvas: BOS, one to draft, EOS


class DraftOptionsError(ValueError):
    """Options of draft and verify that cannot be used; the message names them and the remedy."""


@dataclass(frozen=True)
class DraftOptions:
    """What is fixed when decoding is compiled (hashable: fit for a static argument of jit)."""

    search: BeamOptions = field(default_factory=lambda: BeamOptions(beam=1))  # what AR may say, and when
    canvas: int = 128  # T; the longest predicted length and SPARE, or what there is room for
    banned: tuple[int, ...] = ()  # symbols that are never drafted
    block: int = 8  # K, symbols verified in a pass
    top_k: int = 1  # a draft is accepted among AR's best so many; 1: strict
    margin: float = 0.0  # and at most this below the best, in log-probability

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
          DraftOptionsError: a block or top_k below 1, a negative margin, or a canvas below LEAST.
        """
        for name, least in (("block", 1), ("top_k", 1), ("margin", 0.0), ("canvas", LEAST)):
            if not getattr(self, name) >= least:
                raise DraftOptionsError(f"{name} must be at least {least}, got {getattr(self, name)}")


class DraftResult(NamedTuple):
    """One hypothesis of each sentence, laid out as those of beam search with N = 1."""

    tokens: jax.Array  # [B, 1, L] int32, without the start symbol, EOS included, then pad
    lengths: jax.Array  # [B, 1] int32, EOS counted
    scores: jax.Array  # [B, 1] float32, sum log p of AR / length ** length_penalty
    log_probs: jax.Array  # [B, 1, L] float32, AR's, of each symbol; 0 on padding
    passes: jax.Array  # [B] int32, passes until the sentence ended
    accepted: jax.Array  # [B] int32, symbols of it that were drafted


class _Texts(NamedTuple):
    """State of the loop."""

    limits: jax.Array  # [B] int32
    widest: jax.Array  # [B] int32, the longest that the canvas may become
    place: jax.Array  # [B] int32, a: the place of the last accepted symbol; 0 is the start
    done: jax.Array  # [B] bool
    ends: jax.Array  # [B] int32, length of the canvas, BOS and EOS counted
    tokens: jax.Array  # [B, R] int32, start, accepted symbols; beyond them nothing that matters
    log_probs: jax.Array  # [B, R] float32
    draft: jax.Array  # [B, K - 1] int32, for the places a + 1 ..; pad where there is none
    passes: jax.Array  # [B] int32
    accepted: jax.Array  # [B] int32
    state: Any  # the model's


def draft_and_verify(
    look: Look,
    project: Project,
    state: Any,
    lengths: jax.Array,
    limits: jax.Array,
    options: DraftOptions,
    *,
    axes: Any = None,
) -> DraftResult:
    """The text that AR accepts, written in as few passes as the drafts are good for.

    Args:
      look: (block [B, K] int32, places [B] of its first symbols, canvas [B, T], state) -> (AR logits
        [B, K, V] of the places that follow each, NAR states [B, T, D], state).  The state must keep
        what it knows of places below `places` and forget the rest.
      project: NAR states [.., D] -> logits [.., V].
      state: the model's pytree before the first symbol.
      lengths: [B] int32, predicted lengths, BOS and EOS counted; brought inside LEAST..T.  Where SPARE has
        room on the canvas, T is nothing to the result.
      limits: [B] int32, most symbols of each sentence, EOS counted; brought inside 1..L.
      options: static.
      axes: where B lies in the leaves of `state`, ints in a prefix of its tree: then sentences that are done
        leave the batch, and `look` must know of the sentences by `state` alone.

    Raises:
      beam.BeamOptionsError, DraftOptionsError: a banned symbol outside the vocabulary.
    """
    rows, block, ids = limits.shape[0], options.block, options.search.ids
    slots, most = options.canvas, options.search.max_length
    limits = jnp.clip(limits, 1, most)
    lengths = jnp.clip(lengths, LEAST, slots).astype(jnp.int32)
    widest = jnp.minimum(lengths + SPARE, slots)
    room = max(most + 1, slots) + block  # R: the last block may reach beyond both
    steps = jnp.arange(block)

    def advance(texts: _Texts) -> _Texts:
        fed = jnp.concatenate([_read(texts.tokens, texts.place, 1), texts.draft], axis=1)
        canvas = _canvas(texts, slots, options)
        logits, states, state = look(fed, texts.place, canvas, texts.state)

        # Verify: symbol k of `said` is AR's for the place a + 1 + k, if the draft is right so far.
        last = texts.place[:, None] + steps >= texts.limits[:, None] - 1
        admitted, log_z = beam.admit(logits, texts.place[:, None] + steps, last, options.search)
        said, highest = symbols.best(admitted)
        log_p = highest - log_z
        if block > 1:
            drafted = _of(admitted[:, :-1], texts.draft) - log_z[:, :-1]
            agrees = _agree(admitted[:, :-1], drafted, log_p[:, :-1], texts.draft, said[:, :-1], options)
            hits = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)  # of the leading ones
            kept = steps < hits[:, None]
            pad = [(0, 0), (0, 1)]
            said = jnp.where(kept, jnp.pad(texts.draft, pad), said)
            log_p = jnp.where(kept, jnp.pad(drafted, pad), log_p)
        else:
            hits = jnp.zeros_like(texts.place)
        eos = said == ids.eos
        upto = jnp.minimum(hits, jnp.argmax(eos, axis=1) + jnp.where(eos.any(axis=1), 0, block))
        new = jnp.where(texts.done, 0, upto + 1)
        place = texts.place + new
        ended = jnp.take_along_axis(eos, upto[:, None], axis=1)[:, 0]

        # Draft: NAR read at the places that the next block can reach.
        if block > 1:
            window = texts.place[:, None] + 1 + jnp.arange(2 * block - 1)
            on_canvas = jnp.minimum(window, slots - 1)
            at = jnp.take_along_axis(states, on_canvas[..., None], axis=1)
            is_open = (window < texts.ends[:, None] - 1) & ~texts.done[:, None]
            guesses, _ = reading.fill(project, at, is_open, options.banned, DraftOptionsError)
            beyond = jnp.where(window == texts.ends[:, None] - 1, ids.eos, ids.pad)
            guesses = jnp.where(is_open, guesses, beyond)
            draft = jax.vmap(lambda g, n: lax.dynamic_slice_in_dim(g, n, block - 1))(guesses, new)
        else:
            draft = texts.draft
        return _Texts(
            limits=texts.limits,
            widest=texts.widest,
            place=place,
            done=texts.done | ended,
            ends=jnp.where(
                place + 1 >= texts.ends - 1, jnp.minimum(place + 2 + STRIDE, texts.widest), texts.ends
            ),
            tokens=_append(texts.tokens, said, texts.place, new),
            log_probs=_append(texts.log_probs, log_p, texts.place, new),
            draft=jnp.where(texts.done[:, None], texts.draft, draft),
            passes=texts.passes + ~texts.done,
            accepted=texts.accepted + jnp.minimum(hits, new),
            state=state,
        )

    zeros = jnp.zeros(rows, jnp.int32)
    start = _Texts(
        limits=limits,
        widest=widest,
        place=zeros,
        done=jnp.zeros(rows, bool),
        ends=lengths,
        tokens=jnp.full((rows, room), ids.pad, jnp.int32).at[:, 0].set(ids.start),
        log_probs=jnp.zeros((rows, room)),
        draft=jnp.full((rows, block - 1), ids.pad, jnp.int32),  # nothing yet: the first pass makes one
        passes=zeros,
        accepted=zeros,
        state=state,
    )
    kept = dict.fromkeys(("place", "tokens", "log_probs", "passes", "accepted"), 0)
    known = parts(start, model="state", axes=axes, kept=kept)
    final = until_done(advance, start, lambda texts: texts.done, known)
    inside = jnp.arange(most) < final.place[:, None]
    log_probs = jnp.where(inside, final.log_probs[:, 1 : most + 1], 0.0)
    return DraftResult(
        tokens=jnp.where(inside, final.tokens[:, 1 : most + 1], ids.pad)[:, None],
        lengths=final.place[:, None],
        scores=(jnp.sum(log_probs, axis=1) / beam.divisor(final.place, options.search))[:, None],
        log_probs=log_probs[:, None],
        passes=final.passes,
        accepted=final.accepted,
    )


def _canvas(texts: _Texts, slots: int, options: DraftOptions) -> jax.Array:
    """[B, T]: BOS, what is accepted, masks up to EOS, then pad."""
    ids, place = options.search.ids, jnp.arange(slots)
    ends = texts.ends[:, None]
    ahead = jnp.where(place == ends - 1, ids.eos, jnp.where(place < ends, ids.mask, ids.pad))
    canvas = jnp.where(place <= texts.place[:, None], texts.tokens[:, :slots], ahead)
    return canvas.at[:, 0].set(ids.bos)


def _agree(
    admitted: jax.Array,
    drafted: jax.Array,
    best: jax.Array,
    draft: jax.Array,
    said: jax.Array,
    options: DraftOptions,
) -> jax.Array:
    """[B, K - 1] bool: drafted symbols that AR accepts at their place."""
    same = draft == said
    if options.top_k == 1:
        return same
    better = jnp.sum(admitted > _of(admitted, draft)[..., None], axis=-1)
    near = (better < options.top_k) & (drafted >= best - options.margin)
    return same | (near & (drafted > -jnp.inf))


def _of(scores: jax.Array, symbols: jax.Array) -> jax.Array:
    """[B, k, V] at the symbols [B, k] -> [B, k]."""
    return jnp.take_along_axis(scores, symbols[..., None], axis=-1)[..., 0]


def _read(tokens: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """[B, R] from place [B] on -> [B, count]."""
    return jax.vmap(lambda row, a: lax.dynamic_slice_in_dim(row, a, count))(tokens, place)


def _append(texts: jax.Array, fresh: jax.Array, place: jax.Array, count: jax.Array) -> jax.Array:
    """`texts` [B, R] with the first `count` [B] of `fresh` [B, K] after place [B]."""

    def write(row: jax.Array, values: jax.Array, a: jax.Array, n: jax.Array) -> jax.Array:
        old = lax.dynamic_slice_in_dim(row, a + 1, values.shape[0])
        kept = jnp.where(jnp.arange(values.shape[0]) < n, values, old)
        return lax.dynamic_update_slice_in_dim(row, kept, a + 1, axis=0)

    return jax.vmap(write)(texts, fresh, place, count)
