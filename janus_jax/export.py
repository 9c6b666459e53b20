"""`janus-jax export`: a run as a folder that decodes with jax alone, one way of decoding, options fixed.

    DIR/manifest.json       what it is: mode, options, buckets, programs, versions, sha256 of every file
        params.npz          parameters by name; arguments of the programs, not part of them
        programs/           StableHLO, as jax.export serialises it: one or two for each length bucket
        vocab.model, vocab.json
        load.py             `exported`, which runs all that

The number of rows is a symbol in the programs, so one serves any batch; parameters are arguments, so
programs are small and do not grow with the model.  Lengths are those of the run's buckets: AR and
draft have a program for each source bucket; NAR, as in `engine`, one that encodes and one for each canvas.

The folder appears whole or not at all.  It holds no clock and no path of this machine.

Room: shell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from janus_jax import exported, paths, report
from janus_jax.config import Config
from janus_jax.exported import KIND, LOADER, MANIFEST, PARAMS, ExportedError
from janus_jax.generate import Generator
from janus_jax.paths import AnyPath
from janus_jax.run import Run
from janus_jax.translator import DecodeError, Translator

PLATFORMS = ("cpu", "cuda", "tpu")  # by default; jax knows "rocm" besides
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
PROGRAMS = "programs"
LISTED = (
    "janus-jax",
    "commit",
    "jax",
    "jaxlib",
    "flax",
    "sentencepiece",
    "numpy",
)  # versions in the manifest


class ExportError(ValueError):
    """An export that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Mode:
    """How one way of decoding becomes programs."""

    method: str  # of Generator: the one that writes
    width: str | None  # the option that says how many hypotheses a sentence has
    remembers: bool = False  # writes from what `remember` made, on a canvas; else from the source


MODES = {
    "ar": Mode("autoregressive", "beam"),
    "nar": Mode("non_autoregressive", "candidates", remembers=True),
    "draft": Mode("draft", None),
}


def export(
    opened: Run,
    output: AnyPath,
    decode: str,
    *,
    checkpoint: str = "best",
    batch_size: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    **options: Any,
) -> dict[str, Any]:
    """Writes the export of a run into the folder `output`; its manifest.

    Args:
      opened: the run.
      output: a folder that is not there, or is empty, or holds an export, which is replaced.
      decode: "ar", "nar" or "draft".
      checkpoint: best | latest | a step | average:N.
      batch_size: most sentences that the loader decodes together; default what `decode.tokens` slots hold.
      platforms: what the programs are made for.
      **options: any key of the config section `decode`.

    Raises:
      ExportError: a place that cannot be used or written, an unknown platform, or no flatbuffers.
      translator.DecodeError: a mode or an option that the model cannot serve.
      Whatever `Translator.from_run` raises.
    """
    _check_platforms(platforms)
    root = _destination(output)
    translator = Translator.from_run(opened.folder, checkpoint)
    effective = translator.options(decode, **options)
    if batch_size is not None and batch_size < 1:
        raise DecodeError(f"batch_size must be at least 1, got {batch_size}")
    generator = Generator(opened.config.model, effective)
    leaves, _ = jax.tree_util.tree_flatten_with_path(translator.params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]

    with _appearing(root) as folder:
        entries, convention = _write_programs(
            folder, generator, decode, opened.config, translator.params, batch_size, platforms
        )
        arrays = io.BytesIO()
        # numpy knows no bfloat16; the loader casts, which gives the same numbers again.
        plain = (np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None) for _, x in leaves)
        named: dict[str, Any] = dict(zip(names, plain, strict=True))
        np.savez(arrays, **named)
        (folder / PARAMS).write_bytes(arrays.getbuffer())
        translator.vocabulary.save(folder)
        (folder / LOADER).write_bytes(Path(exported.__file__).read_bytes())
        versions = report.versions()
        manifest = {
            "format": exported.FORMAT,
            "kind": KIND,
            "decode": decode,
            "options": dataclasses.asdict(effective),
            "platforms": list(platforms),
            "calling_convention": convention,
            "ids": dataclasses.asdict(generator.model.ids),
            "vocab_size": generator.model.vocab_size,
            "checkpoint": translator.name,
            "direction": [opened.config.data.source, opened.config.data.target],
            "objective": opened.config.loss.objective,
            "model": opened.config.to_dict()["model"],
            "versions": {name: versions.get(name) for name in LISTED},
            "params": names,
            "dtypes": [str(x.dtype) for _, x in leaves],
            "programs": entries,
            "files": {
                str(path.relative_to(folder)): _described(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _write_programs(
    folder: Path,
    generator: Generator,
    decode: str,
    config: Config,
    params: Any,
    batch_size: int | None,
    platforms: Sequence[str],
) -> tuple[list[dict[str, Any]], int]:
    """Writes every program; the entries of the manifest, by source bucket, and jax's calling convention."""
    mode, conventions = MODES[decode], set()
    width = getattr(generator.decode, mode.width) if mode.width else 1
    spec = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(params)]
    tree: Any = jax.tree.structure(params)
    (rows,) = jax.export.symbolic_shape("rows")
    (folder / PROGRAMS).mkdir()

    def write(name: str, function: Callable[..., Any], *arguments: Any) -> str:
        with _no_locations():
            made = jax.export.export(jax.jit(function), platforms=tuple(platforms))(spec, *arguments)
            data = _serialised(made)
        (folder / PROGRAMS / name).write_bytes(data)
        conventions.add(made.calling_convention_version)
        progress.advance()
        return f"{PROGRAMS}/{name}"

    canvases = {n: _canvases(generator, config, n) if mode.remembers else [] for n in config.batch.buckets}
    entries = []
    with report.progress(sum(1 + len(c) for c in canvases.values()), "export", unit="program") as progress:
        for length in config.batch.buckets:
            most = max(1, generator.decode.tokens // (length * width))
            entry: dict[str, Any] = {"source": length, "rows": min(most, batch_size or most)}
            source = jax.ShapeDtypeStruct((rows, length), jnp.int32)
            if mode.remembers:
                remember = _remembering(generator, tree)
                entry["remember"] = write(f"remember-{length}.stablehlo", remember, source)
                memory, lengths = jax.eval_shape(remember, spec, source)
                shapes: Any = jax.eval_shape(generator.remember, tree.unflatten(spec), source)
                treedef = jax.tree.structure(shapes[0])
                entry["write"] = {
                    str(slots): write(
                        f"{decode}-{length}-{slots}.stablehlo",
                        _writing_on(generator, mode.method, tree, treedef, slots),
                        memory,
                        lengths,
                    )
                    for slots in canvases[length]
                }
            else:
                entry["whole"] = write(
                    f"{decode}-{length}.stablehlo", _writing(generator, mode.method, tree), source
                )
            entries.append(entry)
    (convention,) = conventions
    return entries, convention


def _canvases(generator: Generator, config: Config, length: int) -> list[int]:
    """The canvas sizes that `engine` would choose from for sources of `length`, ascending."""
    most = generator.slots(length) + 1
    return [*(b for b in config.batch.buckets if b < most), most]


def _remembering(generator: Generator, tree: Any) -> Callable[..., Any]:
    def remember(params: list[Any], source: jax.Array) -> tuple[list[Any], jax.Array]:
        memory, lengths = generator.remember(tree.unflatten(params), source)
        return jax.tree.leaves(memory), lengths  # a plain list: no class of ours in the file

    return remember


def _writing_on(
    generator: Generator, method: str, tree: Any, memory_tree: Any, slots: int
) -> Callable[..., Any]:
    def write(params: list[Any], memory: list[Any], lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        call = getattr(generator, method)
        choice, _ = call(tree.unflatten(params), memory_tree.unflatten(memory), lengths, slots)
        return choice.tokens, choice.scores

    return write


def _writing(generator: Generator, method: str, tree: Any) -> Callable[..., Any]:
    def write(params: list[Any], source: jax.Array) -> tuple[jax.Array, jax.Array]:
        result = getattr(generator, method)(tree.unflatten(params), source)
        return result.tokens[:, 0], result.scores[:, 0]  # best first

    return write


def _serialised(made: jax.export.Exported) -> bytes:
    try:
        return bytes(made.serialize())
    except ImportError as error:
        raise ExportError(
            f"jax exports with the package flatbuffers: pip install flatbuffers ({error})"
        ) from error


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Programs without the file names and lines that made them: smaller, and the same from any folder."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _check_platforms(platforms: Sequence[str]) -> None:
    wrong = [p for p in platforms if p not in KNOWN_PLATFORMS]
    if wrong or not platforms:
        raise ExportError(
            f"--platforms must be some of {','.join(KNOWN_PLATFORMS)}, got {','.join(platforms)!r}"
        )


# -- the folder -----------------------------------------------------------------------------------


def _destination(output: AnyPath) -> Path:
    """`output` as a folder that may be written, or replaced.

    An older export that a killed process had put aside is there again.

    Raises:
      ExportError: a URL, a file, a mount point, or a folder that holds what no export wrote.
    """
    if paths.is_remote(output):
        raise ExportError(f"--output={output}: export to a folder of this machine, and copy that")
    try:
        root = Path(output).expanduser().resolve()
    except RuntimeError as error:  # ~nobody
        raise ExportError(f"--output={output}: {error}") from error
    if root == Path.cwd() or root in Path.cwd().parents:
        raise ExportError(f"--output={output} is the current folder, or has it inside; name another one")
    _put_back(root)
    if not root.exists():
        return root
    if not root.is_dir():
        raise ExportError(f"--output={output} is a file; name a folder")
    if os.path.ismount(root):
        raise ExportError(
            f"--output={output} is a mount point, which cannot be replaced; name a folder inside it"
        )
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_symlink() or not p.is_dir()}
    if not found:
        return root
    try:
        known = set(exported.read_manifest(root)["files"]) | {MANIFEST}
    except ExportedError:
        raise ExportError(
            f"--output={output} is not empty, and holds no export that could be replaced; name another folder"
        ) from None
    foreign = sorted(name for name in found - known if "__pycache__" not in name)
    if foreign:
        raise ExportError(
            f"--output={output} holds an export, and {foreign[0]}, which is not part of it and would be "
            "lost; move it away, or name another folder"
        )
    return root


@contextlib.contextmanager
def _appearing(root: Path) -> Iterator[Path]:
    """A folder beside `root` to write in, which becomes `root` at the end, or goes if anything goes wrong.

    Raises:
      ExportError: it cannot be written, for instance because the disk is full.
    """
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in _left_by_killed(root, "tmp"):
            shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in temporary.rglob("*"):
            with path.open("rb") if path.is_file() else contextlib.nullcontext() as file:
                if file:
                    os.fsync(file.fileno())
        _put(temporary, root)
    except OSError as error:
        raise ExportError(
            f"cannot write {root}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, root: Path) -> None:
    """Renames `temporary` to `root`; an older export there goes, and comes back if the renaming fails."""
    aside = root.with_name(f".{root.name}.{os.getpid()}.old")
    for path in _left_by_killed(root, "old"):  # the newest is there again, if it was needed: `_put_back`
        shutil.rmtree(path, ignore_errors=True)
    try:
        if root.exists():
            os.rename(root, aside)
        os.rename(temporary, root)
    except BaseException:
        if aside.exists() and not root.exists():
            os.rename(aside, root)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(root: Path) -> None:
    """What `_put` set aside comes back, where its process was killed before the new export was there."""
    if root.exists():
        return
    if aside := _left_by_killed(root, "old"):
        os.rename(max(aside, key=lambda path: path.stat().st_mtime), root)


def _left_by_killed(root: Path, ending: str) -> list[Path]:
    """Folders beside `root` that exports to it made under such a name, and that no process uses now."""
    name = re.compile(rf"\.{re.escape(root.name)}\.(\d+)\.{ending}")
    beside = root.parent.iterdir() if root.parent.is_dir() else ()
    return [path for path in beside if (found := name.fullmatch(path.name)) and not _runs(int(found[1]))]


def _runs(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    if pid == os.getpid():  # in a container each start may have the same one
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _described(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
