"""One update and one evaluation of a batch: pure top-level functions, to be jit-compiled by a shell.

Dropout draws from fold_in(key, step), so an update is a function of (state, batch) alone and a
resumed run repeats it bit for bit.

Letters: B rows of a batch, M micro-batches.
Room: pure core.  Imports models, losses, optim, batch and config.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from janus_jax import chunked, losses, optim
from janus_jax.batch import capacity
from janus_jax.config import Config
from janus_jax.models import Janus, Outputs, Params, init_params, output_projection, project

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training carries from update to update, and all that a checkpoint holds."""

    step: jax.Array  # int32, updates attempted
    skipped: jax.Array  # int32, consecutive updates skipped as not finite
    key: jax.Array  # uint32 key data of the run's dropout key
    params: Params
    opt_state: Any
    ema: Params | None  # exponential average of params, or None


def init_state(config: Config, params: Params | None = None) -> TrainState:
    """The state before the first update; a pure function of its arguments, so it can be jitted.

    Args:
      config: static.
      params: what the parameters are; None draws them.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    if params is None:
        params = init_params(init_key, config.model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(dropout_key),
        params=params,
        opt_state=optim.optimizer(config.optim, config.train.steps).init(params),
        # A copy: the state is donated to the update, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if config.optim.ema else None,
    )


def train_step(state: TrainState, batch: Batch, config: Config) -> tuple[TrainState, Metrics]:
    """One update.

    The gradient is that of the objective over the whole batch, however many micro-batches it is
    computed in.  An update whose loss or gradient norm is not finite, or whose norm exceeds
    `train.max_grad_norm`, leaves parameters and optimiser as they were.

    Args:
      state: current state.
      batch: arrays of `batch.spec`; with `loss.gather`, no row has more places in M than its sampler can
        draw (`batch.capacity`), else the loss is NaN, and the update is not applied.
      config: static.

    Returns:
      The next state and float32 scalars: `loss`, every term and nll, `grad_norm`, `lr`, `tokens`
      (predicted target tokens), `masked` (share of them in M), `ok` (1 if applied), `skipped`; where the
      ties change (`loss.kl_warmup`, `kl_decay`) `kl_scale`, what their weights in `loss` were multiplied by.
    """
    c = config
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    weights = losses.weights(batch["target"], batch["masked"], c.loss, c.model.ids)
    scale = losses.kl_scale(c.loss, state.step, c.train.steps)

    def partial_loss(params: Params, part: Batch, part_key: jax.Array) -> tuple[jax.Array, Metrics]:
        loss, sums = objective(params, part, c, part_key, weights, scale)
        terms = {name: (value, weights[name.removeprefix("nll_")]) for name, value in sums.items()}
        return loss, {name: losses.mean(term) for name, term in terms.items()}

    gradient = jax.value_and_grad(partial_loss, has_aux=True)
    if c.train.microbatches == 1:
        (loss, found), grads = gradient(state.params, batch, key)
    else:
        parts = jax.tree.map(lambda x: _split(x, c.train.microbatches), batch)
        keys = jax.random.split(key, c.train.microbatches)

        def accumulate(so_far: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, gradient(state.params, *part)), None

        shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts), keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((loss, found), grads), _ = jax.lax.scan(accumulate, zeros, (parts, keys))

    grad_norm = optim.global_norm(grads)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (grad_norm <= c.train.max_grad_norm)
    updates, opt_state = optim.optimizer(c.optim, c.train.steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = (
        None
        if state.ema is None
        else optim.ema_update(state.ema, params, c.optim.ema, optim.applied(opt_state))
    )
    new = (params, opt_state, ema)
    old = (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

    tokens = _tokens(batch["target"], c.model.ids.pad)
    metrics = {
        "loss": loss,
        **found,
        **({} if scale is None else {"kl_scale": scale}),
        "grad_norm": grad_norm,
        "lr": optim.schedule(c.optim, c.train.steps)(optim.applied(state.opt_state)),
        "tokens": tokens,
        "masked": jnp.sum(batch["masked"], dtype=jnp.float32) / jnp.maximum(tokens, 1.0),
        "ok": ok,
        "skipped": jnp.where(ok, 0, state.skipped + 1),
    }
    state = TrainState(
        step=state.step + 1,
        skipped=jnp.where(ok, 0, state.skipped + 1),
        key=state.key,
        params=params,
        opt_state=opt_state,
        ema=ema,
    )
    return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def eval_step(params: Params, batch: Batch, config: Config) -> losses.Terms:
    """Every term of a batch without dropout, as (sum, weight), to be added up over batches."""
    if config.loss.objective == "rdrop":  # without dropout its two passes are one, and it is plain `ar`
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, objective="ar"))
    weights = losses.weights(batch["target"], batch["masked"], config.loss, config.model.ids)
    _, sums = objective(params, batch, config, None, weights)
    return {name: (value, weights[name.removeprefix("nll_")]) for name, value in sums.items()}


def objective(
    params: Params,
    part: Batch,
    config: Config,
    key: jax.Array | None,
    weights: Metrics,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of (a part of) a batch.

    Args:
      params: parameters.
      part: rows of the batch.
      config: static; `loss.chunk` chooses between the chunked loss and the plain one, whose numbers
        are the same.
      key: of dropout, which is on exactly when a key is given.
      weights: of each term, over the whole batch.
      scale: of the KL terms (`losses.kl_scale`); None: 1.

    Returns:
      (sum over terms of coefficient x sum / weight, {term: sum over these rows}).  The gradient goes
      through the first alone.
    """
    c, ids, target, masked = config.loss, config.model.ids, part["target"], part["masked"]
    if c.chunk == 0:
        found = losses.terms(_forward(params, part, config, key), target, masked, c, ids)
        sums = {name: value for name, (value, _) in found.items()}
        whole = {name: (value, weights[name.removeprefix("nll_")]) for name, value in sums.items()}
        return losses.total(whole, c, scale), sums
    states = _forward(params, part, config, key, method="states")
    loss, sums = chunked.objective(
        {name: x for name in losses.CROSS_ENTROPIES if (x := getattr(states, name)) is not None},
        output_projection(params, config.model),
        project,
        target,
        masked,
        c,
        ids,
        weights=weights,
        scale=scale,
    )
    if "length" in weights:
        sums["length"] = losses.length_sum(states.length, target, ids)
        loss += losses.coefficients(c)["length"] * losses.mean((sums["length"], weights["length"]))
    return loss, sums


def _forward(
    params: Params, batch: Batch, config: Config, key: jax.Array | None, method: str = "__call__"
) -> Outputs:
    """What the objective reads, logits or states; dropout is on exactly when a key is given."""
    asked: dict[str, Any] = losses.streams_needed(config.loss)
    asked["turn"] = batch.get("turn")
    if config.loss.gather:
        length = batch["target"].shape[1]
        asked |= {"prune": True, "capacity": capacity(length, config.batch, config.model.ids)}
    source, target, masked = batch["source"], batch["target"], batch["masked"]
    if config.loss.objective == "rdrop" and key is not None:
        # Two passes with their own dropout are one pass over the batch twice.
        source, target, masked = (jnp.tile(x, (2, 1)) for x in (source, target, masked))
    rngs = None if key is None else {"dropout": key}
    model: Any = Janus(config.model)
    return model.apply({"params": params}, source, target, masked, rngs=rngs, method=method, **asked)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ..] -> [M, B / M, ..], strided so that rows stay on the device they are on."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _tokens(target: jax.Array, pad: int) -> jax.Array:
    return jnp.sum(target[:, 1:] != pad, dtype=jnp.float32)
