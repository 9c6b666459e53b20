"""Pictures without warnings, of whatever text and metrics there are."""

import itertools
import math
import subprocess
import sys

import pytest

from janus_jax import plots
from janus_jax.plots import plot_quality_speed, plot_refinement, plot_training
from janus_jax.report import ReportError
from tests.test_report import _history


def _size(path):
    """Width and height of a PNG, which must not be of one colour."""
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    assert pixels.std() > 0.01
    return pixels.shape[1], pixels.shape[0]


def _row(step, kind, **metrics):
    return {"step": step, "kind": kind, "metrics": metrics, "timing": {}}


def test_training_curves_with_missing_terms_gaps_and_several_runs(tmp_path):
    janus = [
        _row(s, "train", loss=9 / s, nll_ar=5 / s, nll_nar=6 / s, kl_ar_aux=0.1, grad_norm=s)
        for s in (1, 2, 3)
    ]
    janus += [
        _row(2, "dev", nll_ar=3.0, bleu_ar=20.0, bleu_nar=None),
        _row(3, "dev", bleu_ar=None, bleu_nar=9.0),
    ]
    janus += [_row(3, "train", loss=None, nll_ar=1.0, grad_norm=None), _row(3, "event", what="stopped")]
    ar = [_row(1, "train", loss=4.0, nll_ar=4.0)]
    plot_training({"janus $a$ 漢": janus, "ar": ar}, tmp_path / "both.png")
    plot_training(ar, tmp_path / "ar.png")
    plot_training([_row(0, "train", loss=0.0)], tmp_path / "one.svg")
    assert _size(tmp_path / "both.png")[1] > _size(tmp_path / "ar.png")[1]
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()
    with pytest.raises(ReportError, match="nothing to draw"):
        plot_training([_row(1, "event", what="x")], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_more_runs_than_colours_are_told_apart(tmp_path):
    runs = {f"run {i}": [_row(s, "dev", loss=float(i + s)) for s in (1, 2)] for i in range(9)}
    assert len({plots._look(i) for i in range(9)}) == 9
    plot_training(runs, tmp_path / "nine.png")
    assert _size(tmp_path / "nine.png")[0] > 300


def test_infinities_of_others_leave_gaps(tmp_path):
    rows = [_row(s, "train", loss=v) for s, v in ((1, 2.0), (2, math.inf), (3, 1.0), (4, -math.inf))]
    assert plots._curve(rows, "train", "loss")[1][::2] == [2.0, 1.0]
    plot_training(rows, tmp_path / "gaps.png")
    with pytest.raises(ReportError, match="nothing to draw"):
        plot_training(rows[1:2], tmp_path / "none.png")


def test_a_spike_does_not_flatten_a_curve():
    low, high = plots._robust_limits([1.0 + 0.01 * i for i in range(200)] + [1e6])
    assert low < 1.0
    assert 2.9 < high < 4
    assert plots._robust_limits([2.0])[0] < 2 < plots._robust_limits([2.0])[1]


@pytest.mark.parametrize("slots", [1, 5, 30])
def test_refinement_picture_of_any_text(tmp_path, slots):
    pieces = [
        "▁the",
        "s",
        "▁Donaudampfschifffahrtsgesellschaftskapitän",
        "🙂",
        "漢字",
        "$x_1$",
        "\n",
        "",
        "\x00",
    ]
    final = [pieces[j % len(pieces)] for j in range(slots)]
    text = "source 漢 $" + " word" * 80
    plot_refinement(_history(final, 4), tmp_path / "r.png", title="A title 🙂", source=text, output="o" * 300)
    width, height = _size(tmp_path / "r.png")
    assert 900 < width < 2100
    assert height < 2000


def test_quality_speed_labels_do_not_overlap(tmp_path, monkeypatch):
    notes = []
    save = plots._save

    def spy(figure, path):
        notes.extend(figure.axes[0].texts)
        renderer = figure.canvas.get_renderer()
        boxes = [n.get_window_extent(renderer) for n in notes]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    near = [(20, 36.7), (21, 36.6), (22, 36.5), (60, 33.0), (61, 33.1), (150, 31.0), (400, 22.0)]
    points = [
        {"label": f"beam {i}", "group": "ab"[i % 2], "sentences_per_s": s, "bleu": b}
        for i, (s, b) in enumerate(near)
    ]
    plot_quality_speed(points, tmp_path / "q.png", title="de→en")
    assert len(notes) == len(points)
    assert _size(tmp_path / "q.png")[0] > 900


def test_quality_speed_names_every_group_inside_the_picture(tmp_path, monkeypatch):
    found = []
    save = plots._save

    def spy(figure, path):
        box = figure.axes[0].get_legend().get_window_extent(figure.canvas.get_renderer())
        found.append((box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, box.height))
        save(figure, path)

    monkeypatch.setattr(plots, "_save", spy)
    for count in (2, 5, 8):
        points = [
            {"label": "x", "group": f"NAR, {i} candidates", "latency": 1.0 + i, "bleu": 20.0 + i}
            for i in range(count)
        ]
        plot_quality_speed(points, tmp_path / "q.png", title="de→en")
    assert [inside for inside, _ in found] == [True] * 3
    assert found[2][1] > 1.5 * found[0][1], "in two lines"


def test_quality_speed_takes_latency_and_names_what_is_missing(tmp_path):
    point = {"label": "x", "group": "g", "bleu": 1.0}
    plot_quality_speed([point | {"latency": 0.02}], tmp_path / "one.png")
    for bad in ([], [point], [point | {"latency": 1.0}, point | {"sentences_per_s": 1.0}]):
        with pytest.raises(ReportError, match="every point needs"):
            plot_quality_speed(bad, tmp_path / "x.png")
    with pytest.raises(ReportError, match="above 0"):
        plot_quality_speed([point | {"latency": 0.0}], tmp_path / "x.png")
    with pytest.raises(ReportError, match=r"use \.png"):
        plot_quality_speed([point | {"latency": 1.0}], tmp_path / "x.nope")


def test_confidence_colours_darken_evenly():
    light = [plots._luminance(plots._confidence_colour(c / 10)) for c in range(11)]
    assert all(a - b > 0.02 for a, b in itertools.pairwise(light))


def test_pictures_are_imported_only_when_drawn():
    code = "import sys, janus_jax.plots; assert not {'matplotlib', 'tensorboardX', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
