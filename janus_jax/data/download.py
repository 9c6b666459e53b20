"""Files from the network: fetched once, checked, and either whole or absent.

Room: [disk, network] the only one that opens a connection.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request

from janus_jax.data.lines import DataError

_TIMEOUT = 30  # seconds without an answer
_CHUNK = 1 << 16


class DownloadError(DataError):
    """A file could not be fetched, or is not the one that was expected."""


def fetch(url: str, path: pathlib.Path, sha256: str | None, remedy: str) -> None:
    """Downloads `url` to `path` unless `path` is already there.

    Args:
      url: where the file lies.
      path: where it goes; it appears only when it is complete and its hash agrees.
      sha256: the expected hash, or None if none is known.
      remedy: what the user can do instead, ends the message of every error.

    Raises:
      DownloadError: no connection, an HTTP error, fewer bytes than announced, or another hash than `sha256`.
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, partial.open("wb") as file:
            while chunk := answer.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            told, found = answer.headers.get("Content-Length"), file.tell()
        if told is not None and int(told) != found:  # a connection that closes early is no error to urllib
            raise DownloadError(
                f"{url} ended after {found:,} of {int(told):,} bytes; start again, or {remedy}"
            )
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DownloadError(f"{url} has sha256 {digest.hexdigest()}, expected {sha256}; {remedy}")
        os.replace(partial, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DownloadError(f"cannot download {url} ({error}); {remedy}") from error
    finally:
        partial.unlink(missing_ok=True)
