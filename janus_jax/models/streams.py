"""The streams of the paper: which token and position sits in each slot, and who attends whom.

One decoder stack, one embedding and one projection serve every distribution; "AR decoder", "NAR
decoder" and "AUX" are ways to feed and to mask that stack (docs/method.md, sections 1 and 2).

  stream              token in its slot       position    attends
  AR content, i       y_i                     i (*)       AR content k <= i
  AR query, i         [M], predicts y_{i+1}   i (*)       AR content k <= i
  NAR content, j      [M] if j in M else y_j  j           all NAR content
  true content, j     y_j                     j           NAR content visible or ahead, truths k <= j
  AUX query, j        [M], predicts y_j       j           NAR content visible or from j on, truths k < j

k < j and "ahead" are in the order of the sentence, or by the turns of a random order over M
(`batch.order`).

(*) `code`: both at i, as the released code has it; `figure`: both at i + 1; `aligned`: content at
i and query at i + 1, so that each carries the place of what it is or predicts, as NAR's and AUX's slots
do.  The last is the default: it did better in every way of decoding (docs/ablations.md).

All streams keep the target's own order, so AR slot t predicts target position t + 1, NAR and AUX
slots position t.  Plainly, each stream has T slots, and those outside M of the two-stream part are
computed and never read.  Two options leave out what nobody reads, and change no number that is read:
`capacity` gives the two-stream part C slots, which hold the places in M of each row; `prune` makes
of a slot that nobody reads keys and values alone in the last layer.

Letters: R rows, T target length, N slots (T for each stream), C capacity, Q queries, K keys.
Room: pure core, models.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from janus_jax import masks
from janus_jax.config import ModelConfig
from janus_jax.models.members import Members, members, put_back
from janus_jax.models.transformer import Block, Kept, Plan, Range


@dataclasses.dataclass
class Slots:
    """What goes through the decoder in one pass, and where each distribution is read."""

    rows: jax.Array  # [R, N, D] token embeddings
    positions: jax.Array  # [N] int32
    plan: Plan
    read: dict[str, Range]  # of "ar", "nar", "aux": the run of the slots that come out which predicts it
    held: dict[str, Members]  # of what is read at the places in M alone, one run of C slots

    def states(self, x: jax.Array) -> dict[str, jax.Array]:
        """Decoder states -> {distribution: [R, T, D]}, each at the places that it predicts.

        AR slot t predicts place t + 1; moving states costs less than moving logits later.
        """
        found = {name: x[:, a:b] for name, (a, b) in self.read.items()}
        found = {n: put_back(x, self.held[n]) if n in self.held else x for n, x in found.items()}
        return {name: jnp.roll(x, 1, axis=1) if name == "ar" else x for name, x in found.items()}


@dataclasses.dataclass
class _Stream:
    """One run of slots."""

    name: str
    rows: jax.Array  # [R, T, D]
    positions: jax.Array  # [T]
    keys: tuple[str, ...]  # the content streams it attends
    mask: jax.Array  # [R or 1, Q or 1, K] bool
    read: str | None = None  # the distribution it predicts; None: it is content alone
    members: Members | None = None  # it exists at the places in M alone


def lay_out(
    target: jax.Array,
    masked: jax.Array | None,
    config: ModelConfig,
    embed: Callable[[jax.Array], jax.Array],
    *,
    ar: bool,
    nar: bool,
    aux: bool,
    turn: jax.Array | None = None,
    capacity: int | None = None,
    prune: bool = False,
) -> Slots:
    """The streams asked for, side by side.

    Args:
      target: [R, T] int32, BOS ... EOS PAD...
      masked: [R, T] bool, the set M; needed for `nar` and `aux`.
      config: the model; its `ar_positions`, `ar_stream` and `ids` matter here.
      embed: token ids [..] -> rows [.., D]; called once for the target, which all streams share.
      ar: lay out AR content, and AR query where `ar_stream` is "query".
      nar: lay out NAR content.
      aux: lay out true content and AUX query too; needs `nar`, whose content they attend.
      turn: [R, T] int, when each place in M has its turn; None: in the order of the sentence.
      capacity: C, static: slots of the two-stream part, which hold the places in M.  A row with more of
        them predicts NaN at those that are left out.  None: T slots, none is left out.
      prune: what nobody reads does not attend in the last layer; with a capacity, NAR outside M neither.
    """
    if aux and not nar:
        raise ValueError("the AUX streams attend the NAR content stream: aux=True needs nar=True")
    target = jnp.asarray(target)
    length = target.shape[1]
    check_length(config, length, "a target")
    place = jnp.arange(length)
    truths = embed(target)
    symbol = embed(jnp.asarray(config.ids.mask))
    symbols = jnp.broadcast_to(symbol, truths.shape)
    laid: list[_Stream] = []
    held: Members | None = None
    if ar:
        content_place, query_place = ar_positions(place, config)
        start = config.ids.start
        fed = truths if start == config.ids.bos else truths.at[:, 0].set(embed(jnp.asarray(start)))
        causal = masks.causal_mask(length)
        own = ("ar content",)
        query = config.ar_stream == "query"
        laid.append(_Stream("ar content", fed, content_place, own, causal, None if query else "ar"))
        if query:
            laid.append(_Stream("ar query", symbols, query_place, own, causal, "ar"))
    if nar:
        if masked is None:
            raise ValueError("the NAR streams need the set M: pass masked")
        real = target != config.ids.pad
        held = None if capacity is None else members(masked, capacity)
        filled = jnp.where(masked[..., None], symbol, truths)
        laid.append(_Stream("nar", filled, place, ("nar",), masks.padding_mask(real), "nar"))
        if aux:
            keys = ("nar", "truth")
            at = None if held is None else (held.place, held.there)
            seen = (
                masks.true_content_mask(masked, real, at, turn),
                masks.aux_query_mask(masked, real, at, turn),
            )
            laid.append(_Stream("truth", truths, place, keys, seen[0], members=held))
            laid.append(_Stream("aux query", symbols, place, keys, seen[1], "aux", held))
    return _planned(laid, held, length, prune=prune)


def _planned(laid: list[_Stream], held: Members | None, length: int, *, prune: bool) -> Slots:
    """The slots of all streams, and who attends whom among those that are computed."""
    sizes = [length if s.members is None else s.members.place.shape[1] for s in laid]
    runs = dict(zip((s.name for s in laid), _runs(sizes), strict=True))
    content = [name for name in runs if any(name in s.keys for s in laid)]
    keys = dict(zip(content, _runs([runs[n][1] - runs[n][0] for n in content]), strict=True))
    plan = Plan(_blocks(laid, sizes, keys), _joined([runs[n] for n in content]))
    if any(s.members is not None for s in laid):
        embedded = _runs([length] * len(laid))
        plan = dataclasses.replace(plan, enter=_kept(zip(embedded, (s.members for s in laid), strict=True)))
    reads = {s.name: s.read for s in laid if s.read is not None}
    out, at_members = runs, {s.read: s.members for s in laid if s.read and s.members is not None}
    if prune and (len(reads) < len(laid) or held is not None):
        going = [s for s in laid if s.read is not None]
        kept = [(runs[s.name], held if s.name == "nar" else None) for s in going]
        if held is not None:
            at_members["nar"] = held
        sizes = [m.place.shape[1] if (m := at_members.get(str(s.read))) else length for s in going]
        out = dict(zip((s.name for s in going), _runs(sizes), strict=True))
        plan = dataclasses.replace(plan, last=Plan(_blocks(going, sizes, keys), plan.content, _kept(kept)))
    return Slots(
        jnp.concatenate([s.rows for s in laid], axis=1),
        jnp.concatenate([s.positions for s in laid]),
        plan,
        {read: out[name] for name, read in reads.items()},
        at_members,
    )


def _blocks(streams: list[_Stream], sizes: list[int], keys: dict[str, Range]) -> tuple[Block, ...]:
    """Streams side by side that attend the same keys are one block."""
    blocks: list[Block] = []
    ranges = dict(zip((s.name for s in streams), _runs(sizes), strict=True))
    for seen, group in itertools.groupby(streams, lambda s: s.keys):
        members = list(group)
        mask = jnp.concatenate([s.mask for s in members], axis=1) if len(members) > 1 else members[0].mask
        queries = (ranges[members[0].name][0], ranges[members[-1].name][1])
        blocks.append(Block(mask, queries, keys=(keys[seen[0]][0], keys[seen[-1]][1])))
    return tuple(blocks)


def _kept(runs: Iterable[tuple[Range, Members | None]]) -> tuple[Kept, ...]:
    return tuple(Kept(slots, members) for slots, members in runs)


def _runs(sizes: list[int]) -> list[Range]:
    """Runs of these sizes, one after the other."""
    ends = list(itertools.accumulate(sizes))
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def ar_positions(place: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Places i of the AR slots -> position embeddings of (content, query), by convention."""
    # Only a slot that predicts beyond the last token can leave the table; it is never read.
    ahead = jnp.minimum(place + 1, config.max_positions - 1)
    return {"code": (place, place), "figure": (ahead, ahead), "aligned": (place, ahead)}[config.ar_positions]


def check_length(config: ModelConfig, length: int, what: str) -> None:
    """Raises ValueError where learned positions do not reach `length`: a gather would clamp silently."""
    if config.positions == "learned" and length > config.max_positions:
        limit = config.max_positions
        raise ValueError(f"{what} padded to {length} tokens is longer than model.max_positions = {limit}")


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Runs that touch, as one."""
    joined: list[Range] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
