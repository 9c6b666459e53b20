"""A fairseq JANUS state dict -> our configuration and parameters.

From an .npz with fairseq's names, or a .pt checkpoint where torch is installed.  What a state dict
cannot tell (heads, activation, embedding scale) comes from the checkpoint's own arguments or from
the caller.

Room: [disk], convert.
"""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from janus_jax.config import ModelConfig, SpecialIds
from janus_jax.convert.names import UNUSED_POSITIONS, ConvertError, Reader, State, checked, half

# fairseq's dictionary order; the reference uses <unk> as the mask symbol and a converted model must too.
FAIRSEQ_IDS = SpecialIds(bos=0, pad=1, eos=2, unk=3, mask=3, start=0)


def load_fairseq(
    path: str | Path,
    *,
    heads: int | None = None,
    activation: str | None = None,
    scale_embeddings: bool | None = None,
    dropout: float = 0.0,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads `path` (.npz or .pt) into (model configuration, parameters as float32 numpy arrays).

    Args:
      path: the file; names in an .npz may carry the prefix `w/`.
      heads: attention heads; needed for an .npz, read from a .pt's arguments otherwise.
      activation: relu | gelu; default the checkpoint's, else relu.
      scale_embeddings: multiply token embeddings by sqrt(D); default the checkpoint's, else True.
      dropout: the configuration's dropout, for training on.

    Raises:
      ConvertError: a weight is missing, left over or of the wrong shape, the checkpoint's arguments are of a
        model that ours is not, or torch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: no such file")
    state, arguments = _read_npz(path) if path.suffix == ".npz" else _read_pt(path)
    heads = heads if heads is not None else arguments.get("heads")
    if heads is None:
        raise ConvertError(f"{path}: a state dict does not tell the number of heads; pass heads=...")
    reader = Reader(state, str(path))
    tokens = reader.take("decoder.embed_tokens.weight")
    source_tokens = reader.take("encoder.embed_tokens.weight", tokens.shape)
    output = reader.take("decoder.output_projection.weight", tokens.shape)
    lengths = reader.take("decoder.embed_length.weight")
    tied, shared = np.array_equal(output, tokens), np.array_equal(source_tokens, tokens)
    scale = scale_embeddings if scale_embeddings is not None else arguments.get("scale_embeddings", True)
    config = ModelConfig(
        vocab_size=tokens.shape[0],
        dim=tokens.shape[1],
        ffn=reader.take("encoder.layers.0.fc1.bias").shape[0],
        heads=_whole(heads, path),
        encoder_layers=reader.depth("encoder.layers."),
        decoder_layers=reader.depth("decoder.layers."),
        max_positions=reader.take("decoder.embed_positions.weight").shape[0] - UNUSED_POSITIONS,
        max_length=lengths.shape[0] - 1,
        norm="pre" if "decoder.layer_norm.weight" in reader else "post",
        activation=activation or arguments.get("activation", "relu"),
        ar_positions="code",
        scale_embeddings=bool(scale),
        share_embeddings=shared,
        tie_output=tied,
        embed_norm="decoder.layernorm_embedding.weight" in reader,
        dropout=dropout,
        ids=FAIRSEQ_IDS,
    )
    checked(config, str(path))
    params: dict[str, Any] = {
        "target_table": tokens,
        "length_table": lengths,
        "encoder": half(reader, "encoder.", config),
        "decoder": half(reader, "decoder.", config),
    }
    if not shared:
        params["source_table"] = source_tokens
    if not tied:
        params["output_table"] = output
    reader.finish(ignored=(".version", "._float_tensor"))
    return config, params


def _whole(heads: Any, path: Path) -> int:
    if not isinstance(heads, (int, np.integer)) or isinstance(heads, bool):
        raise ConvertError(f"{path}: heads must be a whole number, got {heads!r}")
    return int(heads)


def _read_npz(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        return _arrays(path), {}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ConvertError(f"{path} is not a whole .npz of arrays ({str(error)[:80]})") from error


def _arrays(path: Path) -> State:
    with path.open("rb") as raw, np.load(raw) as file:  # what np.load opens it does not always close
        prefixed = any(name.startswith("w/") for name in file.files)
        names = {
            n.removeprefix("w/"): n for n in file.files if (n.startswith("w/") if prefixed else "/" not in n)
        }
        return {ours: file[theirs] for ours, theirs in names.items()}


def _read_pt(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        import torch
    except ImportError:
        raise ConvertError(
            f"{path}: reading a .pt checkpoint needs PyTorch: pip install 'janus-jax[torch]', or save the "
            "state dict as an .npz elsewhere"
        ) from None
    # fairseq pickles its argument namespace beside the tensors, hence not weights_only.
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    state = checkpoint.get("model", checkpoint)
    given = checkpoint.get("args") or (checkpoint.get("cfg") or {}).get("model")
    return {name: tensor.float().numpy() for name, tensor in state.items()}, _arguments(given, path)


def _arguments(given: Any, path: Path) -> dict[str, Any]:
    """What we need of fairseq's arguments: a namespace, a mapping (a dict, omegaconf's), or None."""
    find = given.get if hasattr(given, "get") else functools.partial(getattr, given)

    def value(name: str, otherwise: Any = None) -> Any:
        return otherwise if given is None else find(name, otherwise)

    heads = {side: value(f"{side}_attention_heads") for side in ("encoder", "decoder")}
    if None not in heads.values() and heads["encoder"] != heads["decoder"]:
        raise ConvertError(
            f"{path}: encoder and decoder differ in attention heads ({heads['encoder']} and "
            f"{heads['decoder']}), which a model of ours cannot"
        )
    if value("cross_self_attention", False):
        raise ConvertError(f"{path}: cross_self_attention, which a model of ours has not")
    return {
        "heads": heads["decoder"],
        "activation": value("activation_fn", "relu"),
        "scale_embeddings": not value("no_scale_embedding", False),
    }
