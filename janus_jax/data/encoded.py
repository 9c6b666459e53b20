"""Splits as token ids: encoded once, kept on disk, read without tokenising again.

An encoded split is four flat arrays in a folder of its own, named after the text and the vocabulary
that made it, and mapped into memory rather than read.

Letters: N pairs.
Room: [disk] reads and writes below `<data folder>/encoded`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from array import array

import numpy as np

from janus_jax.config import SpecialIds
from janus_jax.data.catalogue import Progress
from janus_jax.data.sources import PairSource
from janus_jax.text import Vocabulary

_ARRAYS = ("source", "source_offsets", "target", "target_offsets")
_REPORT_EVERY = 2000  # pairs between two reports of progress


class EncodedSource:
    """N encoded pairs, each side BOS ... EOS; all lengths are known without reading the tokens."""

    def __init__(self, arrays: dict[str, np.ndarray], ids: SpecialIds, identity: str) -> None:
        """Wraps flat int32 tokens and int64 offsets [N + 1], as `encode_split` makes them."""
        self._arrays = arrays
        self.ids = ids
        self.identity = identity
        self.source_lengths = np.diff(arrays["source_offsets"])  # [N] int64, with BOS and EOS
        self.target_lengths = np.diff(arrays["target_offsets"])  # [N] int64

    def __len__(self) -> int:
        """N."""
        return len(self.source_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: the longer side of each pair."""
        return np.maximum(self.source_lengths, self.target_lengths)

    def sha256(self) -> str:
        """Of all tokens and lengths, in order: the same wherever the pairs came from."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(self._arrays[name]).data)
        return digest.hexdigest()

    def padded(self, side: str, indices: np.ndarray, length: int) -> np.ndarray:
        """[B, length] int32: the `side` ("source" | "target") of pairs, PAD after EOS.

        Args:
          side: which.
          indices: [B] numbers of pairs; a negative one is a row of PAD.
          length: of every row.

        Raises:
          ValueError: a pair is longer.
        """
        tokens, offsets = self._arrays[side], self._arrays[f"{side}_offsets"]
        start = offsets[indices]
        sizes = np.where(indices < 0, 0, offsets[indices + 1] - start)
        if sizes.max(initial=0) > length:
            longest = int(sizes.argmax())
            raise ValueError(f"pair {indices[longest]} has {sizes[longest]} tokens, more than {length}")
        place = np.arange(length)
        inside = place < sizes[:, None]
        rows = np.full((len(indices), length), self.ids.pad, np.int32)
        rows[inside] = tokens[(start[:, None] + place)[inside]]
        return rows


def encode_split(
    pairs: PairSource, vocabulary: Vocabulary, folder: pathlib.Path, progress: Progress | None = None
) -> EncodedSource:
    """`pairs` in `vocabulary`: from `folder`/encoded if it is there and whole, else made and kept.

    A damaged copy is made again.  The copy appears whole or not at all.
    """
    identity = f"{pairs.identity}/{vocabulary.sha256}"
    path = folder / "encoded" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not is_encoded(pairs, vocabulary, folder):
        _write(path, identity, _encode(pairs, vocabulary, progress))
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    # Plain arrays over the same mapping: slicing np.memmap itself is several times slower.
    return EncodedSource({name: np.asarray(a) for name, a in arrays.items()}, vocabulary.ids, identity)


def is_encoded(pairs: PairSource, vocabulary: Vocabulary, folder: pathlib.Path) -> bool:
    """Whether `encode_split` would find a whole copy."""
    identity = f"{pairs.identity}/{vocabulary.sha256}"
    path = folder / "encoded" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    try:
        info = json.loads((path / "info.json").read_text(encoding="utf-8"))
        sums = {name: _checksum(path / f"{name}.npy") for name in _ARRAYS}
        return info == {"identity": identity, "crc32": sums}
    except (OSError, ValueError):
        return False


def _encode(pairs: PairSource, vocabulary: Vocabulary, progress: Progress | None) -> dict[str, np.ndarray]:
    tokens = {"source": array("i"), "target": array("i")}
    offsets = {"source": array("q", [0]), "target": array("q", [0])}
    for done, pair in enumerate(pairs):
        for side, text in zip(tokens, pair, strict=True):
            tokens[side].extend(vocabulary.encode(text))
            offsets[side].append(len(tokens[side]))
        if progress and done % _REPORT_EVERY == 0:
            progress("encode", done, len(pairs))
    if progress:
        progress("encode", len(pairs), len(pairs))
    flat = {side: np.array(values, np.int32) for side, values in tokens.items()}
    return flat | {f"{side}_offsets": np.array(values, np.int64) for side, values in offsets.items()}


def _write(path: pathlib.Path, identity: str, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in arrays.items():
        np.save(partial / f"{name}.npy", values)
    info = {"identity": identity, "crc32": {name: _checksum(partial / f"{name}.npy") for name in _ARRAYS}}
    (partial / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)  # a damaged copy
    with contextlib.suppress(OSError):  # another process was faster: its copy is as good
        os.replace(partial, path)
    shutil.rmtree(partial, ignore_errors=True)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
