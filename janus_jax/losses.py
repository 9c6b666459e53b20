"""The objectives: cross-entropies, symmetric KLs and the length loss (docs/method.md section 4).

Every term is a (weighted sum, weight) pair.  The weights are functions of the batch alone, so a sum
is normalised once, over the whole global batch: the value does not depend on the number of devices,
hosts or micro-batches, and a batch with nothing masked costs 0, not NaN.

  L = ar CE_AR + nar CE_NAR(M) + aux CE_AUX(M) + length CE_length
      + kl_nar_aux symKL(NAR, AUX) + kl_ar_aux symKL(AR at M, AUX) + kl_ar_nar symKL(AR at M, NAR)

With `loss.kl_form` = one_way the KLs are KL(AUX||NAR), KL(AUX||AR at M) and KL(AR at M||NAR).

Letters: B sentences, T target length, V vocabulary, C length classes.
Room: pure core.  Imports batch and config.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from janus_jax.config import KL_LEARNERS, LossConfig, SpecialIds

Terms = dict[str, tuple[jax.Array, jax.Array]]  # name -> (weighted sum, weight), float32 scalars

CROSS_ENTROPIES = ("ar", "nar", "aux")
# Of two that are tied one way, the first teaches: AUX sees the most.
DIVERGENCES = {"kl_nar_aux": ("aux", "nar"), "kl_ar_aux": ("aux", "ar"), "kl_ar_nar": ("ar", "nar")}


class Logits(Protocol):
    """What a model returns, [:, t] being a distribution of y_t; see `models.Outputs`."""

    ar: jax.Array | None
    nar: jax.Array | None
    aux: jax.Array | None
    length: jax.Array


def coefficients(config: LossConfig) -> dict[str, float]:
    """The weight of each term in the total, by objective; terms of weight 0 are left out.

    `janus` takes all of them from the config.  The single-sided objectives have one main term, of
    weight 1: `ar`; `cmlm` with the length loss besides; `rdrop`, half of the R-Drop paper's sum
    (two cross-entropies and alpha times the symmetric KL), hence on the scale of `ar`.
    """
    if config.objective == "ar":
        return {"ar": 1.0}
    if config.objective == "cmlm":
        return {"nar": 1.0, "length": config.length}
    if config.objective == "rdrop":
        return {"ar": 1.0, "kl_rdrop": config.rdrop_alpha / 2}
    names = (*CROSS_ENTROPIES, "length", *DIVERGENCES)
    return {name: weight for name in names if (weight := getattr(config, name)) > 0}


def kl_scale(config: LossConfig, step: jax.Array, steps: int) -> jax.Array | None:
    """What the weights of the three KL terms are multiplied by at update `step` (from 0) of `steps`.

    Rises in a straight line from 0 to 1 over the first `kl_warmup` of the updates, so that no side is held to
    another that has learnt nothing yet, and falls in another from 1 to 0 over the first `kl_decay`, so that
    what the ties bring early does not hold AR back later; with both, their product.  None with neither: the
    weights are those of the config.
    """
    if not config.ties_change:
        return None
    done = step.astype(jnp.float32) / steps
    scale = jnp.float32(1)
    if config.kl_warmup:
        scale *= jnp.minimum(done / config.kl_warmup, 1.0)
    if config.kl_decay:
        scale *= jnp.maximum(1.0 - done / config.kl_decay, 0.0)
    return scale


def scaled(config: LossConfig, scale: jax.Array | None) -> dict[str, jax.Array | float]:
    """`coefficients`, those of the KL terms of `janus` times `scale`."""
    found = coefficients(config)
    if scale is None:
        return dict(found)
    return {name: c * scale if name in DIVERGENCES else c for name, c in found.items()}


def streams_needed(config: LossConfig) -> dict[str, bool]:
    """Which distributions the objective reads: {'ar': bool, 'nar': bool, 'aux': bool}."""
    used = set(coefficients(config))
    for divergence, pair in DIVERGENCES.items():
        if divergence in used:
            used.update(pair)
    needed = {name: name in used for name in CROSS_ENTROPIES}
    needed["nar"] |= needed["aux"]  # AUX attends the NAR content
    return needed


def taught(config: LossConfig) -> frozenset[str]:
    """The distributions, of ar, nar and aux, that some term with a weight teaches."""
    used = coefficients(config)
    found = {name for name in CROSS_ENTROPIES if name in used}
    for divergence, pair in DIVERGENCES.items():
        if divergence in used:
            found.update(side for side in pair if side in KL_LEARNERS[config.kl_learners])
    return frozenset(found)


def weights(
    target: jax.Array, masked: jax.Array, config: LossConfig, ids: SpecialIds
) -> dict[str, jax.Array]:
    """The weight (number of items) of each term of the objective: a function of the batch alone."""
    tokens, real_rows = items(target, ids)
    n_masked = jnp.sum(masked, dtype=jnp.float32)
    n_tokens = jnp.sum(tokens, dtype=jnp.float32)
    known = {
        "ar": n_tokens,
        "kl_rdrop": n_tokens,
        "length": jnp.sum(real_rows, dtype=jnp.float32),
        "nar": n_masked,
        "aux": n_masked,
        **dict.fromkeys(DIVERGENCES, n_masked),
    }
    if config.objective == "rdrop":
        known["ar"] = 2 * n_tokens
    return {name: known[name] for name in coefficients(config)}


def terms(
    outputs: Logits, target: jax.Array, masked: jax.Array, config: LossConfig, ids: SpecialIds
) -> Terms:
    """Every term of the objective, and the plain negative log-likelihoods (`nll_*`) for the reader.

    Args:
      outputs: logits; for objective `rdrop`, `ar` holds two dropout passes, [2B, T, V].
      target: [B, T] int32.
      masked: [B, T] bool.
      config: objective and smoothing.
      ids: special ids; filler rows are all padding.
    """
    used = coefficients(config)
    weight = weights(target, masked, config, ids)
    tokens, _ = items(target, ids)
    in_m = masked.astype(jnp.float32)
    log_p = {
        name: jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        for name in CROSS_ENTROPIES
        if (logits := getattr(outputs, name)) is not None
    }
    found: Terms = {}

    def cross_entropy(name: str, log_probs: jax.Array, truth: jax.Array, item: jax.Array) -> None:
        smoothed, nll = label_smoothed(log_probs, truth, config.label_smoothing)
        found[name] = (jnp.sum(smoothed * item), weight[name])
        found[f"nll_{name}"] = (jnp.sum(nll * item), weight[name])

    if "ar" in used:
        copies = 2 if config.objective == "rdrop" else 1
        truth, item = (jnp.tile(x, (copies, 1)) for x in (target, tokens))
        cross_entropy("ar", log_p["ar"], truth, item)
    for name in ("nar", "aux"):
        if name in used:
            cross_entropy(name, log_p[name], target, in_m)
    if "length" in used:
        found["length"] = (length_sum(outputs.length, target, ids), weight["length"])
    learners = KL_LEARNERS[config.kl_learners]
    tied = {name: x if name in learners else jax.lax.stop_gradient(x) for name, x in log_p.items()}
    for name, (left, right) in DIVERGENCES.items():
        if name in used:
            apart = kl if config.kl_form == "one_way" else symmetric_kl
            found[name] = (jnp.sum(apart(tied[left], tied[right]) * in_m), weight[name])
    if "kl_rdrop" in used:
        p, q = jnp.split(log_p["ar"], 2)
        found["kl_rdrop"] = (jnp.sum(symmetric_kl(p, q) * tokens), weight["kl_rdrop"])
    return found


def total(found: Terms, config: LossConfig, scale: jax.Array | None = None) -> jax.Array:
    """The objective: coefficients times means.  A term of weight 0 (nothing masked) counts 0.

    `scale`: of the KL terms, see `kl_scale`.
    """
    parts = [coefficient * mean(found[name]) for name, coefficient in scaled(config, scale).items()]
    return jnp.sum(jnp.stack(parts))


def mean(term: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Weighted sum / weight; 0 where the weight is 0."""
    value, weight = term
    return value / jnp.maximum(weight, 1.0)


def length_sum(logits: jax.Array, target: jax.Array, ids: SpecialIds) -> jax.Array:
    """Sum over real rows of -log p(target length): [B, C], [B, T] -> scalar.

    The class is the number of tokens, BOS and EOS counted; a longer target counts as the last class.
    """
    n_tokens = jnp.minimum(jnp.sum(target != ids.pad, axis=1), logits.shape[-1] - 1)
    picked = _pick(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), n_tokens)
    return -jnp.sum(picked * items(target, ids)[1])


def label_smoothed(log_probs: jax.Array, truth: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Smoothed cross-entropy and plain negative log-likelihood per slot.

    (1 - eps) * nll + eps * mean over the whole vocabulary of -log p: [.., V], [..] -> two of [..].
    """
    nll = -_pick(log_probs, truth)
    return (1 - smoothing) * nll - smoothing * jnp.mean(log_probs, axis=-1), nll


def symmetric_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """(KL(p||q) + KL(q||p)) / 2, summed over the vocabulary: two of [.., V] -> [..].

    Gradients flow into both sides: each distribution learns from the other.  (`terms` holds one side still
    where `loss.kl_learners` says so.)
    """
    return 0.5 * product_of_rows(jnp.exp(log_p) - jnp.exp(log_q), log_p - log_q)


def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p||q), summed over the vocabulary: two of [.., V] -> [..]."""
    return product_of_rows(jnp.exp(log_p), log_p - log_q)


def product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum over the last axis of a * b: two of [.., V] -> [..], float32."""

    def as_product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum("...v,...v->...", a, b, precision=jax.lax.Precision.HIGHEST)

    # On CPU XLA's own reduction of several arrays at once takes twice as long as a product; elsewhere the
    # product is the slow one, as it wants both factors written out.
    return jax.lax.platform_dependent(a, b, cpu=as_product, default=lambda a, b: jnp.sum(a * b, axis=-1))


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[.., index]: [.., V], [..] int -> [..].

    As a sum over V rather than a gather, so that values cut over V need not be brought together.
    """
    here = index[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(here, values, 0.0), axis=-1)


def items(target: jax.Array, ids: SpecialIds) -> tuple[jax.Array, jax.Array]:
    """What losses are means over, as float32 0/1: predicted tokens [B, T] and real rows [B].

    Predicted are all real tokens but the first.
    """
    real = (target != ids.pad).astype(jnp.float32)
    return real.at[:, 0].set(0.0), real[:, 0]
