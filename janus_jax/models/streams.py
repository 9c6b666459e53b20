"""The streams of the paper: which token and position sits in each slot, and who attends whom.

One decoder stack, one embedding and one projection serve every distribution; "AR decoder", "NAR
decoder" and "AUX" are ways to feed and to mask that stack (METHOD, sections 1 and 2).

  stream              token in its slot       position    attends
  AR content, i       y_i                     i (*)       AR content k <= i
  AR query, i         [M], predicts y_{i+1}   i (*)       AR content k <= i
  NAR content, j      [M] if j in M else y_j  j           all NAR content
  true content, j     y_j                     j           NAR content visible or ahead, truths k <= j
  AUX query, j        [M], predicts y_j       j           NAR content visible or from j on, truths k < j

(*) `code`: both at i, as the released code has it; `figure`: both at i + 1; `aligned`: content at
i and query at i + 1, so that each carries the place of what it is or predicts.

All streams keep the target's own order and its static length T, so AR slot t predicts target
position t + 1, NAR and AUX slots position t.  Slots outside M of the two-stream part are computed
and never read.

Letters: R rows, T target length, N slots (T for each stream).
Room: pure core, models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from janus_jax import masks
from janus_jax.config import ModelConfig
from janus_jax.models.transformer import Block, Plan, Range


@dataclasses.dataclass
class Slots:
    """What goes through the decoder in one pass, and where each distribution is read."""

    rows: jax.Array  # [R, N, D] token embeddings
    positions: jax.Array  # [N] int32
    plan: Plan
    read: dict[str, Range]  # of "ar", "nar", "aux": the run of slots that predicts it


def lay_out(
    target: jax.Array,
    masked: jax.Array | None,
    config: ModelConfig,
    embed: Callable[[jax.Array], jax.Array],
    *,
    ar: bool,
    nar: bool,
    aux: bool,
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
    """
    if aux and not nar:
        raise ValueError("the AUX streams attend the NAR content stream: aux=True needs nar=True")
    target = jnp.asarray(target)
    ids, length = config.ids, target.shape[1]
    check_length(config, length, "a target")
    place = jnp.arange(length)
    truths = embed(target)
    symbol = embed(jnp.asarray(ids.mask))
    symbols = jnp.broadcast_to(symbol, truths.shape)
    rows: list[jax.Array] = []
    positions: list[jax.Array] = []
    content: list[Range] = []
    blocks: list[Block] = []
    read: dict[str, Range] = {}

    def add(slot_rows: jax.Array, slot_positions: jax.Array) -> Range:
        start = length * len(rows)
        rows.append(slot_rows)
        positions.append(slot_positions)
        return start, start + length

    if ar:
        content_place, query_place = ar_positions(place, config)
        fed = truths if ids.start == ids.bos else truths.at[:, 0].set(embed(jnp.asarray(ids.start)))
        stream = add(fed, content_place)
        content.append(stream)
        causal = masks.causal_mask(length)
        if config.ar_stream == "query":
            read["ar"] = add(symbols, query_place)
            causal = jnp.tile(causal, (1, 2, 1))
        else:
            read["ar"] = stream
        blocks.append(Block(causal, queries=(stream[0], read["ar"][1]), keys=(0, length)))
    if nar:
        if masked is None:
            raise ValueError("the NAR streams need the set M: pass masked")
        real = target != ids.pad
        keys = length * len(content)
        read["nar"] = add(jnp.where(masked[..., None], symbol, truths), place)
        content.append(read["nar"])
        blocks.append(Block(masks.padding_mask(real), queries=read["nar"], keys=(keys, keys + length)))
        if aux:
            truth = add(truths, place)
            content.append(truth)
            read["aux"] = add(symbols, place)
            seen = [masks.true_content_mask(masked, real), masks.aux_query_mask(masked, real)]
            queries = (truth[0], read["aux"][1])
            blocks.append(Block(jnp.concatenate(seen, axis=1), queries, keys=(keys, keys + 2 * length)))

    plan = Plan(tuple(blocks), _joined(content))
    return Slots(jnp.concatenate(rows, axis=1), jnp.concatenate(positions), plan, read)


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
