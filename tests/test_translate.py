import io
import pathlib
import re
import sys
import types

import pytest

from janus_jax import translate
from janus_jax.translate import InputError, OutputError, split_lines
from janus_jax.translator import DecodeError, Hypothesis


def output_of(translator, lines, **options):
    file = io.BytesIO()
    translate.translate(translator, lines, file, **options)
    return file.getvalue().decode("utf-8")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a\n", ["a"]),
        (b"a", ["a"]),
        (b"a\n\nb", ["a", "", "b"]),
        (b"a\r\nb\r\n", ["a\r", "b\r"]),
        (b"a\rb\n", ["a\rb"]),
        ("a\u2028b\x0bc\x85\n".encode(), ["a\u2028b\x0bc\x85"]),
        (b"a\0b\n", ["a\0b"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),
    ],
)
def test_lines_end_at_lf_only(data, lines):
    assert split_lines(data, "x") == lines


def test_bad_utf8_names_file_and_line():
    with pytest.raises(InputError, match=r"in\.txt:3: not UTF-8 at byte 2 of the line"):
        split_lines(b"good\n\nb\xffd\nagain \xff\n", "in.txt")


@pytest.mark.parametrize("decode", ["ar", "nar"])
def test_one_line_out_for_each_line_in(tiny_translator, decode, capsys):
    lines = [
        "Ein Hund.",
        "",
        " \t\u00a0",
        "wort " * 5000,
        "a\0b \x01\x02",
        "日本語 😀 \u2028",
        "x\r",
        "\ue000 [M]",
    ]
    written = output_of(tiny_translator, lines, decode=decode)
    assert written.endswith("\n")
    out = written.removesuffix("\n").split("\n")
    assert len(out) == len(lines)
    assert [not line for line in out] == [not line.strip() for line in lines]
    err = capsys.readouterr().err
    assert re.search(r"line 4: [\d,]{6,} tokens are too many; cut to the first 24", err)
    assert err.count("are too many") == 1


def test_windows_change_nothing_and_write_as_they_finish(tiny_translator, capsys):
    lines = ["Ein Mann sieht den Ball.", "", "Ein Hund.", "wort " * 100, "Baum"] * 2
    written = output_of(tiny_translator, lines)
    err = capsys.readouterr().err
    assert "line 4: " in err
    assert "line 9: " in err
    assert output_of(tiny_translator, lines, window=3) == written
    assert "line 9: " in capsys.readouterr().err

    class Closed(io.BytesIO):
        def flush(self):
            if self.getvalue().count(b"\n") >= 6:
                raise BrokenPipeError

    file = Closed()
    with pytest.raises(BrokenPipeError):
        translate.translate(tiny_translator, lines, file, window=3)
    assert file.getvalue().decode() == "".join(written.splitlines(keepends=True)[:6])


def test_options_are_checked_before_anything_is_written(tiny_translator):
    file = io.BytesIO()
    with pytest.raises(DecodeError, match="nbest = 3 needs beam"):
        translate.translate(tiny_translator, ["a"], file, nbest=3)
    assert not file.getvalue()


def test_nbest_in_the_format_of_moses(tiny_translator):
    assert translate.format_nbest(3, [Hypothesis("a b", -0.5, 2), Hypothesis("", -2.0, 0)]) == [
        "3 ||| a b ||| -0.500000",
        "3 |||  ||| -2.000000",
    ]
    out = output_of(tiny_translator, ["Ein Hund.", "", "Baum"], nbest=2).splitlines()
    rows = [line.split(" ||| ") for line in out]
    assert [r[0] for r in rows] == ["0", "0", "1", "2", "2"]
    assert float(rows[0][2]) >= float(rows[1][2])


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(TypeError), translate.output(path) as file:
        file.writelines([b"half", "wrong"])
    assert path.read_text() == "old"
    with translate.output(path) as file:
        file.write(b"whole")
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def written(path, data, error=None, **options):
    with translate.output(path, **options) as file:
        file.write(data)
        if error:
            raise error


def test_what_was_written_before_an_error_is_kept_if_asked_for(tmp_path, capsys):
    path = tmp_path / "out.txt"
    with pytest.raises(KeyboardInterrupt):
        written(path, b"no line", KeyboardInterrupt(), keep=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        written(path, b"one\ntwo\nhalf of th", KeyboardInterrupt(), keep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt.part"]
    assert (tmp_path / "out.txt.part").read_text() == "one\ntwo\n"
    assert f"the first 2 lines of output are kept in {path}.part" in capsys.readouterr().err


def test_a_full_disk_is_named(monkeypatch):
    full = pathlib.Path("/dev/full")
    with pytest.raises(OutputError, match=r"cannot write /dev/full: No space left on device; make room, or"):
        written(full, b"x")
    stdout = types.SimpleNamespace(buffer=full.open("wb", buffering=0))
    monkeypatch.setattr(sys, "stdout", stdout)
    with stdout.buffer, pytest.raises(OutputError, match=r"cannot write standard output: No space left"):
        written(None, b"x")


def test_streams_closed_by_whoever_started_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"standard input is closed: .* --input=FILE"):
        translate.read_lines(None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OutputError, match=r"standard output is closed: .* --output=FILE"):
        translate.check_output(None)


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    with translate.output(link) as file:
        file.write(b"x")
    assert link.is_char_device()


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "to").mkdir()
    for target in ("to/old", "to/new"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with translate.output(link) as file:
            file.write(b"whole")
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == b"whole"
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["new", "old"]


def test_a_place_without_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("none/out")
    for path, named in (("none/out", "none"), ("file/out", "file"), ("link", "none")):
        with pytest.raises(
            OutputError, match=rf"--output=.*: there is no folder {tmp_path / named}; make it"
        ):
            translate.check_output(tmp_path / path)
    with pytest.raises(OutputError, match=r"is a folder; name a file in it"):
        translate.check_output(tmp_path)
    for path in (None, tmp_path / "new", pathlib.Path("new"), pathlib.Path("/dev/null")):
        translate.check_output(path)
