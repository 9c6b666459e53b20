"""JANUS: one encoder, one decoder stack, read as P_AR, P_NAR and P_AUX.

Training and scoring go through `Janus.__call__`: one encoder pass and one decoder pass over all
streams.  Decoding goes through `remember`, then `ar_step` (one token, cached), `nar_pass` (a whole
canvas) or `draft_pass` (both at once).  Parameters are a plain nested dict of float32 arrays, layers
stacked on a first axis; decoding takes those of `apart`, too.

Letters: B sentences, G beams or candidates of a sentence, S source length, T target length,
D model width, V vocabulary, C length classes, L layers, H heads, K head width.
Room: pure core, models.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from janus_jax import masks
from janus_jax.config import ModelConfig
from janus_jax.models import streams
from janus_jax.models.apart import Params, are_apart
from janus_jax.models.transformer import (
    NORMAL,
    DecoderLayer,
    EncoderLayer,
    KeysValues,
    Plan,
    Sight,
    each_of,
    keep,
    layer_norm,
    run_cached,
    run_pruned,
    sinusoidal_positions,
    stack,
)
from janus_jax.sharding import ROWS, TENSOR, constrain


@struct.dataclass
class Outputs:
    """What one training pass found: float32 logits, or the states they are projected from.

    All three are aligned: [:, t] is about y_t; None for what was not asked for.  ar[:, 0] means nothing
    (nobody predicts BOS), nor do nar[:, t] and aux[:, t] where t is not masked.
    """

    ar: jax.Array | None  # [B, T, V], or [B, T, D]
    nar: jax.Array | None
    aux: jax.Array | None
    length: jax.Array  # [B, C] logits, class = target length with BOS and EOS


class Projection(NamedTuple):
    """The parameters of the output projection."""

    table: jax.Array  # [V, D]
    bias: jax.Array | None  # [V]


def project(projection: Projection, states: jax.Array) -> jax.Array:
    """States [.., D] -> vocabulary logits [.., V] float32."""
    scores = _scores(states, projection.table)
    return scores if projection.bias is None else scores + projection.bias


@jax.custom_vjp
def _scores(states: jax.Array, table: jax.Array) -> jax.Array:
    """[.., D], [V, D] -> [.., V] float32; products of its gradient are made in the dtype of `states`, too."""
    return jnp.einsum("...d,vd->...v", states, table.astype(states.dtype), preferred_element_type=jnp.float32)


def _scores_backward(kept: tuple[jax.Array, jax.Array], by_scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    states, table = kept
    # Left to itself, jax multiplies the float32 gradient with what is bfloat16, at the price of float32.
    by_scores = by_scores.astype(states.dtype)
    by_table = jnp.einsum("...v,...d->vd", by_scores, states, preferred_element_type=jnp.float32)
    return jnp.einsum("...v,vd->...d", by_scores, table.astype(states.dtype)), by_table.astype(table.dtype)


_scores.defvjp(lambda states, table: (_scores(states, table), (states, table)), _scores_backward)


def output_projection(params: Params, config: ModelConfig) -> Projection:
    """Where the output projection is in the parameters."""
    table = params["target_table" if config.tie_output else "output_table"]
    table = constrain(table, TENSOR)  # brought together over fsdp once, not chunk by chunk
    return Projection(table, params["output_bias"] if config.output_bias else None)


@struct.dataclass
class Memory:
    """A source, encoded and projected once for all decoding steps."""

    layers: tuple[KeysValues, ...]  # of each layer's cross-attention, [B, H, K, S] and [B, H, S, K]
    mask: jax.Array  # [B, 1, S] bool
    length_logits: jax.Array  # [B, C] float32


@struct.dataclass
class ArCache:
    """AR content so far, of all beams of each sentence together.

    A beam that goes on from another one does not copy its content: `sources` says whose it sees.
    """

    # Of each layer, [B, H, K, P] and [B, H, P, K]; P = places x beams, cell place * beams + beam.
    content: tuple[KeysValues, ...]
    sources: jax.Array  # [B, G, T] int32: the beam whose cell holds this beam's token at each place

    def reorder(self, parents: jax.Array) -> ArCache:
        """Beam g of sentence b goes on from its beam parents[b, g]: [B, G] int32; no content moves."""
        return ArCache(self.content, jnp.take_along_axis(self.sources, parents[..., None], axis=1))


class Encoder(nn.Module):
    """Source token embeddings -> encoded source."""

    config: ModelConfig

    def setup(self) -> None:
        self.input = _Input(self.config)
        self.layers = stack(EncoderLayer, self.config, self.config.encoder_layers)
        self.norm = layer_norm(self.config) if self.config.norm == "pre" else None

    def __call__(self, tokens: jax.Array, real: jax.Array) -> jax.Array:
        """Token rows [B, S, D], real [B, S] bool -> [B, S, D].

        Positions count real tokens, so padding may stand on either side.
        """
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        x, mask = self.input(tokens, positions), masks.padding_mask(real)
        if are_apart(self.layers.variables.get("params", {})):
            for layer in each_of(self.layers, EncoderLayer):
                x, _ = layer(x, None, mask)
        else:
            x, _ = self.layers(x, None, mask)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """The one stack behind all three distributions; a plan says which streams run through it."""

    config: ModelConfig

    def setup(self) -> None:
        self.input = _Input(self.config)
        self.layers = stack(DecoderLayer, self.config, self.config.decoder_layers)
        self.norm = layer_norm(self.config) if self.config.norm == "pre" else None

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, plan: Plan, encoded: jax.Array, source_mask: jax.Array
    ) -> jax.Array:
        """Token rows [B, N, D] of all slots, positions [N] -> [B, N', D], the slots that come out."""
        x = keep(self.input(tokens, positions), plan.enter)
        if plan.last is None:
            return self._finish(self.layers(x, None, (plan, encoded, source_mask))[0])
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        shared = (plan, encoded, source_mask), (plan.last, encoded, source_mask)
        return self._finish(run_pruned(self.layers, x, shared, key))

    def memory(self, encoded: jax.Array) -> tuple[KeysValues, ...]:
        """Encoded source [B, S, D] -> keys and values for each layer."""
        return tuple(project(encoded) for project in each_of(self.layers, DecoderLayer, "memory"))

    def remembered(self, tokens: jax.Array, positions: jax.Array, plan: Plan, memory: Memory) -> jax.Array:
        """As `__call__`, over a projected source; R may be B x candidates."""
        x = keep(self.input(tokens, positions), plan.enter)
        layers = each_of(self.layers, DecoderLayer, "remembered")
        plans = [plan] * (len(layers) - 1) + [plan.last or plan]
        for layer, source, here in zip(layers, memory.layers, plans, strict=True):
            x = layer(x, source, here, memory.mask)
        return self._finish(x)

    def step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        content: tuple[KeysValues, ...],
        sight: Sight,
        memory: Memory,
    ) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """A decoding pass: rows [B, N, D], cached content as in `ArCache` -> states, the cache.

        The states are those of the AR slots that predict, and of the canvas.
        """
        x = self.input(tokens, positions)
        x, content = run_cached(self.layers, x, content, sight, memory.layers, memory.mask)
        return self._finish(x), content

    def _finish(self, x: jax.Array) -> jax.Array:
        return x if self.norm is None else self.norm(x)


class Janus(nn.Module):
    """The model of docs/method.md sections 1 to 3."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.target_table = self.param("target_table", NORMAL, (c.vocab_size, c.dim))
        self.source_table = (
            self.target_table
            if c.share_embeddings
            else self.param("source_table", NORMAL, (c.vocab_size, c.dim))
        )
        self.output_table = (
            self.target_table if c.tie_output else self.param("output_table", NORMAL, (c.vocab_size, c.dim))
        )
        if c.output_bias:
            self.output_bias = self.param("output_bias", nn.initializers.zeros, (c.vocab_size,))
        self.length_table = self.param("length_table", NORMAL, (c.max_length + 1, c.dim))
        self.encoder, self.decoder = Encoder(c), Decoder(c)

    def __call__(
        self, source: jax.Array, target: jax.Array, masked: jax.Array | None = None, **asked: Any
    ) -> Outputs:
        """Logits; arguments as of `states`."""
        found = self.states(source, target, masked, **asked)
        read = {n: self.logits(x) for n in ("ar", "nar", "aux") if (x := getattr(found, n)) is not None}
        return dataclasses.replace(found, **read)

    def states(
        self,
        source: jax.Array,
        target: jax.Array,
        masked: jax.Array | None = None,
        *,
        ar: bool = True,
        nar: bool = True,
        aux: bool = True,
        turn: jax.Array | None = None,
        capacity: int | None = None,
        prune: bool = False,
    ) -> Outputs:
        """One encoder pass, one decoder pass over the streams asked for; the states, not yet projected.

        Args:
          source: [B, S] int32.
          target: [B, T] int32, BOS ... EOS PAD...; AR is fed `ids.start` in the place of BOS.
          masked: [B, T] bool, the set M.
          ar: compute P_AR.
          nar: compute P_NAR.
          aux: compute P_AUX (needs nar).
          turn: [B, T] int32, when each place in M has its turn; None: in the order of the sentence.
          capacity: slots that AUX is computed in, enough for the places in M (`streams.lay_out`); None: T.
          prune: compute in the last layer what is read alone.  Neither changes a number that is read.
        """
        encoded, source_mask = self.encode(source)
        slots = streams.lay_out(
            target,
            masked,
            self.config,
            self._target_rows,
            ar=ar,
            nar=nar,
            aux=aux,
            turn=turn,
            capacity=capacity,
            prune=prune,
        )
        read = slots.states(self.decoder(slots.rows, slots.positions, slots.plan, encoded, source_mask))
        return Outputs(
            read.get("ar"), read.get("nar"), read.get("aux"), self.length_logits(encoded, source_mask)
        )

    def encode(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S] int32 -> encoded [B, S, D] and the source mask [B, 1, S] bool."""
        streams.check_length(self.config, source.shape[1], "a source")
        real = source != self.config.ids.pad
        return self.encoder(self._rows(self.source_table, source), real), masks.padding_mask(real)

    def remember(self, source: jax.Array) -> Memory:
        """Everything that decoding needs of a source [B, S], computed once."""
        encoded, mask = self.encode(source)
        return Memory(self.decoder.memory(encoded), mask, self.length_logits(encoded, mask))

    def length_logits(self, encoded: jax.Array, source_mask: jax.Array) -> jax.Array:
        """Target-length logits from the mean of the real source states: [B, S, D] -> [B, C] float32."""
        weight = source_mask[:, 0, :, None].astype(jnp.float32)
        mean = jnp.sum(encoded * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        if not self.config.length_gradient:
            mean = jax.lax.stop_gradient(mean)
        return mean @ constrain(self.length_table).T

    def ar_step(
        self, tokens: jax.Array, index: jax.Array, cache: ArCache, memory: Memory
    ) -> tuple[jax.Array, ArCache]:
        """Feeds one token per beam and reads the next one's logits.

        Args:
          tokens: [B, G] int32, the token at place `index` (ids.start at 0).
          index: int32 scalar.
          cache: from `empty_cache`, filled below `index`.
          memory: the source.

        Returns:
          Logits [B, G, V] float32 of place index + 1, and the cache with this token in it.
        """
        beams = tokens.shape[1]
        own = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[:, None], (*tokens.shape, 1))
        sources = jax.lax.dynamic_update_slice_in_dim(cache.sources, own, index, axis=2)
        # Cells lie place by place; a beam sees those that its own tokens, or its ancestors', were written to.
        cells = (jnp.arange(sources.shape[2]) <= index)[None, None]
        if beams > 1:
            cells = (cells[..., None] & (sources[..., None] == jnp.arange(beams))).reshape(*tokens.shape, -1)
        slots, positions, cells = self._with_queries(tokens, jnp.broadcast_to(index, (beams,)), cells)
        sight = Sight(jnp.asarray(index) * beams, cells, None, beams, slots.shape[1])
        x, content = self.decoder.step(self._target_rows(slots), positions, cache.content, sight, memory)
        return self.logits(x), ArCache(content, sources)

    def draft_pass(
        self,
        tokens: jax.Array,
        places: jax.Array,
        start: jax.Array,
        sees: jax.Array,
        canvas: jax.Array,
        cache: ArCache,
        memory: Memory,
    ) -> tuple[jax.Array, jax.Array, ArCache]:
        """AR over a block of each sentence and NAR over its canvas, in one pass.

        Args:
          tokens: [B, N] int32, the block.
          places: [B, N] int32, where each stands in its sentence.
          start: [B] int32, the cell that a block's first token is written to, the others after it.
          sees: [B, N, P] bool, the cells that each sees.
          canvas: [B, T] int32 with [M] where open.
          cache: of one beam, with P cells.
          memory: the sources.

        Returns:
          AR logits [B, N, V] of the places after those of the block, NAR states [B, T, D], and the cache.
        """
        read = tokens.shape[1]
        # Slots beyond the tables are never read.
        places = jnp.minimum(places, self.config.max_positions - 1)
        slots, positions, cells = self._with_queries(tokens, places, sees)
        on_canvas = jnp.broadcast_to(jnp.arange(canvas.shape[1]), canvas.shape)
        on = masks.padding_mask(canvas != self.config.ids.pad)
        sight = Sight(start, cells, on, read, slots.shape[1])
        slots = jnp.concatenate([slots, canvas], axis=1)
        positions = jnp.concatenate([positions, on_canvas], axis=1)
        x, content = self.decoder.step(self._target_rows(slots), positions, cache.content, sight, memory)
        return self.logits(x[:, :read]), x[:, read:], ArCache(content, cache.sources)

    def _with_queries(
        self, tokens: jax.Array, places: jax.Array, cells: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """AR slots of tokens [B, n] at places [.., n]: with their queries, if there are any.

        Returns tokens [B, n or 2n], positions [.., n or 2n] and what they see, [.., n or 2n, P].
        """
        content, query = streams.ar_positions(places, self.config)
        if self.config.ar_stream == "content":
            return tokens, content, cells
        cells = jnp.concatenate([cells, cells], axis=1)
        slots = jnp.concatenate([tokens, jnp.full_like(tokens, self.config.ids.mask)], axis=1)
        return slots, jnp.concatenate([content, query], axis=-1), cells

    def nar_pass(self, canvas: jax.Array, memory: Memory) -> jax.Array:
        """One mask-predict pass: canvas [B, G, T] int32, [M] where open -> states [B, G, T, D]."""
        rows = canvas.reshape(-1, canvas.shape[-1])
        nothing = jnp.zeros(rows.shape, bool)  # the canvas holds its [M] already
        slots = streams.lay_out(rows, nothing, self.config, self._target_rows, ar=False, nar=True, aux=False)
        return self._read(slots, memory).reshape(*canvas.shape, -1)

    def ar_pass(self, target: jax.Array, memory: Memory) -> jax.Array:
        """AR states of whole candidates in one parallel pass: [B, G, T] int32 -> [B, G, T, D].

        [:, :, t] is what y_t is predicted from, as in `Outputs.ar`.
        """
        rows = target.reshape(-1, target.shape[-1])
        slots = streams.lay_out(
            rows, None, self.config, self._target_rows, ar=True, nar=False, aux=False, prune=True
        )
        return self._read(slots, memory).reshape(*target.shape, -1)

    def logits(self, x: jax.Array) -> jax.Array:
        """States [.., D] -> vocabulary logits [.., V] float32."""
        bias = self.output_bias if self.config.output_bias else None
        return project(Projection(self.output_table, bias), x)

    def _read(self, slots: streams.Slots, memory: Memory) -> jax.Array:
        """States of the only distribution laid out."""
        x = self.decoder.remembered(slots.rows, slots.positions, slots.plan, memory)
        (states,) = slots.states(x).values()
        return states

    def _target_rows(self, tokens: jax.Array) -> jax.Array:
        """Target token ids [..] -> embeddings [.., D]."""
        return self._rows(self.target_table, tokens)

    def _rows(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Token ids [..] -> embeddings [.., D]."""
        rows = jnp.take(constrain(table, TENSOR), tokens, axis=0).astype(jnp.dtype(self.config.dtype))
        if tokens.ndim:  # else a single symbol's
            rows = constrain(rows, ROWS)
        return rows * self.config.dim**0.5 if self.config.scale_embeddings else rows


class _Input(nn.Module):
    """Adds position embeddings to token rows; then layer norm (BART) and dropout."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[R, N, D], positions [N] or [R, N] -> [R, N, D]."""
        c = self.config
        if c.positions == "learned":
            table = self.param("positions", NORMAL, (c.max_positions, c.dim))
            places = jnp.take(constrain(table), positions, axis=0)
        else:
            places = sinusoidal_positions(positions, c.dim)
        x = constrain(tokens + places.astype(tokens.dtype), ROWS)
        if c.embed_norm:
            x = layer_norm(c, name="norm")(x)
        if c.dropout and self.has_rng("dropout"):
            x = nn.Dropout(c.dropout, deterministic=False)(x)
        return x


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Freshly drawn parameters, float32, N(0, 0.02) as BERT; pure, so `jit` and `eval_shape` take it."""
    tokens = jnp.full((1, 4), config.ids.bos, jnp.int32)
    nar = config.ar_stream == "query"
    masked = jnp.zeros((1, 4), bool)
    return Janus(config).init(key, tokens, tokens, masked, ar=True, nar=nar, aux=nar)["params"]


def empty_cache(config: ModelConfig, sentences: int, beams: int, length: int) -> ArCache:
    """No content yet, and room for that of `length` places."""
    width, cells = config.dim // config.heads, length * beams
    zeros = functools.partial(jnp.zeros, dtype=jnp.dtype(config.dtype))
    keys, values = (
        zeros((sentences, config.heads, width, cells)),
        zeros((sentences, config.heads, cells, width)),
    )
    return ArCache(
        ((keys, values),) * config.decoder_layers, jnp.zeros((sentences, beams, length), jnp.int32)
    )
