"""Transformer layers that do not know what a stream is.

A decoder layer receives slots and a `Plan`: which slots are content (their states are the keys and
values), and blocks of slots that attend a range of that content under a mask.  Everything else in
the layer (projections, cross-attention, feed-forward) is position-wise and runs over all slots at
once.  Which streams exist and who sees whom is decided in `streams.py`.

Dropout is on exactly when a "dropout" key is given to `apply`.

Letters: B sentences, R decoder rows (B, or B x candidates or beams), S source length, N slots,
C content slots, T target length, D model width, H heads, K head width, F ffn width, L layers.
Room: pure core, models.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from janus_jax.config import ModelConfig
from janus_jax.models.apart import each_layer
from janus_jax.models.members import Members, pick
from janus_jax.sharding import ROWS, TENSOR, constrain

NORMAL = nn.initializers.normal(0.02)  # BERT's initialisation, for every matrix and table
HIDDEN = jnp.finfo(jnp.float32).min  # finite: a row that sees nothing yields a mean, not NaN

KeysValues = tuple[jax.Array, jax.Array]  # [.., H, K, length] and [.., H, length, K], as products read them
Range = tuple[int, int]  # start and end of a run of slots


@struct.dataclass
class Block:
    """One self-attention: a run of slots attends a run of content slots."""

    mask: jax.Array  # [R or 1, queries, keys] bool
    queries: Range = struct.field(pytree_node=False)  # of the slots
    keys: Range = struct.field(pytree_node=False)  # of the content slots


@struct.dataclass
class Kept:
    """A run of slots that is computed further: all of it, or what it holds at the places in M."""

    slots: Range = struct.field(pytree_node=False)
    members: Members | None = None


@struct.dataclass
class Plan:
    """All self-attention of a decoder layer.

    Keys and values are those of all slots that come in; only the slots that are `kept` attend, in this
    layer's blocks, and come out.  The blocks' queries cover the slots kept, in order.
    """

    blocks: tuple[Block, ...]
    content: tuple[Range, ...] = struct.field(pytree_node=False)  # slots that give keys and values
    kept: tuple[Kept, ...] | None = None  # None: all
    enter: tuple[Kept, ...] | None = None  # of the slots embedded, those that enter the first layer
    last: Plan | None = None  # of the last layer, where slots that nobody reads are keys and values alone


def keep(x: jax.Array, kept: tuple[Kept, ...] | None) -> jax.Array:
    """The slots of `x` [R, N, D] that are kept, side by side."""
    if kept is None:
        return x
    runs = [(x[:, k.slots[0] : k.slots[1]], k.members) for k in kept]
    chosen = [run if members is None else pick(run, members) for run, members in runs]
    return constrain(jnp.concatenate(chosen, axis=1), ROWS)


DRAWN = "drawn"  # the name of dropout's masks

WINDOWS = 3  # most sizes that a cache is read in
LEAST_WINDOW = 16  # cells of the smallest


@struct.dataclass
class Sight:
    """What the slots of one decoding pass see: [new AR content | AR queries | a NAR canvas], each if any.

    The new content is written to as many cells of the cache, in a row; AR slots see cells of the cache,
    the canvas sees itself.
    """

    start: jax.Array  # [] or [B] int32, the cell of the first new content
    cells: jax.Array  # [B or 1, AR slots, P] bool, the cells that each AR slot sees
    canvas: jax.Array | None  # [B, 1, T] bool, the canvas slots that are not padding
    content: int = struct.field(pytree_node=False)  # how many of the slots are new content
    ar: int = struct.field(pytree_node=False)  # how many are new content or AR queries
    kept: int = struct.field(pytree_node=False, default=0)  # slots from this one on attend and come out


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, drop: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Scaled dot-product attention.

    Scores and softmax are float32 whatever the inputs; `drop` is applied to the attention weights.

    Args:
      q: [R, N, H, K].
      k: [R, H, K, S].
      v: [R, H, S, K].
      mask: [R or 1, N or 1, S] bool.
      drop: dropout.

    Returns:
      [R, N, H, K].
    """
    # Both products as plain ones, heads and rows in front: asked for another order, XLA turns the operands
    # round, which on a CPU takes up to ten times as long where queries are few.
    scores = jnp.einsum("rhnk,rhks->rhns", _by_head(q), k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores / q.shape[-1] ** 0.5, HIDDEN)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    return _by_head(jnp.einsum("rhns,rhsk->rhnk", weights, v))


class Attention(nn.Module):
    """Multi-head attention as its four projections; the caller says what attends what."""

    config: ModelConfig

    def setup(self) -> None:
        dense = functools.partial(
            nn.Dense, self.config.dim, dtype=jnp.dtype(self.config.dtype), kernel_init=NORMAL
        )
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()
        self.drop = _dropout(self, self.config.attention_dropout)

    def _heads(self, x: jax.Array) -> jax.Array:
        return constrain(x.reshape(*x.shape[:-1], self.config.heads, -1), ROWS, None, TENSOR)

    def keys_values(self, x: jax.Array) -> KeysValues:
        """[.., S, D] -> keys [.., H, K, S] and values [.., H, S, K]."""
        k, v = self._heads(self.key(x)), self._heads(self.value(x))
        return jnp.moveaxis(k, -3, -1), _by_head(v)

    def queries(self, x: jax.Array) -> jax.Array:
        """[.., D] -> [.., H, K]."""
        return self._heads(self.query(x))

    def gather(self, q: jax.Array, kv: KeysValues, mask: jax.Array) -> jax.Array:
        """Attention over `kv`, heads joined but not yet projected: [R, N, H, K] -> [R, N, D]."""
        return attend(q, *kv, mask, self.drop).reshape(*q.shape[:-2], -1)

    def __call__(self, x: jax.Array, kv: KeysValues, mask: jax.Array) -> jax.Array:
        """[R, N, D] attends keys and values under [R, 1 or N, S] -> [R, N, D]."""
        return self.out(self.gather(self.queries(x), kv, mask))


class FeedForward(nn.Module):
    """Two linear maps around the activation: [.., D] -> [.., F] -> [.., D]."""

    config: ModelConfig

    def setup(self) -> None:
        dense = functools.partial(nn.Dense, dtype=jnp.dtype(self.config.dtype), kernel_init=NORMAL)
        self.rise, self.fall = dense(self.config.ffn), dense(self.config.dim)
        self.drop = _dropout(self, self.config.activation_dropout)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[.., D] -> [.., D]."""
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        activation = jax.nn.relu if self.config.activation == "relu" else gelu
        return self.fall(self.drop(activation(constrain(self.rise(x), ROWS, None, TENSOR))))


class _Layer(nn.Module):
    """The residual wiring that encoder and decoder layers share."""

    config: ModelConfig

    def _residual(self, x: jax.Array, norm: nn.Module, f: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return self._leaving(x, norm, f(self._entering(x, norm)))

    def _entering(self, x: jax.Array, norm: nn.Module) -> jax.Array:
        """What a sub-layer is fed."""
        return norm(x) if self.config.norm == "pre" else x

    def _leaving(self, x: jax.Array, norm: nn.Module, found: jax.Array) -> jax.Array:
        """`x` with what a sub-layer found."""
        x = x + self.drop(found)
        return constrain(x if self.config.norm == "pre" else norm(x), ROWS)


class EncoderLayer(_Layer):
    """Bidirectional self-attention and feed-forward."""

    def setup(self) -> None:
        self.attention, self.attention_norm = Attention(self.config), layer_norm(self.config)
        self.ffn, self.ffn_norm = FeedForward(self.config), layer_norm(self.config)
        self.drop = _dropout(self, self.config.dropout)

    def __call__(self, x: jax.Array, _: None, mask: jax.Array) -> tuple[jax.Array, None]:
        """States [B, S, D], mask [B, 1, S] -> ([B, S, D], None), as a scan over layers wants it."""
        x = self._residual(
            x, self.attention_norm, lambda h: self.attention(h, self.attention.keys_values(h), mask)
        )
        return self._residual(x, self.ffn_norm, self.ffn), None


class DecoderLayer(_Layer):
    """Self-attention by plan, cross-attention, feed-forward; all streams share the weights.

    Training calls it in the shape that `scan` wants: (carry, what differs by layer, what all layers share).
    """

    def setup(self) -> None:
        self.attention, self.attention_norm = Attention(self.config), layer_norm(self.config)
        self.cross, self.cross_norm = Attention(self.config), layer_norm(self.config)
        self.ffn, self.ffn_norm = FeedForward(self.config), layer_norm(self.config)
        self.drop = _dropout(self, self.config.dropout)

    def __call__(
        self, x: jax.Array, _: None, shared: tuple[Plan, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        """All slots of all streams at once, the source projected here (training, scoring).

        x: [R, N, D].  shared: the plan, encoded source [B, S, D], source mask [B, 1, S].
        """
        plan, encoded, source_mask = shared
        x = self._self_attention(x, plan)
        return self._rest(x, self.cross.keys_values(encoded), source_mask), None

    def memory(self, encoded: jax.Array) -> KeysValues:
        """Encoded source [B, S, D] -> its keys and values for this layer's cross-attention."""
        return self.cross.keys_values(encoded)

    def remembered(self, x: jax.Array, memory: KeysValues, plan: Plan, source_mask: jax.Array) -> jax.Array:
        """All slots [R, N, D], as `__call__`, with the source already projected (mask-predict's passes)."""
        return self._rest(self._self_attention(x, plan), memory, source_mask)

    def step(
        self, x: jax.Array, cells: KeysValues, sight: Sight, memory: KeysValues, source_mask: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """One decoding pass over cached content.

        Args:
          x: [B, N, D], its slots as `Sight` has them.
          cells: keys and values of AR content so far, P of each; nothing else is cached.
          sight: what the slots see.
          memory: the source, projected.
          source_mask: [B, 1, S].

        Returns:
          The states of the slots that are kept, and the cells with the new content in them.
        """
        h = self._entering(x, self.attention_norm)
        given = jnp.concatenate([h[:, : sight.content], h[:, sight.ar :]], axis=1)
        k, v = self.attention.keys_values(given)
        cells = (
            _write_cells(cells[0], k[..., : sight.content], sight.start, axis=3),
            _write_cells(cells[1], v[:, :, : sight.content], sight.start, axis=2),
        )
        x, h = x[:, sight.kept :], h[:, sight.kept :]
        q = self.attention.queries(h)
        if sight.canvas is None:
            seen = self._over_cells(q, cells, sight)
        else:
            own = k[..., sight.content :], v[:, :, sight.content :]
            seen = self._over_cells_and_canvas(q, cells, own, sight)
        joined = seen.reshape(*seen.shape[:-2], -1)
        x = self._leaving(x, self.attention_norm, self.attention.out(joined))
        return self._rest(x, memory, source_mask), cells

    def _over_cells(self, q: jax.Array, content: KeysValues, sight: Sight) -> jax.Array:
        """AR slots [B, N, H, K] attend the cells -> [B, N, H, K].

        Cells that nothing has been written to yet are not read, as far as few sizes can tell.  On a GPU,
        whose host would wait in each layer to learn the size, they cost too little to be worth it.
        """
        drop, mask = self.attention.drop, sight.cells[:, sight.kept :]

        def over(size: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
            return attend(q, k[..., :size], v[..., :size, :], mask[..., :size], drop)

        cells = content[1].shape[2]
        sizes = windows(cells)

        def over_written(*seen: jax.Array) -> jax.Array:
            written = jnp.max(sight.start) + sight.content
            size = jnp.sum(written > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
            return jax.lax.switch(size, [functools.partial(over, size) for size in sizes], *seen)

        over_all, seen = functools.partial(over, cells), (q, *content, mask)
        if len(sizes) == 1:
            return over_all(*seen)
        return jax.lax.platform_dependent(*seen, cpu=over_written, tpu=over_written, default=over_all)

    def _over_cells_and_canvas(
        self, q: jax.Array, content: KeysValues, own: KeysValues, sight: Sight
    ) -> jax.Array:
        """AR slots attend the cells, a canvas attends itself (draft and verify) -> [B, N, H, K].

        All cells are read: beside a canvas they cost too little to be told apart.
        """
        drop, cells, on = self.attention.drop, sight.cells[:, sight.kept :], sight.canvas
        assert on is not None

        def apart(
            q: jax.Array, content: KeysValues, own: KeysValues, cells: jax.Array, on: jax.Array
        ) -> jax.Array:
            ar = cells.shape[1]
            seen = attend(q[:, :ar], *content, cells, drop), attend(q[:, ar:], *own, on, drop)
            return jnp.concatenate(seen, axis=1)

        def at_once(
            q: jax.Array, content: KeysValues, own: KeysValues, cells: jax.Array, on: jax.Array
        ) -> jax.Array:
            k = jnp.concatenate([content[0], own[0]], axis=3)
            v = jnp.concatenate([content[1], own[1]], axis=2)
            canvas = on.shape[2]
            of_cells = jnp.pad(cells, [(0, 0), (0, 0), (0, canvas)])
            of_canvas = jnp.broadcast_to(on, (on.shape[0], canvas, canvas))
            of_canvas = jnp.pad(of_canvas, [(0, 0), (0, 0), (cells.shape[2], 0)])
            return attend(q, k, v, jnp.concatenate([of_cells, of_canvas], axis=1), drop)

        # Twice the scores, a third of the kernels.
        return jax.lax.platform_dependent(q, content, own, cells, on, cpu=apart, default=at_once)

    def _self_attention(self, x: jax.Array, plan: Plan) -> jax.Array:
        h = self._entering(x, self.attention_norm)
        content = [h[:, a:b] for a, b in plan.content]
        k, v = self.attention.keys_values(jnp.concatenate(content, axis=1))
        x, h = keep(x, plan.kept), keep(h, plan.kept)
        q = self.attention.queries(h)
        seen = []
        for block in plan.blocks:
            (qa, qb), (ka, kb) = block.queries, block.keys
            seen.append(self.attention.gather(q[:, qa:qb], (k[..., ka:kb], v[:, :, ka:kb]), block.mask))
        return self._leaving(x, self.attention_norm, self.attention.out(jnp.concatenate(seen, axis=1)))

    def _rest(self, x: jax.Array, memory: KeysValues, source_mask: jax.Array) -> jax.Array:
        def cross(h: jax.Array) -> jax.Array:
            # Beams and candidates of a sentence are further slots that look at the same source.
            by_sentence = h.reshape(memory[0].shape[0], -1, h.shape[-1])
            return self.cross(by_sentence, memory, source_mask).reshape(h.shape)

        x = self._residual(x, self.cross_norm, cross)
        return self._residual(x, self.ffn_norm, self.ffn)


def stack(layer: type[_Layer], config: ModelConfig, depth: int) -> nn.Module:
    """`depth` layers as one module with parameters stacked on a leading axis [L, ...].

    `scan_layers` compiles one layer and loops over it; without it the loop is unrolled.  The
    parameters, and the results, are the same.  Decoding goes over `each_of` the layers instead.
    """
    body = nn.remat(layer, **remat_options(config)) if config.remat else layer
    return nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=depth,
        unroll=1 if config.scan_layers else depth,
    )(config)


def each_of(layers: nn.Module, layer: type[_Layer], method: str = "__call__") -> list[Callable[..., Any]]:
    """A method of each layer of a bound `stack`, the lowest first, with the layer's own parameters.

    One after the other whatever `scan_layers` says: a scan would want the cache, and the projected sources,
    stacked over layers, to take them apart and put them together at each step.
    """
    one = layer(layers.config, parent=None)  # type: ignore[attr-defined]
    return [
        functools.partial(one.apply, {"params": own}, method=method)
        for own in each_layer(layers.variables["params"])
    ]


def remat_options(config: ModelConfig) -> dict[str, Any]:
    """What `jax.checkpoint` is told about a layer."""
    policies = jax.checkpoint_policies
    keep = None
    if config.remat_keep == "products":
        # And what was drawn: to draw again costs more than to read.
        drawn = policies.save_only_these_names(DRAWN)
        keep = policies.save_from_both_policies(policies.dots_saveable, drawn)
    return {"prevent_cse": not config.scan_layers, "policy": keep}


def run_pruned(layers: nn.Module, x: jax.Array, shared: tuple[Any, Any], key: jax.Array | None) -> jax.Array:
    """As a `stack` of decoder layers, but the last layer is told something else than the others.

    Another shape comes out of the last layer, so the scan ends before it, and the last one is applied with
    its part of the same parameters.

    Args:
      layers: the bound stack, with its parameters.
      x: [R, N, D].
      shared: what all layers but the last share, and what the last one is given.
      key: of dropout, or None.

    Returns:
      The last layer's states.
    """
    config: ModelConfig = layers.config  # type: ignore[attr-defined]
    depth = config.decoder_layers
    layer = DecoderLayer(config, parent=None)
    keys = None if key is None else jax.random.split(key, depth)
    stacked = (layers.variables["params"], keys)

    def apply(x: jax.Array, own: Any, shared: Any) -> tuple[jax.Array, None]:
        params, key = own
        rngs = None if key is None else {"dropout": key}
        return layer.apply({"params": params}, x, None, shared, rngs=rngs)  # type: ignore[return-value]

    if config.remat:
        apply = jax.checkpoint(apply, **remat_options(config))
    if depth > 1:
        unroll = 1 if config.scan_layers else depth - 1
        others = jax.tree.map(lambda a: a[:-1], stacked)
        x, _ = jax.lax.scan(lambda x, own: apply(x, own, shared[0]), x, others, unroll=unroll)
    return apply(x, jax.tree.map(lambda a: a[-1], stacked), shared[1])[0]


def run_cached(
    layers: nn.Module,
    x: jax.Array,
    content: tuple[KeysValues, ...],
    sight: Sight,
    memory: tuple[KeysValues, ...],
    source_mask: jax.Array,
) -> tuple[jax.Array, tuple[KeysValues, ...]]:
    """`DecoderLayer.step` of each layer of a `stack`; each layer's cells are written in place.

    Args:
      layers: the bound stack, with its parameters.
      x: [B, N, D].
      content: the cells of each layer.
      sight: what the slots see, the same in all layers.
      memory: the source, projected for each layer.
      source_mask: [B, 1, S].

    Returns:
      The last layer's states of the AR slots that predict and of the canvas, and the cells.
    """
    written = []
    steps = each_of(layers, DecoderLayer, "step")
    for n, (step, cells, source) in enumerate(zip(steps, content, memory, strict=True)):
        if n == len(content) - 1 and sight.ar > sight.content:
            # Content slots have no other reader in the last layer than the cache.
            sight = dataclasses.replace(sight, kept=sight.content)
        x, cells = step(x, cells, sight, source, source_mask)
        written.append(cells)
    return x, tuple(written)


def layer_norm(config: ModelConfig, name: str | None = None) -> nn.Module:
    """Layer norm over D, statistics in float32."""
    return LayerNorm(config.norm_eps, config.dtype, name=name)


class LayerNorm(nn.Module):
    """Layer norm whose variance is taken in the form that is cheapest where it is asked for."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[.., D] -> [.., D] in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _normalised(x.astype(jnp.dtype(self.dtype)), scale, bias, self.eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Where no gradient is taken: the mean square of what the mean leaves, which XLA makes one kernel of."""
    wide = x.astype(jnp.float32)
    rest = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(rest), axis=-1, keepdims=True)
    return (rest * (jax.lax.rsqrt(variance + eps) * scale) + bias).astype(x.dtype)


@_normalised.defjvp
def _(eps: float, values: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> Any:
    """Flax's, both means of one reading of `x`: less is kept for the gradient, and moved."""

    def flax_s(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        norm = nn.LayerNorm(epsilon=eps, dtype=x.dtype, parent=None)
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x)

    return jax.jvp(flax_s, values, tangents)


def sinusoidal_positions(positions: jax.Array, dim: int) -> jax.Array:
    """Fixed sine and cosine table rows: [..] int -> [.., D] float32 (Vaswani et al. 2017)."""
    half = dim // 2
    rates = jnp.exp(-jnp.log(10_000.0) / max(half - 1, 1) * jnp.arange(half))
    angles = positions[..., None].astype(jnp.float32) * rates
    rows = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(rows, [(0, 0)] * positions.ndim + [(0, dim % 2)])


def windows(cells: int) -> tuple[int, ...]:
    """Sizes that a cache is read in, the last being all of it: 64 -> (16, 32, 64)."""
    sizes = [cells]
    while len(sizes) < WINDOWS and (half := -(-sizes[0] // 2)) >= LEAST_WINDOW:
        sizes.insert(0, half)
    return tuple(sizes)


def _by_head(x: jax.Array) -> jax.Array:
    """[.., S, H, K] <-> [.., H, S, K]."""
    return jnp.swapaxes(x, -3, -2)


def _write_cells(cache: jax.Array, fresh: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`cache` with `fresh` from cell `start` ([] or [B]) on, cells lying along `axis`."""
    fresh = fresh.astype(cache.dtype)
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, fresh, start, axis=axis)

    def in_place(cache: jax.Array, fresh: jax.Array, start: jax.Array) -> jax.Array:
        return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(
            cache, fresh, start
        )

    def anew(cache: jax.Array, fresh: jax.Array, start: jax.Array) -> jax.Array:
        of_fresh = jnp.arange(cache.shape[axis]) - start[:, None]
        of_fresh = jnp.expand_dims(of_fresh, [a for a in range(1, cache.ndim) if a != axis])
        moved = jnp.take_along_axis(fresh, jnp.clip(of_fresh, 0, fresh.shape[axis] - 1), axis=axis)
        return jnp.where((of_fresh >= 0) & (of_fresh < fresh.shape[axis]), moved, cache)

    # Writing all cells is one kernel of a GPU; writing some of each sentence is a scatter, two.
    return jax.lax.platform_dependent(cache, fresh, start, cpu=in_place, default=anew)


def _dropout(module: nn.Module, rate: float) -> Callable[[jax.Array], jax.Array]:
    """Dropout that is on exactly when a "dropout" key was given."""
    if rate == 0.0 or not module.has_rng("dropout"):
        return lambda x: x
    return Dropout(rate, deterministic=False)


class Dropout(nn.Dropout):
    """Flax's, with the mask under a name, so that `model.remat_keep` can keep it."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:  # type: ignore[override]
        """Zeros for a share `rate` of the entries, the others grown by as much."""
        if self.rate == 1.0:
            return jnp.zeros_like(inputs)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, inputs.shape)
        return jnp.where(checkpoint_name(kept, DRAWN), inputs / (1.0 - self.rate), 0)
