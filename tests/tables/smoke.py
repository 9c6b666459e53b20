"""The smoke table from beginning to end: `make tables`.  Minutes, so no part of the suite.

One command makes all of it, with the figures of docs/tables/smoke.md, as far as `mesh.portable` promises; the
same command again does nothing but report; and another run of some of its rows gives the same figures.
"""

import csv
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

from janus_jax.tables import TIMED, ways_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTED = ROOT / "docs" / "tables" / "smoke.md"
# The first data cache: with another size, sums may come in other blocks (docs/parity.md).
CACHE = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index0/size")
OURS = ("XLA_FLAGS", "NPROC")  # what conftest sets for the suite, and no user has
ROWS = {"ar_content": "ar", "ar": "ar", "rdrop": "rdrop", "cmlm": "cmlm", "janus": "janus", "no_aux": "janus"}


def table(out, script, *options):
    """Runs a script at scale smoke; its output, and the lines of its table without what the clock said."""
    env = {name: value for name, value in os.environ.items() if name not in OURS}
    env["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    words = [ROOT / "launch" / "tables" / script, "--scale=smoke", f"--out={out}", *options]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    print(script, *options, done.stdout.splitlines()[-1])
    with open(out / "table.csv", encoding="utf-8", newline="") as file:
        lines = [{k: v for k, v in line.items() if k not in TIMED} for line in csv.DictReader(file)]
    return done.stdout, lines


def figures(markdown):
    """The lines of the tables of a report, but for those of what training cost, which the clock says."""
    sections = markdown.split("\n### ")
    return [
        line
        for section in sections
        if not section.startswith("Training cost")
        for line in section.splitlines()
        if line.startswith("|")
    ]


def test_the_smoke_table(tmp_path):
    _, lines = table(tmp_path / "first", "multi30k.sh")
    assert {(line["row"], line["way"]) for line in lines} == {
        (row, way) for row, objective in ROWS.items() for way in ways_of(objective)
    }
    assert {line["status"] for line in lines} == {"ok"}
    page = (tmp_path / "first" / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "Set apart" not in page
    assert "Not evaluated" not in page
    documented = DOCUMENTED.read_text("utf-8")
    same_jax = f"jax {importlib.metadata.version('jaxlib')}," in documented
    if same_jax and platform.machine() == "x86_64" and CACHE.exists() and CACHE.read_text() == "32K\n":
        found = figures((tmp_path / "first" / "table.md").read_text("utf-8"))
        assert found == figures(documented), f"write {DOCUMENTED} anew if this change of numbers is meant"

    told, again = table(tmp_path / "first", "multi30k.sh")
    assert "finished: 6 runs; left: 0 updates and 0 evaluations" in told
    assert "+ janus-jax train" not in told
    assert again == lines

    rows = ("ar", "no_aux")
    _, others = table(tmp_path / "second", "multi30k.sh", f"--rows={','.join(rows)}")
    assert others == [line for line in lines if line["row"] in rows]

    _, others = table(tmp_path / "third", "canlaw.sh", "--rows=ar")
    assert {line["way"] for line in others} == set(ways_of("ar"))
