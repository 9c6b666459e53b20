"""The one name map: fairseq's and Hugging Face's encoder-decoders call their weights alike.

Both store linear weights as (out, in) and position tables with two leading rows that no real token
uses.  Ours are (in, out), stacked over layers, with the table starting at the first real position.

Room: [disk], convert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from janus_jax.config import ModelConfig

State = Mapping[str, np.ndarray]

ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
ACTIVATIONS = ("relu", "gelu")
UNUSED_POSITIONS = 2  # rows before the first real position


class ConvertError(ValueError):
    """A state dict that is not what its converter expects; the message names the key."""


def checked(config: ModelConfig, origin: str) -> ModelConfig:
    """`config`, or ConvertError where it asks for what our model does not have."""
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConvertError(f"{origin}: activation {config.activation!r} is none of ours: {known}")
    if config.heads < 1 or config.dim % config.heads:
        raise ConvertError(f"{origin}: {config.heads} heads do not divide the width {config.dim}")
    for name, value in dataclasses.asdict(config.ids).items():
        if not 0 <= value < config.vocab_size:
            raise ConvertError(f"{origin}: {name} has id {value}, and the vocabulary {config.vocab_size}")
    return config


class Reader:
    """Takes arrays out of a state dict by name and knows which ones were never asked for."""

    def __init__(self, state: State, origin: str) -> None:
        """`origin` names the file in messages."""
        self.state, self.origin, self.taken = state, origin, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The array called `name`, float32; ConvertError if missing or of another shape."""
        if name not in self.state:
            raise ConvertError(f"{self.origin}: no weight named {name!r}")
        stored = np.asarray(self.state[name])
        if stored.dtype.kind != "f" and stored.dtype.name != "bfloat16":
            raise ConvertError(
                f"{self.origin}: {name} is of type {stored.dtype}, not floating-point (of bfloat16, save "
                "float32: NumPy files cannot hold it)"
            )
        value = stored.astype(np.float32)
        if not np.isfinite(value).all():
            raise ConvertError(f"{self.origin}: {name} holds values that are no finite numbers")
        if shape is not None and value.shape != shape:
            raise ConvertError(f"{self.origin}: {name} has shape {value.shape}, expected {shape}")
        self.taken.add(name)
        return value

    def take_copy(self, name: str, of: str) -> None:
        """Accounts for a second copy of weight `of`, if it is there; ConvertError if it is no copy."""
        if name in self.state and not np.array_equal(self.take(name), self.take(of)):
            raise ConvertError(f"{self.origin}: {name} differs from {of}, to which it should be tied")

    def depth(self, stack: str) -> int:
        """Number of layers below `stack`."""
        numbers = {k[len(stack) :].split(".")[0] for k in self.state if k.startswith(stack)}
        if not numbers or numbers != {str(i) for i in range(len(numbers))}:
            raise ConvertError(f"{self.origin}: layers {stack}0, 1, ... are missing or not contiguous")
        return len(numbers)

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        """ConvertError if a weight was left over: dropping one silently would change the model."""
        left = sorted(k for k in self.state if k not in self.taken and not k.endswith(ignored))
        if left:
            raise ConvertError(f"{self.origin}: weights with no place in the model: {', '.join(left[:5])}")


def half(reader: Reader, side: str, config: ModelConfig) -> dict[str, Any]:
    """The encoder ('encoder') or decoder ('decoder') below `side`, e.g. 'model.decoder.'."""
    decoder = side.endswith("decoder.")
    depth = config.decoder_layers if decoder else config.encoder_layers
    width, ffn = config.dim, config.ffn

    def dense(name: str, fan_in: int, fan_out: int) -> dict[str, np.ndarray]:
        layers = [f"{side}layers.{i}.{name}" for i in range(depth)]
        return {
            "kernel": np.stack([reader.take(f"{n}.weight", (fan_out, fan_in)).T for n in layers]),
            "bias": np.stack([reader.take(f"{n}.bias", (fan_out,)) for n in layers]),
        }

    def stacked_norm(name: str) -> dict[str, np.ndarray]:
        layers = [norm(reader, f"{side}layers.{i}.{name}", width) for i in range(depth)]
        return {k: np.stack([layer[k] for layer in layers]) for k in ("scale", "bias")}

    def attention(name: str) -> dict[str, Any]:
        return {ours: dense(f"{name}.{theirs}", width, width) for ours, theirs in ATTENTION.items()}

    layers = {
        "attention": attention("self_attn"),
        "attention_norm": stacked_norm("self_attn_layer_norm"),
        "ffn": {"rise": dense("fc1", width, ffn), "fall": dense("fc2", ffn, width)},
        "ffn_norm": stacked_norm("final_layer_norm"),
    }
    if decoder:
        layers |= {"cross": attention("encoder_attn"), "cross_norm": stacked_norm("encoder_attn_layer_norm")}
    table = reader.take(f"{side}embed_positions.weight", (config.max_positions + UNUSED_POSITIONS, width))
    found: dict[str, Any] = {"layers": layers, "input": {"positions": table[UNUSED_POSITIONS:]}}
    if config.embed_norm:
        found["input"]["norm"] = norm(reader, f"{side}layernorm_embedding", width)
    if config.norm == "pre":
        found["norm"] = norm(reader, f"{side}layer_norm", width)
    return found


def norm(reader: Reader, name: str, width: int) -> dict[str, np.ndarray]:
    """A layer norm's scale and bias."""
    return {
        "scale": reader.take(f"{name}.weight", (width,)),
        "bias": reader.take(f"{name}.bias", (width,)),
    }
