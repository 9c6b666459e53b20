"""`janus-jax translate`: a filter that writes one line for each line it reads, always and in order.

All input is read and checked before the first line is translated, so that an input that cannot be
used costs an error message and never half an output.  After that nothing can fail for the sake of a
line: blank lines stay blank, over-long ones are cut and reported, and the output of a window of
lines is written when that window is done.

Lines end at LF and nowhere else; a last line without LF is a line.  A CR at the end, NUL bytes and
other control characters are characters like any other (blanks at the ends do not matter to the
model, and a CR is a blank).

Room: shell.  Reads and writes the streams or files it is given.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from janus_jax import paths, report
from janus_jax.paths import AnyPath
from janus_jax.translator import Hypothesis, Translator

WINDOW = 4096  # lines decoded, and written, together
STDIN = "<stdin>"

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class InputError(ValueError):
    """Text that cannot be translated; the message names the file and the line."""


class OutputError(ValueError):
    """A place that translations cannot be written to; the message names it."""


def split_lines(data: bytes, name: str) -> list[str]:
    r"""The lines of `data`: b"a\n\nb" -> ["a", "", "b"]; a byte order mark in front is dropped.

    Raises:
      InputError: a line that is not UTF-8; `name` says where it was.
    """
    raw = data.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    if not raw[-1]:
        raw.pop()
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}:{number}: not UTF-8 at byte {error.start + 1} of the line ({error.reason}); nothing "
                "was translated; convert the input first, for instance with iconv"
            ) from error
    return lines


def read_lines(path: AnyPath | None) -> list[str]:
    """The lines of a file, or of standard input for None.

    Raises:
      InputError: as `split_lines`.
      OSError: the file cannot be read.
    """
    if path is not None:
        return split_lines(path.read_bytes(), str(path))
    if sys.stdin is None:
        raise InputError("standard input is closed: give it lines, or name a file with --input=FILE")
    if sys.stdin.isatty():
        print("reading lines until end of file (Ctrl-D)", file=sys.stderr)
    return split_lines(sys.stdin.buffer.read(), STDIN)


def check_output(path: AnyPath | None) -> None:
    """Raises OutputError unless `path` can name a file; `output` finds that out when the model is loaded."""
    if path is None:
        _check_stdout()
        return
    if paths.is_remote(path):
        return
    folder = _followed(path).parent
    if not folder.is_dir():
        raise OutputError(f"--output={path}: there is no folder {folder}; make it, or name another file")
    if path.is_dir():
        raise OutputError(f"--output={path} is a folder; name a file in it")


def _followed(path: AnyPath) -> AnyPath:
    """What a symbolic link points to, so that the link stays one."""
    return path.resolve() if path.is_symlink() else path


@contextlib.contextmanager
def output(path: AnyPath | None, *, keep: bool = False) -> Iterator[BinaryIO]:
    """Where results go: standard output for None, else a file that appears under its name when whole.

    What is no regular file (a pipe, /dev/null) is written to as it stands; of a link, what it points to.

    Args:
      path: the file; None is standard output.
      keep: what was written before an error or an interruption stays, as whole lines in `path`.part, and
        standard error says so.

    Raises:
      OutputError: it cannot be written.
    """
    try:
        if path is None:
            _check_stdout()
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        elif paths.is_remote(path):
            memory = io.BytesIO()
            yield memory
            path.write_bytes(memory.getvalue())
        elif path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
        else:
            with _whole(_followed(path), keep=keep) as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        told = "standard output" if path is None else path
        raise OutputError(
            f"cannot write {told}: {error.strerror or error}; make room, or write elsewhere"
        ) from error


@contextlib.contextmanager
def _whole(path: AnyPath, *, keep: bool) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:  # an interruption, too
        if keep:
            with contextlib.suppress(OSError):
                _keep(temporary, path.with_name(f"{path.name}.part"))
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _keep(temporary: AnyPath, part: AnyPath) -> None:
    """Renames what there is to `part`, cut after the last whole line; if there is one."""
    lines = whole = 0
    with temporary.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, whole = lines + 1, whole + len(line)
        file.truncate(whole)
    if lines:
        os.replace(temporary, part)
        print(f"the first {lines:,} lines of output are kept in {part}", file=sys.stderr)


def _check_stdout() -> None:
    if sys.stdout is None:  # closed by whoever started us
        raise OutputError("standard output is closed: name a file with --output=FILE")


def translate(
    translator: Translator,
    lines: Sequence[str],
    file: BinaryIO,
    decode: str = "ar",
    *,
    nbest: int = 1,
    batch_size: int | None = None,
    window: int = WINDOW,
    **options: Any,
) -> None:
    """Writes the translation of each of `lines` to `file`, window by window, with progress on stderr.

    Args:
      translator: the model.
      lines: text.
      file: where to.
      decode: "ar", "nar" or "draft".
      nbest: 1 writes one line per line; more writes up to so many, as `format_nbest` has it.
      batch_size: most sentences decoded together.
      window: lines read ahead to be sorted by length.  Results do not depend on it.
      **options: any key of the config section `decode`.

    Raises:
      translator.DecodeError: as `Translator.decode`.
    """
    translator.options(decode, nbest=nbest, **options)  # complains before the first line is out
    with report.progress(len(lines), "translate", unit="line") as progress:
        for start in range(0, len(lines), window):
            found, took = translator.decode(
                lines[start : start + window],
                decode,
                nbest=nbest,
                batch_size=batch_size,
                on_batch=progress.advance,
                **options,
            )
            for message in cut_messages(took.cut, start):
                progress.say(message)
            for number, hypotheses in enumerate(found, start):
                texts = [hypotheses[0].text] if nbest == 1 else format_nbest(number, hypotheses)
                file.write("".join(f"{text}\n" for text in texts).encode("utf-8"))
            file.flush()


def format_nbest(number: int, hypotheses: Sequence[Hypothesis]) -> list[str]:
    """Moses' n-best format, `number ||| text ||| score`, with lines counted from 0."""
    return [f"{number} ||| {h.text} ||| {h.score:.6f}" for h in hypotheses]


def cut_messages(
    cut: Sequence[tuple[int, int, int]], start: int = 0, limit: int | None = None
) -> Iterator[str]:
    """What to say about lines that were cut: `Report.cut` of lines that begin at `start`.

    Args:
      cut: (line, tokens, kept) each.
      start: number of the first line, from 0; messages count from 1.
      limit: how many to name; the others are counted.
    """
    for line, tokens, kept in cut[:limit]:
        yield f"line {start + line + 1}: {tokens:,} tokens are too many; cut to the first {kept:,}"
    if limit is not None and len(cut) > limit:
        yield f"... and {len(cut) - limit:,} more lines were cut"
