"""The objective without a [B, T, V] tensor: logits exist for one chunk of slots at a time.

Same terms as `losses.terms`, which stays as the plain version that this one is tested against.  The
slots that an objective reads are listed first (those in M for JANUS's three distributions and their
KLs, the other tokens for AR alone) and walked in chunks; slots that nobody reads (padding, NAR and
AUX outside M) cost nothing.

The gradient of a chunk is taken on the spot, while its logits are there: no logits are kept for the
backward pass, nor computed twice.  Memory is that of one chunk, whatever B x T x V.  The derivative by the
logits is written out (`_gradients`), as on an accelerator the loss is bound by how often [c, V] arrays are
read and written: the logits three times (for their highest, for all sums, for the gradient), and the gradient
once, in the model's dtype.

A batch whose rows lie on several devices (of the mesh that is set) is walked in as many shares at once,
each of the rows of one device, so that listing and gathering slots move nothing between devices.

Letters: B rows, T target length, G shares, n slots of a share (B / G x T), c slots of a chunk,
D model width, V vocabulary.
Room: pure core.  Imports losses, sharding and config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from janus_jax import losses, sharding
from janus_jax.config import KL_LEARNERS, LossConfig, SpecialIds

Arrays = dict[str, jax.Array]
Tree = Any  # a pytree of arrays
Project = Callable[[Tree, jax.Array], jax.Array]  # (projection, states [.., D]) -> logits [.., V] float32


@dataclass(frozen=True)
class Walk:
    """One pass over some of the slots: which streams are read there, and into which terms."""

    slots: str  # "masked", "tokens" (all that AR predicts) or "unmasked" (of those the others)
    streams: tuple[str, ...]
    cross_entropies: tuple[tuple[str, str], ...]  # (term, stream)
    divergences: tuple[tuple[str, str, str], ...] = ()  # (term, stream, stream)
    learners: tuple[str, ...] = ()  # streams that the divergences have a gradient by
    one_way: bool = False  # KL(first stream || second) in place of the mean of both ways

    def directions(self, left: str, right: str) -> tuple[tuple[str, str], ...]:
        """From whom whose divergence is taken: (left, right), and the other way round unless `one_way`."""
        return ((left, right),) if self.one_way else ((left, right), (right, left))

    def terms(self) -> tuple[str, ...]:
        """Names of everything summed up: `ar`, `nll_ar`, ..."""
        found = dict.fromkeys(term for term, _ in self.cross_entropies)
        return (*found, *(f"nll_{term}" for term in found), *(term for term, *_ in self.divergences))


def objective(
    states: Mapping[str, jax.Array],
    projection: Tree,
    project: Project,
    target: jax.Array,
    masked: jax.Array,
    config: LossConfig,
    ids: SpecialIds,
    *,
    weights: Mapping[str, jax.Array],
    scale: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """All of the objective that needs logits over the vocabulary, that is all but the length loss.

    Args:
      states: last decoder states by stream, "ar", "nar" and "aux": [B, T, D], aligned with what they
        predict; for objective `rdrop`, `ar` holds two dropout passes, [2B, T, D].
      projection: the parameters of the output projection.
      project: applies them; a top-level function, as it is static.
      target: [B, T] int32.
      masked: [B, T] bool.
      config: objective, smoothing and `chunk`, the number of slots c whose logits exist at a time.
      ids: special ids.
      weights: of each term, over the whole global batch (`losses.weights`).
      scale: of the KL terms (`losses.kl_scale`).

    Returns:
      (sum over terms of coefficient x sum / weight, {term: sum}), float32 scalars.  The first carries
      the gradient to states and projection; the sums are for the reader and carry none.
    """
    tokens, _ = losses.items(target, ids)
    shares = sharding.row_shares()
    streams = dict(states)
    if config.objective == "rdrop":
        streams["ar"], streams["ar_again"] = jnp.split(states["ar"], 2)
    walks = _walks(config)
    read = {name for walk in walks for name in walk.streams}

    def share(x: jax.Array) -> jax.Array:
        """[B, T, ..] -> [G, n, ..]; the rows of a share stay together."""
        return sharding.constrain(x.reshape(shares, -1, *x.shape[2:]), sharding.ROWS)

    slots = {"masked": masked, "tokens": tokens > 0, "unmasked": (tokens > 0) & ~masked}
    scales = {
        name: coefficient / jnp.maximum(weights[name], 1.0)
        for name, coefficient in losses.scaled(config, scale).items()
        if name != "length"
    }
    value, sums = _walk_all(
        (walks, project, config.chunk, config.label_smoothing),
        {name: share(streams[name]) for name in sorted(read)},
        projection,
        share(target),
        tuple(share(slots[walk.slots]) for walk in walks),
        scales,
    )
    return value, jax.lax.stop_gradient(sums)


def _walks(config: LossConfig) -> tuple[Walk, ...]:
    """The passes of an objective: over M, with whatever is read there, then AR over the other tokens."""
    used = losses.coefficients(config)
    if config.objective == "rdrop":
        twice = (("ar", "ar"), ("ar", "ar_again"))
        both = ("ar", "ar_again")
        return (Walk("tokens", both, twice, (("kl_rdrop", *both),), both),)
    cross_entropies = tuple((name, name) for name in losses.CROSS_ENTROPIES if name in used)
    pairs = tuple((name, *pair) for name, pair in losses.DIVERGENCES.items() if name in used)
    streams = tuple(dict.fromkeys(stream for _, *found in (*cross_entropies, *pairs) for stream in found))
    if streams == ("ar",):
        return (Walk("tokens", streams, cross_entropies),)
    one_way = config.kl_form == "one_way"
    over_m = Walk("masked", streams, cross_entropies, pairs, KL_LEARNERS[config.kl_learners], one_way)
    return (over_m, Walk("unmasked", ("ar",), (("ar", "ar"),))) if "ar" in used else (over_m,)


# (walks, project, chunk, label smoothing): what is static
Static = tuple[tuple[Walk, ...], Project, int, float]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk_all(
    static: Static,
    states: Arrays,
    projection: Tree,
    target: jax.Array,
    chosen: tuple[jax.Array, ...],
    scales: Arrays,
) -> tuple[jax.Array, Arrays]:
    """States {stream: [G, n, D]}, target [G, n], chosen slots [G, n] of each walk -> (objective, sums)."""
    found, _ = _accumulate(static, states, projection, target, chosen, scales, gradient=False)
    return found


def _forward(
    static: Static,
    states: Arrays,
    projection: Tree,
    target: jax.Array,
    chosen: tuple[jax.Array, ...],
    scales: Arrays,
) -> tuple[tuple[jax.Array, Arrays], Tree]:
    return _accumulate(static, states, projection, target, chosen, scales, gradient=True)


def _backward(_: Static, gradient: Tree, cotangent: tuple[jax.Array, Arrays]) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), gradient)
    return (*scaled, None, None, None)


_walk_all.defvjp(_forward, _backward)


def _accumulate(
    static: Static,
    states: Arrays,
    projection: Tree,
    target: jax.Array,
    chosen: tuple[jax.Array, ...],
    scales: Arrays,
    *,
    gradient: bool,
) -> tuple[tuple[jax.Array, Arrays], Tree]:
    """((objective, sums), its gradient by (states, projection)); without `gradient`, that is None."""
    shares = target.shape[0]
    zeros: Tree = (jnp.zeros(shares), {n: jnp.zeros(shares) for walk in static[0] for n in walk.terms()})
    if gradient:
        # The projection's gradient is kept apart by share, so that devices exchange it once, at the end.
        apart = jax.tree.map(lambda p: _apart(jnp.zeros((shares, *p.shape), jnp.float32)), projection)
        zeros = (*zeros, (jax.tree.map(jnp.zeros_like, states), apart))
    found = zeros
    for walk, where in zip(static[0], chosen, strict=True):
        found = _one_walk(walk, static, states, projection, target, where, scales, found, gradient=gradient)
    total, sums, *rest = found
    result = (jnp.sum(total), {name: jnp.sum(x) for name, x in sums.items()})
    if not gradient:
        return result, None
    by_states, apart = rest[0]
    return result, (
        by_states,
        jax.tree.map(lambda g, p: jnp.sum(g, axis=0).astype(p.dtype), apart, projection),
    )


def _one_walk(
    walk: Walk,
    static: Static,
    states: Arrays,
    projection: Tree,
    target: jax.Array,
    where: jax.Array,
    scales: Arrays,
    found: Tree,
    *,
    gradient: bool,
) -> Tree:
    """Adds what the slots `where` [G, n] contribute to `found`, chunk by chunk."""
    _, project, chunk, smoothing = static
    size = min(chunk, where.shape[1])
    of_chunk: Callable[..., Any] = functools.partial(_chunk, walk, project, smoothing, gradient)
    of_chunk = jax.vmap(of_chunk, in_axes=(0, None, 0, 0, None), spmd_axis_name=sharding.ROWS)
    listed = jnp.argsort(~where, axis=1, stable=True)  # the chosen slots, then the others
    order = jnp.pad(listed, ((0, 0), (0, -listed.shape[1] % size)))
    count = jnp.sum(where, axis=1, dtype=jnp.int32)
    last = jnp.max(count)

    def more(carry: tuple[jax.Array, Tree]) -> jax.Array:
        return carry[0] < last

    def step(carry: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        start, (total, sums, *gradients) = carry
        slots = jax.lax.dynamic_slice_in_dim(order, start, size, axis=1)  # [G, c]
        item = (start + jnp.arange(size) < count[:, None]).astype(jnp.float32)
        here = {n: jnp.take_along_axis(states[n], slots[..., None], axis=1) for n in walk.streams}
        truth = jnp.take_along_axis(target, slots, axis=1)
        value, here_sums, *by = of_chunk(here, projection, truth, item, scales)
        if gradient:
            written, apart = gradients[0]
            written = {n: _write(x, by[0][n], start) for n, x in written.items()}
            gradients = [(written, jax.tree.map(lambda a, g: _apart(a + g), apart, by[1]))]
        sums = {**sums, **{name: sums[name] + x for name, x in here_sums.items()}}
        return start + size, (total + value, sums, *gradients)

    def all_chunks(found: Tree) -> Tree:
        start = (jnp.int32(0), found)
        if order.shape[1] == size:  # one chunk holds all: no loop, at whose turns a host waits for its GPU
            return step(start)[1]
        return jax.lax.while_loop(more, step, start)[1]

    with jax.named_scope(f"loss_{walk.slots}"):
        if not gradient:
            return all_chunks(found)
        # Gradients by states are written one after the other, as walked, and put in their places once.
        total, sums, (by_states, apart) = found
        written = {n: jnp.zeros((*order.shape, states[n].shape[-1]), states[n].dtype) for n in walk.streams}
        total, sums, (written, apart) = all_chunks((total, sums, (written, apart)))
        places = jnp.argsort(listed, axis=1)[..., None]
        moved = {n: by_states[n] + jnp.take_along_axis(x, places, axis=1) for n, x in written.items()}
        return total, sums, ({**by_states, **moved}, apart)


def _apart(gradient: jax.Array) -> jax.Array:
    """A gradient of the projection by share, [G, V, ..]."""
    return sharding.constrain(gradient, sharding.ROWS, sharding.TENSOR)


def _write(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """`x` [G, n, D] with `rows` [G, c, D] from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis=1)


def _chunk(
    walk: Walk,
    project: Project,
    smoothing: float,
    gradient: bool,
    states: Arrays,
    projection: Tree,
    truth: jax.Array,
    item: jax.Array,
    scales: Arrays,
) -> tuple[Any, ...]:
    """States {stream: [c, D]}, truth [c], item [c] (1, or 0 for a slot not chosen) -> (objective, sums).

    With `gradient` also the gradients by states and by the projection.
    """

    def logits_of(states: Arrays, projection: Tree) -> Arrays:
        return {
            n: sharding.constrain(project(projection, x), None, sharding.TENSOR) for n, x in states.items()
        }

    if gradient:
        logits, pull_back = jax.vjp(logits_of, states, projection)
    else:
        logits = logits_of(states, projection)
    read = jax.lax.platform_dependent(
        logits,
        truth,
        cpu=functools.partial(_read_one_by_one, walk, smoothing),
        default=functools.partial(_read_at_once, walk, smoothing),
    )
    sums = {name: jnp.float32(0) for name in walk.terms()}
    for (term, _), (smoothed, nll) in zip(walk.cross_entropies, read.cross_entropies, strict=True):
        sums[term] += jnp.sum(smoothed * item)
        sums[f"nll_{term}"] += jnp.sum(nll * item)
    ways = {term: way for (term, *_), way in zip(walk.divergences, read.ways, strict=True)}
    for term, way in ways.items():
        sums[term] += jnp.sum(sum(way) / len(way) * item)
    value = jnp.sum(jnp.stack([scales[n] * sums[n] for n in sums if n in scales]))
    if not gradient:
        return value, sums
    by_logits = _gradients(walk, smoothing, read.log_p, ways, truth, item, scales)
    return value, sums, *pull_back(by_logits)


class _Read(NamedTuple):
    """What is read off the logits of a chunk."""

    log_p: Arrays  # {stream: [c, V]}
    cross_entropies: tuple[tuple[jax.Array, jax.Array], ...]  # of each [c], smoothed and plain
    ways: tuple[tuple[jax.Array, ...], ...]  # of each divergence [c], in the order of `Walk.directions`


def _read_one_by_one(walk: Walk, smoothing: float, logits: Arrays, truth: jax.Array) -> _Read:
    """Log-probabilities first, then one after the other from them."""
    log_p = {name: jax.nn.log_softmax(x, axis=-1) for name, x in logits.items()}
    both = [losses.label_smoothed(log_p[stream], truth, smoothing) for _, stream in walk.cross_entropies]
    ways = [
        tuple(losses.kl(log_p[one], log_p[other]) for one, other in walk.directions(left, right))
        for _, left, right in walk.divergences
    ]
    return _Read(log_p, tuple(both), tuple(ways))


def _read_at_once(walk: Walk, smoothing: float, logits: Arrays, truth: jax.Array) -> _Read:
    """Sums over the vocabulary alone, none of which wants another one: two readings of the logits, not four.

    With z the logits less their highest, and Z the sum of exp z: log p = z - log Z, and
    KL(p||q) = sum of exp(z) (z - z') / Z - log Z + log Z'.
    """
    z = {name: x - jnp.max(x, axis=-1, keepdims=True) for name, x in logits.items()}
    total = {name: jnp.sum(jnp.exp(x), axis=-1) for name, x in z.items()}
    log_total = {name: jnp.log(x) for name, x in total.items()}
    both = []
    for _, stream in walk.cross_entropies:
        here = truth[:, None] == jnp.arange(z[stream].shape[-1])
        nll = log_total[stream] - jnp.sum(jnp.where(here, z[stream], 0.0), axis=-1)
        mean = jnp.sum(z[stream], axis=-1) / z[stream].shape[-1] - log_total[stream]
        both.append(((1 - smoothing) * nll - smoothing * mean, nll))

    def kl(one: str, other: str) -> jax.Array:
        apart = jnp.sum(jnp.exp(z[one]) * (z[one] - z[other]), axis=-1) / total[one]
        return apart - log_total[one] + log_total[other]

    ways = [
        tuple(kl(one, other) for one, other in walk.directions(left, right))
        for _, left, right in walk.divergences
    ]
    return _Read({n: x - log_total[n][:, None] for n, x in z.items()}, tuple(both), tuple(ways))


def _gradients(
    walk: Walk,
    smoothing: float,
    log_p: Arrays,
    ways: Mapping[str, tuple[jax.Array, ...]],
    truth: jax.Array,
    item: jax.Array,
    scales: Arrays,
) -> Arrays:
    """What `jax.grad` would find by the logits, {stream: [c, V]}.

    With p the softmax of logits z, y the truth smoothed, and d = log p - log q:
      cross-entropy of p       by z: p - y
      (KL(p||q) + KL(q||p)) / 2    : (p d + p - q - p KL(p||q)) / 2, where p learns from it
      KL(p||q)                     : p d - p KL(p||q); by the logits of q: q - p
    """
    found = {name: jnp.float32(0) for name in log_p}
    p = {name: jnp.exp(x) for name, x in log_p.items()}
    for term, stream in walk.cross_entropies:
        size = log_p[stream].shape[-1]
        here = truth[:, None] == jnp.arange(size)
        smoothed = jnp.where(here, 1 - smoothing, 0.0) + smoothing / size
        found[stream] += scales[term] * (p[stream] - smoothed)
    for term, left, right in walk.divergences:
        if walk.one_way:
            (kl,) = ways[term]
            by = {left: p[left] * (log_p[left] - log_p[right] - kl[:, None]), right: p[right] - p[left]}
        else:
            by = {
                one: 0.5 * (p[one] * (log_p[one] - log_p[other] + 1 - kl[:, None]) - p[other])
                for one, other, kl in ((left, right, ways[term][0]), (right, left, ways[term][1]))
            }
        for one in walk.learners:
            if one in by:
                found[one] += scales[term] * by[one]
    # A stream may have no term that teaches it: only tied to, and not among the learners.
    return {name: jnp.broadcast_to(x, log_p[name].shape) * item[:, None] for name, x in found.items()}
