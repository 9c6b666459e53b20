"""Raw files: what is read, and what each kind of damage is called."""

import gzip
import http.server
import threading

import pytest

from janus_jax.data import download, lines


def write(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.de", "a.de.gz"])
def test_lines_end_at_lf_only_and_are_cleaned(tmp_path, name):
    path = write(tmp_path / name, "\ufeffeins \u00a0 zwei\r\n\n\tdrei\x0bvier\u2028fünf\x85\nsechs")
    assert list(lines.read_lines(path)) == ["eins zwei", "", "drei vier fünf", "sechs"]


def test_bad_utf8_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.de", b"gut\nschl\xff\n")
    with pytest.raises(lines.DataError, match=r"a\.de:2: not UTF-8 at byte 5"):
        list(lines.read_lines(path))


def test_nul_names_file_and_line(tmp_path):
    path = write(tmp_path / "a.de.gz", "gut\ngut\nsch\0lecht\n")
    with pytest.raises(lines.DataError, match=r"a\.de\.gz:3: NUL byte"):
        list(lines.read_lines(path))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:40] + b"\0\0" + b[42:]]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "a.de.gz"
    path.write_bytes(damage(gzip.compress("".join(f"Zeile {i * i}\n" for i in range(999)).encode())))
    with pytest.raises(lines.DataError, match=r"a\.de\.gz: damaged gzip after line \d+"):
        list(lines.read_lines(path))


def test_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.de is missing"):
        list(lines.read_lines(tmp_path / "a.de"))


@pytest.mark.parametrize(
    ("a", "b", "counts"), [("1\n2\n3\n", "1\n", (3, 1)), ("", "1\n2\n", (0, 2)), ("1", "1\n2", (1, 2))]
)
def test_unequal_counts_name_both_files_and_both_counts(tmp_path, a, b, counts):
    paths = (write(tmp_path / "x.de", a), write(tmp_path / "x.en", b))
    with pytest.raises(lines.DataError, match=rf"x\.de has {counts[0]}, .*x\.en has {counts[1]}"):
        list(lines.read_pairs(paths))


def test_empty_files(tmp_path):
    with pytest.raises(lines.DataError, match=r"x\.de and .*x\.en\.gz are empty"):
        list(lines.read_pairs((write(tmp_path / "x.de", ""), write(tmp_path / "x.en.gz", ""))))


def test_find_pair(tmp_path):
    assert lines.find_pair(tmp_path, "train", ("de", "en")) is None
    de = write(tmp_path / "train.de.gz", "a")
    with pytest.raises(
        lines.MissingFileError, match=r"train\.en \(or \.gz\) is missing, the other side of .*de\.gz"
    ):
        lines.find_pair(tmp_path, "train", ("de", "en"))
    en = write(tmp_path / "train.en", "b")
    assert lines.find_pair(tmp_path, "train", ("de", "en")) == (de, en)
    write(tmp_path / "train.en.gz", "b")
    with pytest.raises(lines.DataError, match=r"both .* remove one"):
        lines.find_pair(tmp_path, "train", ("de", "en"))


def test_fingerprint_depends_on_contents(tmp_path):
    path = write(tmp_path / "a.de", "x")
    before = lines.fingerprint([path])
    assert lines.fingerprint([path]) == before
    write(path, "y")
    assert lines.fingerprint([path]) != before


def test_fetch_checks_the_hash_and_leaves_nothing_partial(tmp_path):
    origin = write(tmp_path / "origin", "text")
    target = tmp_path / "sub" / "copy"
    with pytest.raises(download.DownloadError, match=r"has sha256 [0-9a-f]{64}, expected 00; do this"):
        download.fetch(origin.as_uri(), target, "00", "do this")
    assert list(target.parent.iterdir()) == []
    download.fetch(origin.as_uri(), target, lines.sha256(origin), "do this")
    assert target.read_text() == "text"
    origin.unlink()
    download.fetch(origin.as_uri(), target, None, "do this")  # it is there: nothing is fetched
    with pytest.raises(download.DownloadError, match=r"cannot download .*; do this"):
        download.fetch(origin.as_uri(), tmp_path / "other", None, "do this")


def test_a_download_that_breaks_off_is_not_kept(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 300)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        url = f"http://localhost:{server.server_port}/file"
        with pytest.raises(download.DownloadError, match=r"after 300 of 1,000 bytes; start again, or do"):
            download.fetch(url, tmp_path / "copy", None, "do this")
        answering.join()
    assert list(tmp_path.iterdir()) == []
