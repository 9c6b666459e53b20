"""Line-aligned text files: found, read and checked.

Line n of one file belongs to line n of the other.  Lines end at LF and nowhere else; files are UTF-8,
plain or gzip.  Whatever is wrong with a file is one `DataError` that names the file and the line.

Room: [disk] reads raw text files.
"""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, cast

from janus_jax.text import clean_line

Paths = tuple[pathlib.Path, ...]  # the files of one split, one for each language

_BOM = "\ufeff"
_CHUNK = 1 << 20


class DataError(ValueError):
    """Data that cannot be used; the message names the file, line or key, and the remedy."""


class MissingFileError(DataError, FileNotFoundError):
    """A file or folder that should be there is not."""

    __str__ = ValueError.__str__


def find(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    """The file `stem` or `stem`.gz in `folder`, or None.

    Raises:
      DataError: both are there, and nobody can tell which one is meant.
    """
    found = [p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
    if len(found) > 1:
        raise DataError(f"both {found[0]} and {found[1]} exist: remove one of them")
    return found[0] if found else None


def find_pair(folder: pathlib.Path, split: str, languages: tuple[str, str]) -> Paths | None:
    """The two files `<split>.<language>` of a split in `folder`, or None if neither is there.

    Raises:
      MissingFileError: only one of the two exists.
    """
    paths = [find(folder, f"{split}.{language}") for language in languages]
    present = [p for p in paths if p is not None]
    if not present:
        return None
    if len(present) == 1:
        absent = languages[paths.index(None)]
        raise MissingFileError(
            f"{folder / f'{split}.{absent}'} (or .gz) is missing, the other side of {present[0]}"
        )
    return tuple(present)


def read_lines(path: pathlib.Path) -> Iterator[str]:
    """The lines of one file, each through `clean_line`; a byte order mark at the start is dropped.

    Raises:
      DataError: bad UTF-8 or a NUL (file:line), or a damaged gzip.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                if "\0" in line:
                    raise DataError(f"{path}:{number}: NUL byte; this is no plain text, remove it")
                yield clean_line(line.removeprefix(_BOM) if number == 1 else line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line ({error.reason}); convert it"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip after line {number} ({error}); fetch it again") from error


def read_pairs(paths: Iterable[pathlib.Path]) -> Iterator[tuple[str, str]]:
    """Line n of the first of two files with line n of the second.

    Raises:
      DataError: as `read_lines`; also unequal line counts (the message has both) and empty files.
    """
    first_path, second_path = paths
    first, second = read_lines(first_path), read_lines(second_path)
    count = 0
    while True:
        a, b = next(first, None), next(second, None)
        if a is None or b is None:
            break
        count += 1
        yield a, b
    counts = [count + (side is not None) + sum(1 for _ in rest) for side, rest in ((a, first), (b, second))]
    if counts[0] != counts[1]:
        raise DataError(
            f"unequal line counts: {first_path} has {counts[0]}, {second_path} has {counts[1]}; "
            "line n of one must belong to line n of the other"
        )
    if not count:
        raise DataError(f"{first_path} and {second_path} are empty")


def fingerprint(paths: Iterable[pathlib.Path]) -> str:
    """A hash of the names and contents of `paths`, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n{sha256(path)}\n".encode())
    return digest.hexdigest()


def sha256(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _open(path: pathlib.Path) -> IO[bytes]:
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
