"""Where things lie: folders of this machine as `pathlib.Path`, URLs of object stores as `epath.Path`.

  as_path, is_remote          a name as a path that can be read, listed and joined with `/`
  data_folder, cache_folder   what must be local whatever the run directory is: prepared data, spools
  lease                       one holder at a time, where there is no flock

An object store has no append, no rename and no lock.  What follows from that elsewhere: a file is
written in one piece (it appears whole when it is closed, so it needs no temporary name), metrics grow
in a local spool and are uploaded (`report.MetricsWriter`), prepared data stay local (they are mapped
into memory), and a run directory is held by a lease.

All of this goes through fsspec, also where TensorFlow is installed.  A run directory must be local or
gs://, because Orbax writes checkpoints to nothing else; single files can go to whatever epath knows
(s3://, az://, hf:// too).

Room: [disk, clock].  Imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from etils import epath

AnyPath: TypeAlias = "pathlib.Path | epath.Path"
Name: TypeAlias = str | os.PathLike[str]

CACHE = "JANUS_JAX_CACHE"
RUNS = "gs"  # the protocol that Orbax can write checkpoints to
EXTRAS = {"gs": "gcs"}  # protocol: the extra of ours that brings its package

HEARTBEAT = 15.0  # seconds between two signs of life of the holder of a lease
PATIENCE = 60.0  # seconds without one after which it counts as dead


class PathError(RuntimeError):
    """A place that cannot be used; the message names it and the remedy."""


class LeaseError(PathError):
    """A place that another process holds."""


def is_remote(name: Name) -> bool:
    """Whether `name` is a URL."""
    return "://" in os.fspath(name)


def as_path(name: Name) -> AnyPath:
    """`name` as a path: a `pathlib.Path`, or for a URL an `epath.Path`.

    Raises:
      PathError: the URL's protocol is not known, or needs a package that is not installed.
    """
    text = os.fspath(name)
    if not is_remote(text):
        return pathlib.Path(text)
    os.environ.setdefault("EPATH_USE_TF", "false")  # one way to a store, with or without TensorFlow
    from etils import epath

    protocol = text.partition("://")[0]
    try:
        path = epath.Path(text)
    except KeyError:
        raise PathError(
            f"{text}: {protocol}:// is not supported; use a local folder or {RUNS}://bucket/folder"
        ) from None
    _check_installed(protocol, text)
    return path


def make_writable(folder: AnyPath) -> None:
    """Makes `folder` and finds out whether it takes files, before anything is done that would be lost.

    Of a store nothing is asked: it has no folders.

    Raises:
      OSError: it cannot be made or written to.
    """
    if is_remote(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_run(folder: AnyPath) -> None:
    """Refuses a place that cannot hold a run.

    Raises:
      PathError: checkpoints cannot be written there.
    """
    if is_remote(folder) and not os.fspath(folder).startswith(f"{RUNS}://"):
        protocol = os.fspath(folder).partition("://")[0]
        raise PathError(
            f"{folder}: a run cannot be kept on {protocol}://, because Orbax cannot write checkpoints there; "
            f"use {RUNS}://, or a folder where that store is mounted"
        )


def _check_installed(protocol: str, url: str) -> None:
    import fsspec
    from fsspec.registry import known_implementations

    inner = "gcs" if protocol == "gs" else protocol  # the name that epath asks fsspec for
    try:
        kind = fsspec.get_filesystem_class(inner)
    except (ImportError, ValueError) as error:
        known = known_implementations.get(inner, {}).get("class", inner)
        package = known.partition(".")[0]
        extra = EXTRAS.get(protocol)
        what = f"'janus-jax[{extra}]'" if extra else f"fsspec {package}"
        raise PathError(
            f"{url}: {protocol}:// needs the package {package}: pip install {what} ({error})"
        ) from error
    log = logging.getLogger(kind.__module__.partition(".")[0])
    if log.level == logging.NOTSET:  # pages about tries and errors; what matters in them is raised as well
        log.setLevel(logging.CRITICAL)
    # Others write there too (TensorStore, other hosts): a remembered listing would be a wrong one.
    names = {inner, *([kind.protocol] if isinstance(kind.protocol, str) else kind.protocol)}
    for name in names:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def explain(error: BaseException) -> str | None:
    """What a client of a store says is wrong (no access, no network), in one line; None for other errors."""
    package = type(error).__module__.partition(".")[0]
    if package not in ("gcsfs", "s3fs", "adlfs", "huggingface_hub", "google", "botocore", "aiohttp", "azure"):
        return None
    first_line = str(error).strip().partition("\n")[0]
    return (
        f"{package}: {type(error).__name__}: {first_line[:200]}; are bucket, credentials and network right?"
    )


# -- what stays on this machine -----------------------------------------------------------------------


def cache_root() -> pathlib.Path:
    """$JANUS_JAX_CACHE; ~/.cache/janus_jax where that is not set, or names no folder of this machine."""
    root = os.environ.get(CACHE, "")
    if not root or is_remote(root):
        root = os.path.join("~", ".cache", "janus_jax")
    return pathlib.Path(root).expanduser()


def cache_folder(run: Name, what: str) -> pathlib.Path:
    """The folder of this machine for `what` belongs to a remote `run`: $JANUS_JAX_CACHE/`what`/NAME-DIGEST.

    Without that variable, or where it names no folder of this machine, ~/.cache/janus_jax takes its place.
    """
    url = os.fspath(run).rstrip("/")
    name = re.sub(r"[^\w.-]+", "_", url.rpartition("/")[2])
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_root() / what / f"{name}-{digest}"


def data_folder(configured: str, run: Name) -> pathlib.Path:
    """Where the prepared data of `run` lie: `configured`, else its folder `data`, else a cache.

    Prepared data are mapped into memory, so they are always local: each machine of a remote run prepares
    its own copy.

    Raises:
      PathError: `configured` is a URL.
    """
    if configured:
        if is_remote(configured):
            raise PathError(f"data.dir = {configured}: prepared data must lie in a folder of this machine")
        return pathlib.Path(configured).expanduser()
    if is_remote(run):
        return cache_folder(run, "data")
    return pathlib.Path(run) / "data"


# -- one holder at a time -----------------------------------------------------------------------------


def _end(message: str) -> None:
    """Ends the process at once: another one writes there by now, so not even a last save may follow."""
    print(f"janus-jax: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def lease(
    path: AnyPath,
    say: Callable[[str], None] = print,
    lost: Callable[[str], None] = _end,
    sleep: Callable[[float], Any] = time.sleep,
) -> Iterator[None]:
    """Holds the file `path` of an object store for this process alone.

    The file is created exclusively, names its holder, and is rewritten every `HEARTBEAT` seconds.  A holder
    that was killed leaves it behind: if it does not change for `PATIENCE` seconds, it is taken over, which
    compares no clocks of two machines.  Whoever finds that its lease was taken over (the machine was
    suspended for long) must stop.

    Args:
      path: the file, which need not exist.
      say: told what is waited for and what is taken over.
      lost: what to do when another process holds it by now; does not return, by default.
      sleep: waits so many seconds.

    Raises:
      LeaseError: another process holds it; names who, and how to remove the file if that is wrong.
      PathError: nothing can be written there.
    """
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": uuid.uuid4().hex,
    }
    if not _create(path, _lease_bytes(mine, 0)):
        _take_over(path, mine, say, sleep)
    released = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, released, lost), daemon=True)
    beating.start()
    try:
        yield
    finally:
        released.set()
        beating.join()
        with contextlib.suppress(Exception):  # a lease that stays is taken over
            if _holder(path).get("id") == mine["id"]:
                path.unlink()


def _take_over(
    path: AnyPath, mine: dict[str, Any], say: Callable[[str], None], sleep: Callable[[float], Any]
) -> None:
    """Waits for a sign of life of the holder of `path`; takes its place if there is none."""
    before = _content(path)
    holder = _holder(path)
    who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
    busy = (
        f"{path.parent} is in use by another janus-jax process ({who}); wait for it, or choose another "
        f"--workdir; if no such process runs, remove {path}"
    )
    say(f"{path.parent} was in use by {who}: waiting up to {PATIENCE:g} s for a sign of life")
    waited = 0.0
    while waited < PATIENCE:
        sleep(HEARTBEAT / 3)
        waited += HEARTBEAT / 3
        if (now := _content(path)) != before:
            if now is None and _create(path, _lease_bytes(mine, 0)):
                return  # it has ended meanwhile
            raise LeaseError(busy)
    path.write_bytes(_lease_bytes(mine, 0))
    sleep(HEARTBEAT / 5)  # of two that took over in the same moment, the last one holds it
    if _holder(path).get("id") != mine["id"]:
        raise LeaseError(busy)
    say("there was none: it is taken over")


def _beat(
    path: AnyPath, mine: dict[str, Any], released: threading.Event, lost: Callable[[str], None]
) -> None:
    beats = 0
    while not released.wait(HEARTBEAT):
        holder: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # a network that is away for a while; the next beat tries again
            holder = _holder(path)
            if holder.get("id") in (None, mine["id"]):
                beats += 1
                path.write_bytes(_lease_bytes(mine, beats))
                continue
        if holder:
            lost(
                f"{path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}, "
                f"because this one gave no sign of life for {PATIENCE:g} s; this one stops"
            )
            return


def _lease_bytes(mine: dict[str, Any], beats: int) -> bytes:
    return (json.dumps({**mine, "beats": beats}) + "\n").encode()


def _content(path: AnyPath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holder(path: AnyPath) -> dict[str, Any]:
    """What the file says about its holder; empty if it is not there or says nothing."""
    try:
        found = json.loads(_content(path) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _create(path: AnyPath, content: bytes) -> bool:
    """Writes the file if there is none, in one atomic step of the store; False if there is one."""
    import fsspec

    system, inner = fsspec.core.url_to_fs(os.fspath(path))
    try:
        system.pipe_file(inner, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise PathError(
            f"cannot write to {path.parent} ({reason}): does the bucket exist, and may you write there?"
        ) from error
    return True
