"""An object store for tests: objects in memory, reached both ways that a run on gs:// reaches them.

  fsspec        `Store`, registered as gs://: what `paths` and Orbax list, read and write
  TensorStore   an HTTP server with the part of Google's JSON API that its driver `gcs` uses: the arrays

As in a real store there are no folders, no append and no rename, an object appears whole when it is
closed, and creation can be exclusive.  Clients and credentials of the real store are not in it.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import itertools
import json
import os
import re
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.registry import _registry

URL = "gs://bucket"


class Store(fsspec.AbstractFileSystem):
    """All objects, by bucket/name."""

    protocol = ("gcs", "gs")
    objects: ClassVar[dict[str, tuple[bytes, int]]] = {}  # content, generation
    generations = itertools.count(1)
    lock = threading.RLock()

    @classmethod
    def put(cls, name: str, content: bytes, generation: str | None = None) -> int | None:
        """Writes an object, if its generation is that one ("0": if there is none); None if it is not."""
        if not name.startswith(URL.removeprefix("gs://") + "/"):
            raise FileNotFoundError(name)
        with cls.lock:
            if generation is not None and cls.objects.get(name, (b"", 0))[1] != int(generation):
                return None
            cls.objects[name] = (content, next(cls.generations))
            return cls.objects[name][1]

    def info(self, path, **_):
        name = self._strip_protocol(path)
        if name in self.objects:
            return {"name": name, "size": len(self.objects[name][0]), "type": "file"}
        if any(key.startswith(f"{name}/") for key in list(self.objects)):
            return {"name": name, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        name = self._strip_protocol(path)
        if self.info(name)["type"] == "file":
            names = [name]
        else:
            depth = name.count("/") + 2
            inside = [key for key in list(self.objects) if key.startswith(f"{name}/")]
            names = sorted({"/".join(key.split("/")[:depth]) for key in inside})
        return [self.info(one) for one in names] if detail else names

    def _open(self, path, mode="rb", **_):
        name = self._strip_protocol(path)
        if mode == "rb":
            self.info(name)
            return io.BytesIO(self.objects[name][0])
        assert mode == "wb", f"an object store has no mode {mode}"
        return _Upload(name)

    def pipe_file(self, path, value, mode="overwrite", **_):
        name = self._strip_protocol(path)
        if self.put(name, value, "0" if mode == "create" else None) is None:
            raise FileExistsError(path)

    def rm(self, path, recursive=False, maxdepth=None):
        name = self._strip_protocol(path)
        self.info(name)
        for key in list(self.objects):
            if key == name or (recursive and key.startswith(f"{name}/")):
                del self.objects[key]

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


class _Upload(io.BytesIO):
    """An object that appears when it is closed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def close(self) -> None:
        if not self.closed:
            Store.put(self.name, self.getvalue())
        super().close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Get, put, delete and list, with generations."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name, query = self._request()
        if name is None:
            return self._list(query)
        content, generation = Store.objects.get(name, (b"", 0))
        if not generation:
            return self._answer(404)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        headers = {"x-goog-generation": str(generation)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self._answer(200, content, headers)
        start, size = int(part[1]), len(content)
        end = min(int(part[2]) + 1 if part[2] else size, size)
        return self._answer(
            206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
        )

    def do_POST(self) -> None:
        _, query = self._request()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        generation = Store.put(f"{self._bucket}/{query['name']}", content, query.get("ifGenerationMatch"))
        if generation is None:
            return self._answer(412)
        return self._json({"name": query["name"], "generation": str(generation), "size": str(len(content))})

    def do_DELETE(self) -> None:
        name, _ = self._request()
        return self._answer(204 if Store.objects.pop(str(name), None) else 404)

    def _list(self, query: dict[str, str]) -> None:
        prefix = f"{self._bucket}/"
        names = sorted(n.removeprefix(prefix) for n in list(Store.objects) if n.startswith(prefix))
        names = [n for n in names if n.startswith(query.get("prefix", ""))]
        names = [n for n in names if n >= query.get("startOffset", "")]
        names = [n for n in names if "endOffset" not in query or n < query["endOffset"]]
        sizes = {n: str(len(Store.objects[prefix + n][0])) for n in names}
        return self._json({"items": [{"name": n, "size": size} for n, size in sizes.items()]})

    def _request(self) -> tuple[str | None, dict[str, str]]:
        """The object that the path names, if any, as bucket/name; and the query."""
        url = urllib.parse.urlsplit(self.path)
        found = re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        assert found, self.path
        self._bucket = found[1]
        name = f"{found[1]}/{urllib.parse.unquote(found[2])}" if found[2] else None
        return name, dict(urllib.parse.parse_qsl(url.query))

    def _json(self, value: Any) -> None:
        return self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served() -> Iterator[type[Store]]:
    """The store behind gs://, empty, for fsspec and TensorStore in this process."""
    storage = types.ModuleType("google.cloud.storage")  # Orbax asks it for the kind of the bucket
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda _: object())  # type: ignore[attr-defined]
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage  # type: ignore[attr-defined]
    modules = {"google.cloud": cloud, "google.cloud.storage": storage}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    before = {key: sys.modules.get(key) for key in modules}
    environment = dict(os.environ)
    classes = dict(_registry)
    Store.objects.clear()
    try:
        sys.modules.update(modules)
        os.environ |= {"TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
        for protocol in Store.protocol:
            fsspec.register_implementation(protocol, Store, clobber=True)
        yield Store
    finally:
        _registry.clear()
        _registry.update(classes)
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module
        os.environ.clear()
        os.environ.update(environment)
        server.shutdown()
        server.server_close()
