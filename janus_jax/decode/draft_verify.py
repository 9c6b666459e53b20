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

A draft may have `branches`, other symbols for its places, those that NAR finds likeliest:

    block      Hund bellt  laut  im       sehr (for laut)   gross (for bellt)   AR verifies them all
    AR says    bellt sehr  ..             schoen            ..
    accepted   Ein  Hund  bellt sehr schoen                 3 more, as a branch had what AR says

Where AR refuses a drafted symbol, and a branch of that place has the one that AR says, AR has said what
follows, too.

Strict (`top_k` = 1): a drafted symbol is accepted when it is AR's arg max, so the result is that of greedy
search, symbol for symbol.  Tolerant: when it is among AR's `top_k` and at most `margin` below the best in
log-probability; AR then goes on from it.  A branch is accepted when it is AR's arg max, in both.

Sentences go at their own pace: each has its own place, and ends by itself, so its result depends on no other
one.  A draft's canvas ends where the predicted length says; when the text outgrows it, it grows by at
most SPARE slots; beyond them AR writes on alone, a symbol a pass.

Letters: B sentences, K block (the last accepted symbol and the draft), M branches, N slots that AR reads in a
pass, P cells of its memory, T slots of the canvas (BOS counted), L max_length, D width of a state,
V vocabulary.
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

STRIDE = 3  # slots that a canvas grows by, beyond the next symbol, when the text outgrows it
SPARE = 6  # slots that it may grow by in all
LEAST = 3  # slots of a canvas: BOS, one to draft, EOS
OTHERS = 3  # symbols beside the likeliest that a place of a draft may branch to


class DraftOptionsError(ValueError):
    """Options of draft and verify that cannot be used; the message names them and the remedy."""


@dataclass(frozen=True)
class DraftOptions:
    """What is fixed when decoding is compiled (hashable: fit for a static argument of jit)."""

    search: BeamOptions = field(default_factory=lambda: BeamOptions(beam=1))  # what AR may say, and when
    canvas: int = 128  # T; the longest predicted length and SPARE, or what there is room for
    banned: tuple[int, ...] = ()  # symbols that are never drafted
    block: int = 8  # K, symbols verified in a pass, branches not counted
    branches: int = 0  # M, other symbols verified in a pass; there are at most OTHERS (K - 1)
    top_k: int = 1  # a draft is accepted among AR's best so many; 1: strict
    margin: float = 0.0  # and at most this below the best, in log-probability

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
          DraftOptionsError: a block or top_k below 1, a negative margin or number of branches, or a canvas
            below LEAST.
        """
        least_of = {"block": 1, "branches": 0, "top_k": 1, "margin": 0.0, "canvas": LEAST}
        for name, least in least_of.items():
            if not getattr(self, name) >= least:
                raise DraftOptionsError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def forks(self) -> int:
        """Branches that there are places for."""
        return min(self.branches, OTHERS * (self.block - 1))

    @property
    def again(self) -> int:
        """Accepted symbols before the last that a pass reads once more.

        A branch that was accepted lies in a cell of its own, behind those of the draft, so the next pass
        writes it where it belongs.
        """
        return 1 if self.forks else 0

    @property
    def slots(self) -> int:
        """N, slots that AR reads in a pass."""
        return self.again + self.block + self.forks

    @property
    def cells(self) -> int:
        """P, cells that AR's memory must have: of every place, and room for a pass at the last."""
        return self.search.max_length + self.slots


class Block(NamedTuple):
    """What AR reads in a pass: [accepted, draft, branches]."""

    tokens: jax.Array  # [B, N] int32
    places: jax.Array  # [B, N] int32, not below 0
    start: jax.Array  # [B] int32, the cell that the first is written to, the others after it
    sees: jax.Array  # [B, N, P] bool, cells that each sees: its own, and those of what it follows


Look = Callable[[Block, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]


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
    others: jax.Array  # [B, M] int32, branches; pad where there is none
    instead: jax.Array  # [B, M] int32, which symbol of the draft, 0 .., each stands for
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
      look: (block, canvas [B, T], state) -> (AR logits [B, N, V] of the places that follow each slot of the
        block, NAR states [B, T, D], state).  The state must keep what is in cells, `options.cells` of them,
        before the block's, and may forget the rest.
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
    slots, most, forks = options.canvas, options.search.max_length, options.forks
    in_turn = slice(options.again, options.again + block)  # the last accepted symbol and the draft
    limits = jnp.clip(limits, 1, most)
    lengths = jnp.clip(lengths, LEAST, slots).astype(jnp.int32)
    widest = jnp.minimum(lengths + SPARE, slots)
    room = max(most + 1, slots) + block  # R: the last block may reach beyond both
    steps = jnp.arange(block)

    def advance(texts: _Texts) -> _Texts:
        fed = _block(texts, options)
        canvas = _canvas(texts, slots, options)
        logits, states, state = look(fed, canvas, texts.state)

        # Verify: symbol k of `said` is AR's for the place a + 1 + k, if the draft is right so far.
        last = fed.places >= texts.limits[:, None] - 1
        admitted, log_z = beam.admit(logits, fed.places, last, options.search)
        said, highest = symbols.best(admitted)
        log_p = highest - log_z
        after = said[:, in_turn.stop :], log_p[:, in_turn.stop :]  # what AR says after each branch
        admitted, log_z, said, log_p = (x[:, in_turn] for x in (admitted, log_z, said, log_p))
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
        if forks:
            own = jnp.take_along_axis(said, hits[:, None], axis=1)
            taken = (texts.instead == hits[:, None]) & (texts.others == own)
            branch, follows = jnp.argmax(taken, axis=1)[:, None], steps == hits[:, None] + 1
            said, log_p = (
                jnp.where(follows, jnp.take_along_axis(x, branch, axis=1), y)
                for x, y in zip(after, (said, log_p), strict=True)
            )
            hits = hits + taken.any(axis=1)
        eos = said == ids.eos
        upto = jnp.minimum(hits, jnp.argmax(eos, axis=1) + jnp.where(eos.any(axis=1), 0, block))
        new = jnp.where(texts.done, 0, upto + 1)
        place = texts.place + new
        ended = jnp.take_along_axis(eos, upto[:, None], axis=1)[:, 0]

        # Draft: NAR read at the places that follow.
        draft, others, instead = _draft(project, states, texts, place, options)
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
            others=others,
            instead=instead,
            passes=texts.passes + ~texts.done,
            accepted=texts.accepted + jnp.minimum(hits, new),
            state=state,
        )

    zeros = jnp.zeros(rows, jnp.int32)
    no_branch = jnp.zeros((rows, forks), jnp.int32)
    start = _Texts(
        limits=limits,
        widest=widest,
        place=zeros,
        done=jnp.zeros(rows, bool),
        ends=lengths,
        tokens=jnp.full((rows, room), ids.pad, jnp.int32).at[:, 0].set(ids.start),
        log_probs=jnp.zeros((rows, room)),
        draft=jnp.full((rows, block - 1), ids.pad, jnp.int32),  # nothing yet: the first pass makes one
        others=no_branch + ids.pad,
        instead=no_branch,
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


def _block(texts: _Texts, options: DraftOptions) -> Block:
    """What AR reads: accepted symbols, the draft, its branches."""
    place, again = texts.place[:, None], options.again
    before = _read(texts.tokens, jnp.maximum(texts.place - 1, 0), again)
    tokens = jnp.concatenate([before, _read(texts.tokens, texts.place, 1), texts.draft, texts.others], axis=1)
    in_turn = jnp.broadcast_to(jnp.arange(again + options.block), (tokens.shape[0], again + options.block))
    follows = jnp.concatenate([in_turn, again + texts.instead], axis=1)  # the last slot, but itself, it sees
    places = jnp.concatenate([place - again + in_turn, place + 1 + texts.instead], axis=1)
    # The cell of place p is p + again: there is one for the place before the start, which nobody else sees.
    cells, own = jnp.arange(options.cells), place + jnp.arange(options.slots)
    sees = (cells >= again) & (cells <= (place + follows)[:, :, None])
    return Block(tokens, jnp.maximum(places, 0), texts.place, sees | (cells == own[:, :, None]))


def _draft(
    project: Project, states: jax.Array, texts: _Texts, place: jax.Array, options: DraftOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What NAR would write after `place` [B], from its states [B, T, D]: `draft`, `others` and `instead`."""
    if options.block == 1:  # room for the last accepted symbol alone
        return texts.draft, texts.others, texts.instead
    rows, ids, forks = place.shape[0], options.search.ids, options.forks
    ahead, ends = place[:, None] + jnp.arange(1, options.block), texts.ends[:, None]
    at = jnp.take_along_axis(states, jnp.minimum(ahead, options.canvas - 1)[..., None], axis=1)
    is_open = (ahead < ends - 1) & ~texts.done[:, None]
    given = jnp.where(ahead == ends - 1, ids.eos, ids.pad)
    if not forks:
        found, _ = reading.fill(project, at, is_open, options.banned, DraftOptionsError)
        return jnp.where(is_open, found, given), texts.others, texts.instead
    found, log_p = reading.likeliest(
        project, at, is_open, options.banned, DraftOptionsError, count=1 + OTHERS
    )
    # A branch is as likely as NAR says that it is, and all before it in the draft.
    before = jnp.cumsum(log_p[:, :, 0], axis=1) - log_p[:, :, 0]
    scores = jnp.where(is_open[:, :, None], before[:, :, None] + log_p[:, :, 1:], -jnp.inf)
    best, chosen = symbols.top(scores.reshape(rows, -1), forks)
    others = jnp.take_along_axis(found[:, :, 1:].reshape(rows, -1), chosen, axis=1)
    draft = jnp.where(is_open, found[:, :, 0], given)
    return draft, jnp.where(best > -jnp.inf, others, ids.pad), chosen // OTHERS


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


def _read(by_place: jax.Array, place: jax.Array, count: int) -> jax.Array:
    """[B, R, ..] from place [B] on -> [B, count, ..]."""
    return jax.vmap(lambda row, a: lax.dynamic_slice_in_dim(row, a, count))(by_place, place)


def _append(texts: jax.Array, fresh: jax.Array, place: jax.Array, count: jax.Array) -> jax.Array:
    """`texts` [B, R] with the first `count` [B] of `fresh` [B, K] after place [B]."""
    # All of a row anew: a scatter of some of it is several kernels of a GPU.
    of_fresh = jnp.arange(texts.shape[1]) - place[:, None] - 1
    moved = jnp.take_along_axis(fresh, jnp.clip(of_fresh, 0, fresh.shape[1] - 1), axis=1)
    return jnp.where((of_fresh >= 0) & (of_fresh < count[:, None]), moved, texts)
