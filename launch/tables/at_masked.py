"""Nats a token at the masked slots of dev, by AR, AUX and NAR: whether AUX, which sees more, knows more.

    python launch/tables/at_masked.py RUN ... [--checkpoint=best]

`nll_ar` of metrics.jsonl is over all tokens, `nll_aux` and `nll_nar` over the masked ones, so they cannot be
compared.  Here all are over the masked ones, with the masks that training takes on dev.  `AUX ahead` is the
share of these at which AUX gives the true token more than AR does.  What a run did not train is left blank.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp

from janus_jax import losses
from janus_jax.batch import Batch
from janus_jax.config import Config
from janus_jax.data.encoded import encode_split
from janus_jax.data.pipeline import eval_batches
from janus_jax.data.sources import open_split
from janus_jax.models import Janus
from janus_jax.prepare import bring_data
from janus_jax.run import Run, open_run

COLUMNS = ("run", "checkpoint", "AR", "AUX", "NAR", "AUX ahead, %", "AR, all tokens")


def measure(opened: Run, checkpoint: str = "best") -> tuple[str, dict[str, float]]:
    """The checkpoint's name, and `ar`, `aux`, `nar` at M, `ahead` (a share), `ar_all`: those that are taught.

    Raises:
      run.RunError, checkpoint.CheckpointError, data.DataError: as in `janus-jax evaluate`.
    """
    config = opened.config
    params, name = opened.params(checkpoint)
    taught = losses.taught(config.loss)
    bring_data(config, opened.folder)
    pairs = open_split(config.data, opened.data_folder, config.data.dev_split)
    examples = encode_split(pairs, opened.vocabulary(), opened.data_folder)
    add_up = jax.jit(lambda params, batch: _sums(params, batch, config, taught))
    total: defaultdict[str, float] = defaultdict(float)
    for batch in eval_batches(examples, config.batch):
        for key, value in jax.device_get(add_up(params, batch)).items():
            total[key] += float(value)
    masked = max(total["masked"], 1.0)  # none where every target is very short
    found = {key: total[key] / masked for key in ("ar", "aux", "nar", "ahead") if key in total}
    if "ar" in taught:
        found["ar_all"] = total["ar_all"] / total["tokens"]
    return name, found


def _sums(params: object, batch: Batch, config: Config, taught: frozenset[str]) -> dict[str, jax.Array]:
    """Sums over a batch; the plain passes, every stream at every place."""
    source, target, masked = batch["source"], batch["target"], batch["masked"]
    tokens = losses.items(target, config.model.ids)[0]
    asked = {"ar": "ar" in taught, "nar": True, "aux": "aux" in taught, "turn": batch.get("turn")}
    outputs = Janus(config.model).apply({"params": params}, source, target, masked, **asked)
    nll = {}
    for name in taught:
        log_p = jax.nn.log_softmax(getattr(outputs, name), axis=-1)
        nll[name] = losses.label_smoothed(log_p, target, 0.0)[1]
    found = {name: jnp.sum(jnp.where(masked, x, 0.0)) for name, x in nll.items()}
    if {"ar", "aux"} <= taught:
        found["ahead"] = jnp.sum(masked & (nll["aux"] < nll["ar"]))
    if "ar" in taught:
        found["ar_all"] = jnp.sum(nll["ar"] * tokens)
    return {**found, "masked": jnp.sum(masked), "tokens": jnp.sum(tokens)}


def main(arguments: list[str]) -> int:
    """Prints the table, a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", nargs="+", type=Path, help="a run directory")
    parser.add_argument(
        "--checkpoint", default="best", help="best, latest, a step or average:N (default: best)"
    )
    args = parser.parse_args(arguments)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for folder in args.run:
        try:
            name, found = measure(open_run(folder), args.checkpoint)
        except (OSError, ValueError) as error:
            print(f"at_masked: {error}", file=sys.stderr)
            return 1
        nats = [f"{found[key]:.3f}" if key in found else "" for key in ("ar", "aux", "nar")]
        ahead = f"{100 * found['ahead']:.1f}" if "ahead" in found else ""
        everywhere = f"{found['ar_all']:.3f}" if "ar_all" in found else ""
        print(f"| {folder} | {name} | {' | '.join(nats)} | {ahead} | {everywhere} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
