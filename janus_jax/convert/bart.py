"""Hugging Face BART (`BartForConditionalGeneration`, safetensors) -> our configuration and parameters.

Room: [disk], convert.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from janus_jax.config import ModelConfig, SpecialIds
from janus_jax.convert.names import ConvertError, Reader, checked, half

# Stored by some versions beside the one table that they are tied to.
COPIES = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")


def load_bart(
    weights: str | Path, config: str | Path, *, mask: int | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a safetensors file and its config.json.

    BART predicts from the content stream and starts its decoder with </s>; it has no length table,
    so ours starts as zeros, to be learnt in fine-tuning (docs/method.md section 6).

    Args:
      weights: model.safetensors.
      config: config.json beside it.
      mask: id of <mask>; default the last vocabulary entry, as published checkpoints have it.

    Returns:
      The model configuration (`ar_stream` = content) and parameters as float32 numpy arrays.

    Raises:
      ConvertError: another kind of model, or a weight missing, left over or of the wrong shape.
    """
    try:
        theirs = _Settings(json.loads(Path(config).read_text(encoding="utf-8")), str(config))
    except (OSError, ValueError, TypeError) as error:
        raise ConvertError(f"{config} cannot be read: {error}") from error
    if theirs.get("model_type") != "bart":
        raise ConvertError(f"{config}: model_type is {theirs.get('model_type')!r}, expected 'bart'")
    if theirs["encoder_attention_heads"] != theirs["decoder_attention_heads"]:
        raise ConvertError(f"{config}: encoder and decoder differ in attention heads")
    if theirs["encoder_ffn_dim"] != theirs["decoder_ffn_dim"]:
        raise ConvertError(f"{config}: encoder and decoder differ in ffn width")
    size, eos = theirs["vocab_size"], theirs["eos_token_id"]
    ours = ModelConfig(
        vocab_size=size,
        dim=theirs["d_model"],
        ffn=theirs["encoder_ffn_dim"],
        heads=theirs["encoder_attention_heads"],
        encoder_layers=theirs["encoder_layers"],
        decoder_layers=theirs["decoder_layers"],
        max_positions=theirs["max_position_embeddings"],
        activation=theirs["activation_function"],
        scale_embeddings=bool(theirs.get("scale_embedding", False)),
        ar_stream="content",
        output_bias=True,
        embed_norm=True,
        dropout=float(theirs.get("dropout", 0.1)),
        attention_dropout=float(theirs.get("attention_dropout", 0.0)),
        activation_dropout=float(theirs.get("activation_dropout", 0.0)),
        ids=SpecialIds(
            pad=theirs["pad_token_id"],
            bos=theirs["bos_token_id"],
            eos=eos,
            unk=3,
            mask=size - 1 if mask is None else mask,
            start=theirs.get("decoder_start_token_id", eos),
        ),
    )
    checked(ours, str(config))
    try:
        reader = Reader(load_file(weights), str(weights))
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{weights} cannot be read: {error}") from error
    params = {
        "target_table": reader.take("model.shared.weight", (size, ours.dim)),
        "output_bias": reader.take("final_logits_bias", (1, size))[0],
        "length_table": np.zeros((ours.max_length + 1, ours.dim), np.float32),
        "encoder": half(reader, "model.encoder.", ours),
        "decoder": half(reader, "model.decoder.", ours),
    }
    for name in COPIES:
        reader.take_copy(name, of="model.shared.weight")
    reader.finish()
    return ours, params


class _Settings(dict[str, Any]):
    """config.json; a key that is not there is a ConvertError with its name."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        super().__init__(values)
        self.origin = origin

    def __missing__(self, key: str) -> Any:
        raise ConvertError(f"{self.origin}: no key {key!r}")
