"""Left-to-right decoding over a step function: beam search, and greedy search as its lean special case.

The model is a function `step(tokens [B, N], index, state) -> (logits [B, N, V], state)`: fed the
symbols at place `index` (the start symbol at 0), it scores the next one.  What does not differ
between beams (the encoder output) is better closed over by `step` than kept in `state`.

    index        0        1        2        3
    fed          start    Ein      Hund     bellt
    predicted    Ein      Hund     bellt    EOS      <- tokens of the result, lengths = 4

One iteration of the loop: the 2N best continuations of the open beams, by summed log-probability;
an EOS among the first N of them closes a hypothesis, an EOS below is dropped; the N best others stay
open.  A sentence has its own limit and ends by itself, so its result depends on no other row.

The loop keeps no token histories.  It writes the symbol chosen by each slot and the slot that it came
from (a trace), so that reordering beams moves N numbers, not N sentences; hypotheses are read out of
the trace once, backwards, at the end.

On several devices run the whole search inside `jax.shard_map` over B: each device then stops with its
own sentences and none speaks to another.  Under automatic sharding results are the same, but top_k
gathers the logits of all devices at every step.

Letters: B batch, N beams, V vocabulary, L max_length, K candidate continuations.
Room: pure core.  Imports config, leaving and symbols; knows no model; touches no file, no device, no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from janus_jax.config import SpecialIds
from janus_jax.decode.leaving import parts, until_done
from janus_jax.decode.symbols import allowed, best, top

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Reorder = Callable[[Any, jax.Array], Any]

FORCED_EOS = ("scored", "free")
# What a model pays at least for an EOS that it holds impossible, at the limit: the sentence is then
# kept whole, behind all others, instead of having no hypothesis at all.
IMPOSSIBLE = -1e9


class BeamOptionsError(ValueError):
    """Options of the search that cannot be used together; the message names them and the remedy."""


@dataclass(frozen=True)
class BeamOptions:
    """What is fixed when the search is compiled (hashable: fit for a static argument of jit)."""

    ids: SpecialIds = field(default_factory=SpecialIds)  # start, eos and pad are used
    beam: int = 5  # N
    max_length: int = 128  # L, slots of the result; the largest limit, EOS counted
    banned: tuple[int, ...] = ()  # symbols that are never emitted
    min_length: int = 1  # symbols before EOS is allowed; a limit below wins
    length_penalty: float = 1.0  # score = sum log p / length ** this, EOS counted
    # True: a sentence ends when N hypotheses are closed.  False: it goes on, better ones displacing
    # closed ones, until the best open beam, at its present length, no longer scores above the worst of N
    # closed (Hugging Face's heuristic).
    early_stop: bool = True
    # With early_stop, when more hypotheses end at one step than there is room for: False, the older ones
    # stay (fairseq); True, the best of all do (Hugging Face).
    displace: bool = False
    forced_eos: str = "scored"  # EOS at the limit costs: its own log-probability, or 0 ('free')

    def __post_init__(self) -> None:
        """Check what can be checked without the vocabulary.

        Raises:
          BeamOptionsError: a count below its least value, an unknown `forced_eos`, or EOS banned.
        """
        for name, least in (("beam", 1), ("max_length", 1), ("min_length", 0)):
            if getattr(self, name) < least:
                raise BeamOptionsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.forced_eos not in FORCED_EOS:
            raise BeamOptionsError(f"forced_eos must be one of {FORCED_EOS}, got {self.forced_eos!r}")
        if self.ids.eos in self.banned:
            raise BeamOptionsError(
                f"banned must not contain EOS ({self.ids.eos}): no sentence could end; use min_length instead"
            )


class BeamResult(NamedTuple):
    """Hypotheses, best first; where fewer than N exist, the unused have length 0 and score -inf."""

    tokens: jax.Array  # [B, N, L] int32, without the start symbol, EOS included, then pad
    lengths: jax.Array  # [B, N] int32, EOS counted
    scores: jax.Array  # [B, N] float32, sum log p / length ** length_penalty
    log_probs: jax.Array  # [B, N, L] float32, of each symbol; 0 on padding


class _Candidates(NamedTuple):
    """Continuations of a sentence, best first."""

    sums: jax.Array  # [B, K] summed log-probability, -inf where there is none
    tokens: jax.Array  # [B, K] the symbol
    parents: jax.Array  # [B, K] the slot that it continues
    log_probs: jax.Array  # [B, K] of the symbol alone


class _Closed(NamedTuple):
    """Finished hypotheses, best first: where they end in the trace."""

    scores: jax.Array  # [B, N], -inf where none
    lengths: jax.Array  # [B, N], EOS counted, 0 where none
    parents: jax.Array  # [B, N] slot at place length - 2, the one before EOS
    log_probs: jax.Array  # [B, N] of the EOS


class _Trace(NamedTuple):
    """What each slot chose at each place, and which slot it continued."""

    tokens: jax.Array  # [L, B, N] int32
    parents: jax.Array  # [L, B, N] int32
    log_probs: jax.Array  # [L, B, N] float32


class _Beams(NamedTuple):
    """State of the beam loop."""

    place: jax.Array  # [] int32, of the symbols fed next
    limits: jax.Array  # [B] int32
    done: jax.Array  # [B] bool, sentences that accept no further hypothesis
    sums: jax.Array  # [B, N] summed log-probability of the open beams, best first; -inf where none
    tokens: jax.Array  # [B, N] int32, fed next
    state: Any  # the model's
    closed: _Closed
    trace: _Trace


class _Greedy(NamedTuple):
    """State of the greedy loop."""

    place: jax.Array  # [] int32
    limits: jax.Array  # [B] int32
    done: jax.Array  # [B] bool
    fed: jax.Array  # [B, 1] int32
    state: Any  # the model's
    sums: jax.Array  # [B]
    scores: jax.Array  # [B]
    lengths: jax.Array  # [B]
    tokens: jax.Array  # [L, B]
    log_probs: jax.Array  # [L, B]


def reorder_beams(state: Any, parents: jax.Array, *, batch_axis: int = 0) -> Any:
    """`state` with slot n of sentence b replaced by its slot parents[b, n].

    Args:
      state: pytree whose leaves have the axes [..., B, N, ...].
      parents: [B, N] int32.
      batch_axis: where B lies in every leaf, N being the next axis; 1 for a cache stacked over layers.
    """
    gather = jax.vmap(lambda slots, sources: slots[sources])  # [B, N, ...], [B, N]
    for _ in range(batch_axis):
        gather = jax.vmap(gather, in_axes=(0, None))
    return jax.tree.map(lambda leaf: gather(leaf, parents), state)


def beam_search(
    step: Step,
    state: Any,
    limits: jax.Array,
    options: BeamOptions,
    *,
    reorder: Reorder = reorder_beams,
    axes: Any = None,
) -> BeamResult:
    """The best hypotheses that a beam of N finds, for each sentence by itself (docs/method.md section 5).

    Args:
      step: (tokens [B, N] int32, index [] int32, state) -> (logits [B, N, V], state); softmax is taken
        here, in float32, before symbols are banned.
      state: the model's pytree before the first symbol; shapes and dtypes must survive a step.
      limits: [B] int32, most symbols of each sentence, EOS counted; the last of them can only be EOS.
        Brought inside 1..max_length.
      options: static.
      reorder: (state, parents [B, N]) -> state, how slots follow the beams that they continue.
      axes: where B lies in the leaves of `state`, ints in a prefix of its tree: then sentences that are done
        leave the batch, and `step` must know of the sentences by `state` alone.

    Raises:
      BeamOptionsError: a banned symbol outside the vocabulary.
    """
    rows, beam, slots = limits.shape[0], options.beam, options.max_length
    limits = jnp.clip(limits, 1, slots)

    def advance(loop: _Beams) -> _Beams:
        logits, state = step(loop.tokens, loop.place, loop.state)
        last = loop.place == loop.limits - 1
        candidates = _expand(loop.sums, logits, loop.place, last, options)
        closed = _close(loop.closed, candidates, loop.place, loop.done, options)
        kept = _keep_open(candidates, options)
        chosen = _Trace(kept.tokens, kept.parents, kept.log_probs)
        return _Beams(
            place=loop.place + 1,
            limits=loop.limits,
            done=loop.done | last | _ended(closed, kept.sums[:, 0], loop.place, options),
            sums=kept.sums,
            tokens=kept.tokens,
            state=reorder(state, kept.parents),
            closed=closed,
            trace=_write(loop.trace, chosen, loop.place),
        )

    integers = partial(jnp.zeros, dtype=jnp.int32)
    nothing = jnp.full((rows, beam), -jnp.inf)
    start = _Beams(
        place=jnp.int32(0),
        limits=limits,
        done=jnp.zeros(rows, bool),
        sums=nothing.at[:, 0].set(0.0),  # all slots hold the same: one of them is open
        tokens=jnp.full((rows, beam), options.ids.start, jnp.int32),
        state=state,
        closed=_Closed(nothing, integers((rows, beam)), integers((rows, beam)), jnp.zeros((rows, beam))),
        trace=_Trace(
            integers((slots, rows, beam)), integers((slots, rows, beam)), jnp.zeros((slots, rows, beam))
        ),
    )
    kept = {"closed": 0, "trace": 1}
    known = parts(start, model="state", axes=axes, kept=kept, shared=["place"])
    final = until_done(advance, start, lambda beams: beams.done, known)
    return _read_out(final.trace, final.closed, options)


def greedy_search(
    step: Step, state: Any, limits: jax.Array, options: BeamOptions, *, axes: Any = None
) -> BeamResult:
    """`beam_search` with one beam and early stop, number for number, without its bookkeeping.

    Args:
      step: as in `beam_search`, with N = 1.
      state: as in `beam_search`.
      limits: as in `beam_search`.
      options: static; `beam` and `early_stop` are not used.
      axes: as in `beam_search`.

    Returns:
      Result with N = 1.
    """
    rows, slots, ids = limits.shape[0], options.max_length, options.ids
    limits = jnp.clip(limits, 1, slots)

    def advance(loop: _Greedy) -> _Greedy:
        logits, state = step(loop.fed, loop.place, loop.state)
        last = loop.place == loop.limits - 1
        admitted, log_z = admit(logits, loop.place, last, options)
        token, highest = best(admitted[:, 0])
        log_prob = highest - log_z[:, 0]
        sums = loop.sums + log_prob
        ends = (token == ids.eos) & (sums > -jnp.inf) & ~loop.done
        return _Greedy(
            place=loop.place + 1,
            limits=loop.limits,
            done=loop.done | ends | last | (sums == -jnp.inf),
            fed=token[:, None],
            state=state,
            sums=sums,
            scores=jnp.where(ends, sums / divisor(loop.place + 1, options), loop.scores),
            lengths=jnp.where(ends, loop.place + 1, loop.lengths),
            tokens=_write(loop.tokens, token, loop.place),
            log_probs=_write(loop.log_probs, log_prob, loop.place),
        )

    start = _Greedy(
        place=jnp.int32(0),
        limits=limits,
        done=jnp.zeros(rows, bool),
        fed=jnp.full((rows, 1), ids.start, jnp.int32),
        state=state,
        sums=jnp.zeros(rows),
        scores=jnp.full(rows, -jnp.inf),
        lengths=jnp.zeros(rows, jnp.int32),
        tokens=jnp.zeros((slots, rows), jnp.int32),
        log_probs=jnp.zeros((slots, rows)),
    )
    kept = {"scores": 0, "lengths": 0, "tokens": 1, "log_probs": 1}
    known = parts(start, model="state", axes=axes, kept=kept, shared=["place"])
    final = until_done(advance, start, lambda texts: texts.done, known)
    inside = jnp.arange(slots) < final.lengths[:, None]
    return BeamResult(
        tokens=jnp.where(inside, final.tokens.T, ids.pad)[:, None],
        lengths=final.lengths[:, None],
        scores=final.scores[:, None],
        log_probs=jnp.where(inside, final.log_probs.T, 0.0)[:, None],
    )


def admit(
    logits: jax.Array, place: jax.Array, last: jax.Array, options: BeamOptions
) -> tuple[jax.Array, jax.Array]:
    """What may be emitted now.

    Args:
      logits: [B, N, V].
      place: int32, [] or [B, N]: where the symbol would go, from 0.
      last: bool, [B] or [B, N]: whether it can only be EOS.
      options: of the search.

    Returns:
      [B, N, V] float32 logits, -inf where the symbol may not be emitted, and [B, N] the logarithm of
      the softmax's denominator over the whole vocabulary: log p is their difference.

    Raises:
      BeamOptionsError: a banned symbol outside the vocabulary.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    symbols = np.arange(logits.shape[-1])
    is_eos = symbols == options.ids.eos
    said = allowed(len(symbols), options.banned, BeamOptionsError)
    admitted = said & (~is_eos | (place[..., None] >= options.min_length))
    scored = jnp.maximum(logits[..., options.ids.eos], log_z + IMPOSSIBLE)
    eos_logit = log_z if options.forced_eos == "free" else scored
    forced = jnp.where(is_eos, eos_logit[..., None], -jnp.inf)
    last = last[:, None] if last.ndim == 1 else last
    return jnp.where(last[..., None], forced, jnp.where(admitted, logits, -jnp.inf)), log_z


def _expand(
    sums: jax.Array, logits: jax.Array, place: jax.Array, last: jax.Array, options: BeamOptions
) -> _Candidates:
    """The K = 2N best continuations of all open beams (fewer where V is tiny)."""
    rows, beam, vocabulary = logits.shape
    admitted, log_z = admit(logits, place, last, options)
    # No beam gives more than K of the best K, so the vocabulary is searched once, beam by beam, on raw
    # logits; ties fall to the lower slot, then to the lower symbol, as in one search over N x V.
    each = min(2 * beam, vocabulary)
    highest, tokens = top(admitted.reshape(rows * beam, vocabulary), each)
    log_probs = (highest.reshape(rows, beam, each) - log_z[..., None]).reshape(rows, beam * each)
    totals = (jnp.repeat(sums, each, axis=1) + log_probs).reshape(rows, beam * each)
    sums, flat = lax.top_k(totals, min(2 * beam, beam * each))
    return _Candidates(
        sums=sums,
        tokens=jnp.take_along_axis(tokens.reshape(rows, beam * each), flat, axis=1),
        parents=flat // each,
        log_probs=jnp.take_along_axis(log_probs, flat, axis=1),
    )


def _close(
    closed: _Closed, candidates: _Candidates, place: jax.Array, done: jax.Array, options: BeamOptions
) -> _Closed:
    """`closed` with the hypotheses that end now, best first."""
    first = jax.tree.map(lambda x: x[:, : options.beam], candidates)
    ends = (first.tokens == options.ids.eos) & (first.sums > -jnp.inf) & ~done[:, None]
    if options.early_stop and not options.displace:  # the better of those that end now take the room left
        room = jnp.sum(closed.scores == -jnp.inf, axis=1, keepdims=True)
        ends &= jnp.cumsum(ends, axis=1) <= room
    ending = _Closed(
        scores=jnp.where(ends, first.sums / divisor(place + 1, options), -jnp.inf),
        lengths=jnp.where(ends, place + 1, 0),
        parents=first.parents,
        log_probs=first.log_probs,
    )
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), closed, ending)
    return _take(both, lax.top_k(both.scores, options.beam)[1])  # the older wins a tie


def _keep_open(candidates: _Candidates, options: BeamOptions) -> _Candidates:
    """The N best that go on."""
    sums = jnp.where(candidates.tokens == options.ids.eos, -jnp.inf, candidates.sums)
    return _take(candidates._replace(sums=sums), lax.top_k(sums, options.beam)[1])


def _ended(closed: _Closed, best_open: jax.Array, place: jax.Array, options: BeamOptions) -> jax.Array:
    """[B] bool: sentences that need no further step, given the best open sum [B] after this one."""
    worst = closed.scores[:, -1]
    ended = worst > -jnp.inf  # N are closed
    if not options.early_stop:
        ended &= best_open / divisor(place + 1, options) <= worst
    return ended | (best_open == -jnp.inf)


def divisor(length: jax.Array, options: BeamOptions) -> jax.Array:
    """What a sum of log p is divided by to be a score: length ** length_penalty, float32."""
    return length.astype(jnp.float32) ** options.length_penalty


def _take(tree: Any, order: jax.Array) -> Any:
    """Every leaf [B, X] in the order [B, Y] along its second axis."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), tree)


def _write(buffers: Any, values: Any, place: jax.Array) -> Any:
    """Every leaf [L, ...] with `values`' leaf [...] at `place`."""
    return jax.tree.map(lambda b, v: lax.dynamic_update_index_in_dim(b, v, place, 0), buffers, values)


def _read_out(trace: _Trace, closed: _Closed, options: BeamOptions) -> BeamResult:
    """The symbols of each closed hypothesis, followed backwards through the trace.

    Not a place at a time: L is walked in steps that double, so that a GPU gets a few kernels and not some
    for each place.  A hypothesis waits, at a state of its own, until the place before its EOS.
    """
    slots, beam = options.max_length, options.beam
    here = jnp.arange(slots)[:, None, None]
    waiting = jnp.broadcast_to(beam + jnp.arange(beam, dtype=jnp.int32), trace.parents.shape)
    leaving = jnp.where(here == closed.lengths - 1, closed.parents, waiting)
    # back[t]: for each state at place t + 1, a slot or a hypothesis that waits, the one that it had at t.
    states = jnp.broadcast_to(
        jnp.arange(2 * beam, dtype=jnp.int32), (*here.shape[:1], closed.lengths.shape[0], 2 * beam)
    )
    back = jnp.concatenate([jnp.concatenate([trace.parents, leaving], axis=2)[1:], states[:1]])
    reach = 1
    while reach < slots:  # now from as many places on, at the most the last
        further = jnp.concatenate([back[reach:], states[:reach]])
        back, reach = jnp.take_along_axis(back, further, axis=2), 2 * reach
    chosen = jnp.minimum(back[:, :, beam:], beam - 1)
    tokens, log_probs = (jnp.take_along_axis(x, chosen, axis=2) for x in (trace.tokens, trace.log_probs))
    before, eos = here < closed.lengths - 1, here == closed.lengths - 1
    tokens = jnp.where(before, tokens, jnp.where(eos, options.ids.eos, options.ids.pad))
    log_probs = jnp.where(before, log_probs, jnp.where(eos, closed.log_probs, 0.0))
    return BeamResult(
        tokens=jnp.moveaxis(tokens, 0, -1),
        lengths=closed.lengths,
        scores=closed.scores,
        log_probs=jnp.moveaxis(log_probs, 0, -1),
    )
