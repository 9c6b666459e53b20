"""Runs what `janus-jax export` wrote: with jax and flatbuffers alone, and sentencepiece where text is given.

This file lies in every export as `load.py`, and needs nothing else of the package that made it:

    python DIR/load.py < source.txt > target.txt        one line out for each line in, in order

    import sys; sys.path.insert(0, "DIR")
    from load import Exported
    exported = Exported.load("DIR")
    exported.translate(["Ein Hund rennt über die Wiese."])

Text comes out as `janus-jax translate` writes it, at the same decoding options.  Those are fixed by the
programs; how many sentences are decoded together is not.  jax compiles a program when it first meets a
number of rows (`warm_up` does that beforehand); JAX_COMPILATION_CACHE_DIR keeps what it compiled.

Letters: B sentences decoded together, S source length, T target slots.
Room: [disk, devices].  Imports nothing of ours: what it shares with text, translate and translator is written
out again, and the tests hold the two together.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

FORMAT = 2  # of the folder; raised when an older loader could not run it
KIND = "janus_jax export"
MANIFEST, PARAMS, VOCABULARY, LOADER = "manifest.json", "params.npz", "vocab.model", "load.py"

WINDOW = 4096  # lines decoded, and written, together
PARTIAL = 8  # a batch that is not full is padded to 1/8, 1/64, .. of the rows, so that shapes stay few
EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PIPE = 1, 130, 141

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ESCAPE = "\ue000"
_ESCAPED = (_ESCAPE, "\u2581", "\u2585", "\0")
_ESCAPES = {char: _ESCAPE + str(i) for i, char in enumerate(_ESCAPED)}
_TO_ESCAPE = re.compile("[" + "".join(_ESCAPED) + "\ud800-\udfff]")
_TO_UNESCAPE = re.compile(f"{_ESCAPE}([0-{len(_ESCAPED) - 1}])")
_REPLACEMENT = "\ufffd"


class ExportedError(ValueError):
    """An export that cannot be run here, or a request it cannot serve; the message names the remedy."""


class Decoded(NamedTuple):
    """The best output for one source."""

    ids: list[int]  # without special symbols; none for a source without tokens
    score: float  # AR: sum of log p / length ** penalty; NAR: mean log p (or the AR score, if re-scored)


def _ignore(source: int, tokens: int, kept: int) -> None:
    """Says nothing of a source that was cut."""


class Exported:
    """An export, checked and ready to decode; compiled once per shape and kept."""

    def __init__(
        self, manifest: dict[str, Any], params: Sequence[Any], programs: dict[str, Any], vocabulary: bytes
    ) -> None:
        """`load` calls this with what it read and checked.

        Args:
          manifest: of the export.
          params: arrays in the order of the manifest, of its dtypes.
          programs: {file name: function}.
          vocabulary: the SentencePiece model.
        """
        self.manifest = manifest
        self._params = jax.device_put(list(params))
        self._programs = {name: jax.jit(function) for name, function in programs.items()}
        self._vocabulary = vocabulary
        self._processor: Any = None
        self._ids: dict[str, int] = manifest["ids"]
        self._special = {self._ids[name] for name in ("pad", "bos", "eos", "unk", "mask")}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Exported:
        """The export in `folder`, every file of which is checked against the manifest.

        Raises:
          ExportedError: no export, a newer format, a missing or damaged file, a platform that it does
            not hold, or another jax than can read it.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        check_platform(manifest, root)
        contents = {
            name: _read_checked(root / name, entry)
            for name, entry in manifest["files"].items()
            if name != LOADER  # whoever runs it has it
        }
        programs = {
            name: _deserialized(root / name, data, manifest)
            for name, data in contents.items()
            if name.startswith("programs/")
        }
        with np.load(io.BytesIO(contents.pop(PARAMS)), allow_pickle=False) as arrays:
            named = zip(manifest["params"], manifest["dtypes"], strict=True)
            params = [arrays[name].astype(jnp.dtype(dtype)) for name, dtype in named]
        return cls(manifest, params, programs, contents[VOCABULARY])

    def translate(
        self,
        lines: Sequence[str],
        *,
        batch_size: int | None = None,
        on_cut: Callable[[int, int, int], None] = _ignore,
    ) -> list[str]:
        """The translation of each line, in order; a blank line yields an empty one.

        Args:
          lines: text; blanks at the ends and in a row do not matter.
          batch_size: most sentences decoded together; default as the export has it.
          on_cut: told of each line that is too long: which (from 0), its tokens, and the tokens kept.

        Raises:
          ExportedError: sentencepiece is not installed; a string for lines; or batch_size below 1.
        """
        if isinstance(lines, (str, bytes)):
            raise ExportedError(
                f"lines must be a list of lines, got {type(lines).__name__}; pass [line] for one"
            )
        found = self.decode_ids([self.encode(x) for x in lines], batch_size=batch_size, on_cut=on_cut)
        return [self.decode(best.ids) for best in found]

    def decode_ids(
        self,
        sources: Sequence[Sequence[int]],
        *,
        batch_size: int | None = None,
        on_cut: Callable[[int, int, int], None] = _ignore,
    ) -> list[Decoded]:
        """The best output for each source of token ids, which `encode` makes: bos, pieces, eos.

        Args:
          sources: token ids; one of bos and eos alone yields nothing, one that is too long is cut.
          batch_size: as of `translate`.
          on_cut: as of `translate`.

        Raises:
          ExportedError: ids that are no source; or batch_size below 1.
        """
        if batch_size is not None and batch_size < 1:
            raise ExportedError(f"batch_size must be at least 1, got {batch_size}")
        found = [Decoded([], 0.0) for _ in sources]
        kept = dict(self._kept(sources, on_cut))
        for entry, chunk in self._chunks(kept, batch_size):
            rows = _rows(len(chunk), _most(entry, batch_size))
            source = np.full((rows, entry["source"]), self._ids["pad"], np.int32)
            for row in range(rows):
                ids = kept[chunk[min(row, len(chunk) - 1)]]  # a filler row repeats the last sentence
                source[row, : len(ids)] = ids
            tokens, scores = self._run(entry, source)
            for row, number in enumerate(chunk):
                found[number] = Decoded(self._text_ids(tokens[row]), float(scores[row]))
        return found

    def encode(self, line: str) -> list[int]:
        """Ids of a line: bos, pieces, eos.

        Raises:
          ExportedError: sentencepiece is not installed.
        """
        pieces = self._pieces().encode(_escape(clean_line(line)))
        return [self._ids["bos"], *pieces, self._ids["eos"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, in one line.

        Raises:
          ExportedError: sentencepiece is not installed.
        """
        text = self._pieces().decode(self._text_ids(ids))
        return clean_line(_TO_UNESCAPE.sub(lambda found: _ESCAPED[int(found[1])], text))

    def warm_up(self, batch_size: int | None = None) -> int:
        """Compiles all that a request of any length can need; how many programs that were.

        One shape is a bucket, a canvas and a number of rows, of which a batch that is not full has few.
        """
        count, ids = 0, self._ids
        for entry in self.manifest["programs"]:
            most = _most(entry, batch_size)
            for rows in sorted({_rows(n, most) for n in range(1, most + 1)}):
                source = np.full((rows, entry["source"]), ids["pad"], np.int32)
                source[:, :3] = [ids["bos"], ids["unk"], ids["eos"]]
                if "whole" in entry:
                    jax.block_until_ready(self._programs[entry["whole"]](self._params, source))
                    count += 1
                    continue
                memory, lengths = self._programs[entry["remember"]](self._params, source)
                for name in entry["write"].values():
                    jax.block_until_ready(self._programs[name](self._params, memory, lengths))
                count += 1 + len(entry["write"])
        return count

    def _kept(
        self, sources: Sequence[Sequence[int]], on_cut: Callable[[int, int, int], None]
    ) -> Iterator[tuple[int, list[int]]]:
        """(number, ids) of the sources that hold a token, cut to the largest bucket."""
        bos, eos, size = self._ids["bos"], self._ids["eos"], self.manifest["vocab_size"]
        longest = self.manifest["programs"][-1]["source"]
        for number, source in enumerate(sources):
            ids = [int(i) for i in source]
            if len(ids) < 2 or (ids[0], ids[-1]) != (bos, eos) or min(ids) < 0 or max(ids) >= size:
                raise ExportedError(
                    f"source {number} is no source of this model: it must begin with {bos}, end with {eos}, "
                    f"and hold ids of 0 to {size - 1}"
                )
            if len(ids) > longest:
                on_cut(number, len(ids), longest)
                ids = [*ids[: longest - 1], ids[-1]]
            if len(ids) > 2:
                yield number, ids

    def _chunks(
        self, sources: dict[int, list[int]], batch_size: int | None
    ) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """(programs of a bucket, numbers of the sources decoded together), short ones first."""
        by_length = sorted(sources, key=lambda n: (len(sources[n]), n))
        start = 0
        for entry in self.manifest["programs"]:
            end = start
            while end < len(by_length) and len(sources[by_length[end]]) <= entry["source"]:
                end += 1
            most = _most(entry, batch_size)
            for first in range(start, end, most):
                yield entry, by_length[first : min(first + most, end)]
            start = end

    def _run(self, entry: dict[str, Any], source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, S] int32 -> the best tokens [B, T] int32 and their scores [B] float32."""
        if "whole" in entry:
            return jax.device_get(self._programs[entry["whole"]](self._params, source))
        memory, lengths = self._programs[entry["remember"]](self._params, source)
        longest = int(jax.device_get(lengths).max())
        # The smallest canvas that holds the longest of these sentences; the last holds any.
        canvas = min(c for c in map(int, entry["write"]) if c >= longest)
        return jax.device_get(self._programs[entry["write"][str(canvas)]](self._params, memory, lengths))

    def _text_ids(self, row: Sequence[int] | np.ndarray) -> list[int]:
        """What has a text: a start symbol in front is skipped, the first eos ends, special symbols go."""
        listed = [int(i) for i in row]
        if listed[:1] == [self._ids["start"]]:
            listed = listed[1:]
        if self._ids["eos"] in listed:
            listed = listed[: listed.index(self._ids["eos"])]
        return [i for i in listed if i not in self._special]

    def _pieces(self) -> Any:
        if self._processor is None:
            try:
                import sentencepiece
            except ImportError as error:
                raise ExportedError(
                    "text needs the package sentencepiece: pip install sentencepiece; token ids do without "
                    f"(decode_ids) ({error})"
                ) from error
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._vocabulary)
        return self._processor


# What the loader reads of a manifest, and what each is.
KEYS: dict[str, type] = {
    "platforms": list,
    "calling_convention": int,
    "ids": dict,
    "vocab_size": int,
    "versions": dict,
    "params": list,
    "dtypes": list,
    "programs": list,
    "files": dict,
}


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the export in `root`.

    Raises:
      ExportedError: none, an unreadable one, or one of a format newer than this loader.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportedError(
            f"{root} is no export: it has no {MANIFEST}; `janus-jax export` makes one"
        ) from None
    except ValueError as error:
        raise ExportedError(f"{path} is damaged ({error}); copy or export it again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ExportedError(f"{path} is not the manifest of an export; `janus-jax export` makes one")
    if manifest.get("format") != FORMAT:
        raise ExportedError(
            f"{path} has format {manifest.get('format')}, this loader runs format {FORMAT}; use the {LOADER} "
            "that lies in that folder, or export again"
        )
    missing = [key for key, kind in KEYS.items() if not isinstance(manifest.get(key), kind)]
    if missing:
        raise ExportedError(f"{path} is damaged ({missing[0]!r} is not what it was); copy or export it again")
    return manifest


def check_platform(manifest: dict[str, Any], root: Path) -> None:
    """Raises ExportedError unless jax's platform here, and this jax, can run the programs."""
    held = manifest["platforms"]
    try:
        here = jax.export.default_export_platform()
    except (RuntimeError, AssertionError) as error:  # the latter without a word
        reason = str(error).partition("\n")[0] or "the package of that platform is not installed"
        raise ExportedError(
            f"jax cannot start on JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} ({reason}); "
            f"{root} holds programs for {', '.join(held)}"
        ) from error
    if here not in held:
        raise ExportedError(
            f"{root} holds programs for {', '.join(held)}, and jax runs on {here} here; set "
            f"JAX_PLATFORMS={held[0]}, or export again with --platforms={here}"
        )
    least = jax.export.minimum_supported_calling_convention_version
    most = jax.export.maximum_supported_calling_convention_version
    if not least <= manifest["calling_convention"] <= most:
        raise ExportedError(
            f"{root}: exported with jax {manifest['versions']['jax']}, calling convention "
            f"{manifest['calling_convention']}; jax {jax.__version__} runs {least} to {most}: install the "
            "former, or export again"
        )


def clean_line(text: str) -> str:
    """`text` without blanks at its ends, and with any run of blanks in between as one space."""
    return " ".join(text.split())


def split_lines(data: bytes, name: str) -> list[str]:
    """The lines of `data`, which end at LF and nowhere else; a byte order mark in front is dropped.

    Raises:
      ExportedError: a line that is not UTF-8; `name` says where it was.
    """
    raw = data.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    if not raw[-1]:
        raw.pop()
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ExportedError(
                f"{name}:{number}: not UTF-8 at byte {error.start + 1} of the line ({error.reason}); nothing "
                "was translated; convert the input first, for instance with iconv"
            ) from error
    return lines


def _escape(text: str) -> str:
    return _TO_ESCAPE.sub(lambda found: _ESCAPES.get(found[0], _REPLACEMENT), text)


def _most(entry: dict[str, Any], batch_size: int | None) -> int:
    """Most rows of a batch of this bucket."""
    return min(entry["rows"], batch_size) if batch_size else entry["rows"]


def _rows(sentences: int, most: int) -> int:
    """Rows of the batch for so many sentences: one of few sizes."""
    rows = most
    while rows // PARTIAL >= sentences:
        rows //= PARTIAL
    return rows


def _read_checked(path: Path, entry: dict[str, Any]) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ExportedError(f"{path} is missing; copy or export the whole folder again") from None
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ExportedError(
            f"{path} is damaged: its {len(data):,} bytes are not the {entry['bytes']:,} that {MANIFEST} "
            "describes (sha256); copy or export the whole folder again"
        )
    return data


def _deserialized(path: Path, data: bytes, manifest: dict[str, Any]) -> Callable[..., Any]:
    try:
        return jax.export.deserialize(bytearray(data)).call
    except ImportError as error:
        raise ExportedError(
            f"jax reads exports with the package flatbuffers: pip install flatbuffers ({error})"
        ) from error
    except Exception as error:  # jax names no class of its own for this
        raise ExportedError(
            f"{path}: jax {jax.__version__} cannot read what jax {manifest['versions']['jax']} exported "
            f"({str(error).partition(chr(10))[0][:200]}); install that jax, or export again"
        ) from error


# -- python DIR/load.py ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Translates standard input to standard output with the export that this file lies in."""
    folder = folder or Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        "load.py",
        description="Translate standard input, UTF-8, one sentence a line, to standard output.",
        epilog=f"How to decode is fixed by the export: see {MANIFEST}.",
        allow_abbrev=False,
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="most sentences decoded together")
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, got {args.batch_size}")
    try:
        exported = Exported.load(folder)
        if sys.stdin is None or sys.stdout is None:
            raise ExportedError("standard input or output is closed: redirect both")
        lines = split_lines(sys.stdin.buffer.read(), "<stdin>")
        for start in range(0, len(lines), WINDOW):
            texts = exported.translate(
                lines[start : start + WINDOW],
                batch_size=args.batch_size,
                on_cut=lambda line, tokens, kept, start=start: print(  # type: ignore[misc]
                    f"line {start + line + 1}: {tokens:,} tokens are too many; cut to the first {kept:,}",
                    file=sys.stderr,
                ),
            )
            sys.stdout.buffer.write("".join(f"{text}\n" for text in texts).encode("utf-8"))
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at the end
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("load.py: error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ExportedError, OSError) as error:
        print(f"load.py: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first_line = str(error).partition("\n")[0][:200]
        print(f"load.py: error: out of memory: {first_line}; lower --batch_size", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
