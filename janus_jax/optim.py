"""The optimiser: learning-rate schedules, Adam with decoupled weight decay, and an average of parameters.

Steps are counted as optax and fairseq do: schedule(n) is the rate of the update that follows n finished
ones, so the first update of all uses schedule(0), which is optim.init_lr when there is a warm-up.

Room: pure core.  Imports config only.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from janus_jax.config import OptimConfig

Tree = Any  # a pytree of arrays


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the finished updates n (a scalar, traced or not).

    All kinds rise linearly from init_lr at n = 0 to lr at n = w = warmup_steps.  From there

      inverse_sqrt   lr * sqrt(w / n), fairseq's to the letter (with no warm-up: lr / sqrt(n))
      polynomial     end_lr + (lr - end_lr) * (1 - (n - w) / (steps - w)) ** power, then end_lr
      constant       lr

    Args:
      config: its lr, schedule, warmup_steps, init_lr, end_lr and power.
      steps: updates of the whole run (train.steps).

    Returns:
      n -> rate, float32.

    Raises:
      ValueError: an unknown schedule.
    """
    warmup, lr = config.warmup_steps, config.lr

    def inverse_sqrt(n: jax.Array) -> jax.Array:
        return lr * jnp.sqrt(max(warmup, 1) / jnp.maximum(n, 1.0))

    def polynomial(n: jax.Array) -> jax.Array:
        left = 1.0 - (n - warmup) / max(steps - warmup, 1)
        return config.end_lr + (lr - config.end_lr) * jnp.clip(left, 0.0, 1.0) ** config.power

    def constant(n: jax.Array) -> jax.Array:
        return jnp.full_like(n, lr)

    kinds = {"inverse_sqrt": inverse_sqrt, "polynomial": polynomial, "constant": constant}
    if config.schedule not in kinds:
        raise ValueError(f"optim.schedule must be one of {', '.join(kinds)}, got {config.schedule!r}")
    after = kinds[config.schedule]

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        rising = config.init_lr + (lr - config.init_lr) * n / max(warmup, 1)
        return jnp.where(n < warmup, rising, after(n))

    return rate


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping (if any), Adam, weight decay, and the schedule, in this order.

    With rate r, gradient g clipped to a global norm of clip_norm, and bias-corrected moments m, v:

      p <- p - r * weight_decay * p - r * m / (sqrt(v) + eps)

    for all parameters, biases and norms included, as fairseq's Adam does.  (fairseq adds eps before the
    correction of v; the two differ only where sqrt(v) is not far above eps.)  The state has the same
    structure whatever the settings, so that a checkpoint survives a change of them.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def applied(opt_state: optax.OptState) -> jax.Array:
    """How many updates `optimizer` has made: an int32 scalar, without those that were skipped."""
    return opt_state[1].count  # type: ignore[index,union-attr]


def global_norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all entries of all arrays together: a float32 scalar, 0 for no arrays."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.typing.ArrayLike) -> Tree:
    """The exponential average of `params` after the update numbered `step` (the first is 1).

    Kept free of bias at every step: ema + w * (params - ema) with w = (1 - decay) / (1 - decay**step).
    So the first average is the first parameters themselves, and every later one is a true weighted mean:
    the parameters k updates ago weigh in proportion to decay**k, and the initial ones not at all.

    Args:
      ema: the average so far, same structure as `params`; a copy of the initial parameters to start with.
      params: parameters right after update `step`.
      decay: in (0, 1), config key optim.ema.
      step: updates made, this one included.
    """
    # -expm1 keeps 1 - decay**step exact where decay**step is near 1
    weight = (1.0 - decay) / -jnp.expm1(jnp.asarray(step, jnp.float32) * math.log(decay))
    return jax.tree.map(lambda e, p: e + weight.astype(e.dtype) * (p - e), ema, params)
