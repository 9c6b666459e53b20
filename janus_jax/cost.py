"""What a configuration computes: FLOPs counted from its shapes, and how often its data-dependent loops run.

XLA's cost analysis counts the body of a loop once, and the loss and both decoders are loops whose length
depends on the data; so matrix products are counted here, by formula.  A product of [m, k] and [k, n] is
2 m k n FLOPs.  Softmax, norms, dropout and the optimiser are left out: they cost memory traffic, not FLOPs.
Every padded slot counts, for it is computed; so these are the FLOPs of full rows.

Letters: B rows, S source length, T target length, N decoder slots, C content slots, D model width, F ffn
width, V vocabulary, L length classes, G length candidates or beams.
Room: pure core.  Imports config, batch, losses and decode.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from janus_jax import losses
from janus_jax.batch import capacity, corrupt, example_rng
from janus_jax.config import BatchConfig, Config, ModelConfig, SpecialIds
from janus_jax.decode.beam import BeamOptions
from janus_jax.decode.draft_verify import DraftOptions

SAMPLES = 512  # targets whose masks are drawn to find the mean share of M


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run of a program, over all devices."""

    model: float  # what the method needs
    executed: float  # with what is computed twice (model.remat) or for nothing (half-empty chunks)


def train_step(config: Config, rows: int, length: int, walks: int = 1) -> Flops:
    """One update at `rows` x `length` slots of source and of target.

    `walks` is how many times the chunked loss is walked, each over its part of the rows: devices that cut
    rows x micro-batches.  The last chunk of each is computed whole, however few slots are left for it.

    Backward costs twice the forward pass: a product's gradient by either factor is a product of that size.
    """
    c = config.model
    rows_run = rows * (2 if config.loss.objective == "rdrop" else 1)
    layers = encoder(c, rows_run, length) + decoder(c, config, rows_run, length, length)
    lengths = rows_run * 2 * c.dim * (c.max_length + 1)  # computed always, differentiated where it is read
    lengths *= 3 if "length" in losses.coefficients(config.loss) else 1
    total = 3 * (layers + projections(config, rows, length)) + lengths
    empty = 0.0
    if config.loss.chunk:
        chunk = min(config.loss.chunk, math.ceil(rows / walks * length))
        for walk in loss_walks(config, length).values():
            slots = rows / walks * walk.per_row
            empty += walk.streams * (math.ceil(slots / chunk) * chunk - slots)
    wasted = 3 * empty * walks * 2 * c.dim * c.vocab_size
    return Flops(total, total + wasted + (layers if c.remat and c.remat_keep == "nothing" else 0.0))


def encoder(c: ModelConfig, rows: float, length: float) -> float:
    """All encoder layers, forward: self-attention and feed-forward over [rows, length, D]."""
    d, f = c.dim, c.ffn
    attention = 2 * length * (4 * d * d) + 2 * length * length * d * 2
    return c.encoder_layers * rows * (attention + 2 * length * 2 * d * f)


def decoder(c: ModelConfig, config: Config, rows: float, source: float, target: float) -> float:
    """All decoder layers, forward, over every stream that the objective needs (`models.streams`)."""
    need = losses.streams_needed(config.loss)
    fewer = capacity(int(target), config.batch, c.ids) if config.loss.gather else None
    m = target if fewer is None else fewer  # slots that hold the places in M
    slots = content = scores = 0.0  # scores: query x key pairs of self-attention
    going = pairs = 0.0  # slots and scores of the last layer
    if need["ar"]:
        queries = 2 if c.ar_stream == "query" else 1
        slots, content, scores = slots + queries * target, content + target, scores + queries * target**2
        going, pairs = going + target, pairs + target**2
    if need["nar"]:
        slots, content, scores = slots + target, content + target, scores + target**2
        going, pairs = going + m, pairs + m * target
    if need["aux"]:
        slots, content, scores = slots + 2 * m, content + m, scores + 2 * m * (target + m)
        going, pairs = going + m, pairs + m * (target + m)
    if not config.loss.gather:
        going, pairs = slots, scores
    others = (c.decoder_layers - 1) * _decoder_layer(c, source, content, slots, scores)
    return rows * (keys_values(c, source) + others + _decoder_layer(c, source, content, going, pairs))


def _decoder_layer(c: ModelConfig, source: float, content: float, slots: float, scores: float) -> float:
    """One row through one layer: `content` slots become keys and values, `slots` attend and go on."""
    d = c.dim
    self_attention = 2 * (2 * slots + 2 * content) * d * d + 2 * 2 * scores * d
    cross = 2 * 2 * slots * d * d + 2 * 2 * slots * source * d
    return self_attention + cross + 2 * slots * 2 * d * c.ffn


def keys_values(c: ModelConfig, source: float) -> float:
    """One encoded source, projected for the cross-attention of every decoder layer."""
    return c.decoder_layers * 2 * 2 * source * c.dim * c.dim


def projections(config: Config, rows: float, length: int) -> float:
    """Output projections that the loss reads, forward."""
    c = config.model
    need = losses.streams_needed(config.loss)
    one = 2 * c.dim * c.vocab_size
    names = [n for n in losses.CROSS_ENTROPIES if need[n]]
    if config.loss.chunk == 0:
        per_row = float(length) * (len(names) * (2 if config.loss.objective == "rdrop" else 1))
    else:
        per_row = sum(walk.streams * walk.per_row for walk in loss_walks(config, length).values())
    return rows * per_row * one


@dataclass(frozen=True)
class LossWalk:
    """One pass of the chunked loss over some slots."""

    streams: int  # distributions projected at each slot
    per_row: float  # slots of one row, on average


def loss_walks(config: Config, length: int) -> dict[str, LossWalk]:
    """The passes of the chunked loss (`chunked._walks`), by the name of their loop: slots of full rows."""
    used = losses.coefficients(config.loss)
    share = masked_share(config.batch, config.model.ids, length)
    names = {n for n in losses.CROSS_ENTROPIES if n in used}
    names.update(name for tie, pair in losses.DIVERGENCES.items() if tie in used for name in pair)
    tokens = float(length - 1)  # BOS is given
    if config.loss.objective == "rdrop":
        return {"loss_tokens": LossWalk(2, tokens)}
    if names == {"ar"}:
        return {"loss_tokens": LossWalk(1, tokens)}
    masked = share * length
    walks = {"loss_masked": LossWalk(len(names), masked)}
    return {**walks, "loss_unmasked": LossWalk(1, tokens - masked)} if "ar" in used else walks


def loop_counts(config: Config, rows: float, length: int) -> dict[str, float]:
    """How often the loops of the chunked loss run on one device: {name of the loop: times}.

    Args:
      config: gives the chunk and the sampler of masks.
      rows: rows of the batch that one device holds at a time (of one micro-batch).
      length: padded length; rows are taken to be full.
    """
    if config.loss.chunk == 0:
        return {}
    found = loss_walks(config, length)
    return {name: math.ceil(rows * walk.per_row / config.loss.chunk) for name, walk in found.items()}


@functools.lru_cache(maxsize=32)
def masked_share(config: BatchConfig, ids: SpecialIds, length: int) -> float:
    """Mean of |M| / length over drawn masks of targets that fill the bucket; always the same number."""
    target = np.full((SAMPLES, length), max(ids.mask, ids.pad) + 1, np.int32)
    rngs = [example_rng(0, 0, i) for i in range(SAMPLES)]
    return float(corrupt(target, rngs, config, ids).mean())


def ar_decode(config: Config, rows: int, source: int, steps: float) -> Flops:
    """Cached AR decoding of `rows` sentences for `steps` tokens each, at `decode.beam` beams.

    Each step feeds a content slot, and a query slot where `model.ar_stream` is "query".  Counted as if it
    attended the whole cache of all beams of the sentence, as the last steps do, and nobody left the batch.
    """
    c, beams = config.model, config.decode.beam
    slots = 2 if c.ar_stream == "query" else 1
    cache = decode_slots(config, source) * beams
    layers = (c.decoder_layers - 1) * _decoder_layer(c, source, 1, slots, slots * cache)
    layers += _decoder_layer(c, source, 1, 1, cache)  # of the last one, only the slot read comes out
    total = _memory(c, rows, source) + steps * rows * beams * (layers + 2 * c.dim * c.vocab_size)
    return Flops(total, total)


def nar_decode(config: Config, rows: int, source: int, slots: int) -> Flops:
    """Mask-predict: `decode.iterations` passes over `rows` x `decode.candidates` canvases of `slots`.

    Logits are those of the slots that are masked: all in the first pass, a share of 1 / T less in each other.
    """
    c, canvases = config.model, config.decode.candidates
    layer, logits = _decoder_layer(c, source, slots, slots, slots**2), slots * 2 * c.dim * c.vocab_size
    T = config.decode.iterations
    passes = T * c.decoder_layers * layer + (T + 1) / 2 * logits
    if config.decode.rescore:  # both AR streams, or the one that there is; the last layer has one
        streams = (2 if c.ar_stream == "query" else 1) * slots
        others = (c.decoder_layers - 1) * _decoder_layer(c, source, slots, streams, streams * slots)
        passes += others + layer + logits
    total = _memory(c, rows, source) + rows * canvases * passes
    return Flops(total, total)


def draft_decode(config: Config, rows: int, source: int, passes: float) -> Flops:
    """Draft and verify: `passes` over `rows` blocks and the canvases beside them.

    A block's slots count as if each attended the whole cache; logits are those of the block and of the places
    that the next draft is read from.
    """
    c, decode = config.model, config.decode
    places = decode_slots(config, source)
    options = DraftOptions(
        search=BeamOptions(beam=1, max_length=places),
        block=decode.draft_block,
        branches=decode.draft_branches,
    )
    block, canvas, cells = options.slots, places + 1, options.cells
    content, inside = block + canvas, canvas**2
    others = _decoder_layer(c, source, content, 2 * block + canvas, 2 * block * cells + inside)
    last = _decoder_layer(c, source, content, block + canvas, block * cells + inside)
    logits = (block + options.block - 1) * 2 * c.dim * c.vocab_size
    total = _memory(c, rows, source) + passes * rows * ((c.decoder_layers - 1) * others + last + logits)
    return Flops(total, total)


def decode_slots(config: Config, source: int) -> int:
    """The most target tokens of a source padded to `source` (`Generator.slots`)."""
    c, decode = config.model, config.decode
    most = min(c.max_length, c.max_positions if c.positions == "learned" else c.max_length) - 1
    return max(1, min(int(min(decode.max_length_a, most) * source) + decode.max_length_b, most))


def _memory(c: ModelConfig, rows: int, source: int) -> float:
    """Encoder, its keys and values for every decoder layer, and length classes."""
    return encoder(c, rows, source) + rows * (keys_values(c, source) + 2 * c.dim * (c.max_length + 1))
