"""`janus-jax report`: what stands in the tables, and everything that must not."""

import csv
import json

import pytest

from janus_jax import cli, evaluate, results, tables
from janus_jax.config import DecodeConfig
from janus_jax.data.sources import PairSource
from tests import fabricate
from tests.fabricate import COMMIT, DECODER, hypotheses, result, write


class Pairs(PairSource):
    """The test set of the fabricated runs."""

    def __init__(self, identity=fabricate.TEST):
        self.identity = identity

    def __len__(self):
        return len(fabricate.REFERENCES)

    def references(self, i):
        return fabricate.REFERENCES[i]


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    monkeypatch.setattr(results, "open_split", lambda *_: Pairs())


def judged(folder, **options):
    runs = [results.read_run(path) for path in results.find_runs(folder)]
    return tables.judge(runs, **options)


def why(found, run):
    """Every reason for which a run is set apart."""
    (one,) = [a for a in found.apart_runs if a.run == run]
    return "; ".join(one.reasons)


def evaluation_why(found, run, way):
    (one,) = [a for a in found.apart_evaluations if (a.run, a.what) == (run, f"test.{way}")]
    assert (run, way) not in found.evaluations
    assert way not in found.missing.get(run, ())
    return "; ".join(one.reasons)


def three(folder):
    """Rows that are alike: what is told apart must differ from these."""
    for name in ("ar", "rdrop", "janus"):
        write(folder, name)


# -- the report ---------------------------------------------------------------------------------------


def test_all_of_a_report(tmp_path, capsys):
    rates = {"AR greedy": 20.0, "AR beam 5": 10.0}
    write(tmp_path, "ar", ways={"ar-b1": 6, "ar-b5": 5}, bench_=fabricate.bench(rates))
    nar = {**rates, "NAR T = 10": 40.0, "draft, strict": 30.0}
    janus = {"ar-b1": 5, "ar-b5": 2, "nar-T10-c3": 6, "draft": 5}
    write(tmp_path, "janus", ways=janus, second=0.3, bench_=fabricate.bench(nar))
    write(tmp_path, "janus-s1", ways={**janus, "ar-b5": 1}, second=0.3)
    write(tmp_path, "no_aux", loss__aux=0.0)
    write(tmp_path, "cmlm", steps=200)
    (tmp_path / "data").mkdir()
    assert cli.main(["report", str(tmp_path), f"--output={tmp_path / 'out'}", "--samples=50"]) == 0
    printed = capsys.readouterr().out
    assert "unfinished, 200 of 400 updates" in printed

    with open(tmp_path / "out" / "table.csv", newline="") as file:
        lines = {(line["run"], line["way"]): line for line in csv.DictReader(file)}
    best = lines["janus", "ar-b5"]
    own = [r["scores"]["bleu"] for r in (result("ar-b5", hypotheses(2)), result("ar-b5", hypotheses(1)))]
    assert float(best["bleu"]) == pytest.approx(sum(own) / 2)
    assert float(best["bleu_sd"]) == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    assert (best["seeds"], best["against"], best["resamples"]) == ("2", "ar, AR beam 5", "50")
    assert len(best["p"].split("; ")) == 2
    assert all(0 < float(p) <= 1 for p in best["p"].split("; "))
    assert lines["janus", "draft"]["against"] == "ar, AR greedy"
    assert lines["janus", "nar-T10-c3"]["against"] == "ar, AR beam 5"
    assert float(best["sentences_per_s_batch_128"]) == 100
    assert lines["cmlm", ""]["bleu"] == ""
    assert lines["cmlm", ""]["status"].startswith("unfinished")

    text = (tmp_path / "out" / "table.md").read_text("utf-8")
    assert f"Trained by commit {COMMIT}, decoded by {DECODER}." in text
    assert "50 resamples" in text
    assert "nrefs:1\\|case" in text or "nrefs:1|case" in text
    (cost,) = [
        line
        for line in text.split("### Training cost")[1].split("###")[0].splitlines()
        if line.startswith("| janus |")
    ]
    assert cost.split("|")[-2].strip() == "3.00"
    (speed,) = [
        line
        for line in text.split("### Speed")[1].split("###")[0].splitlines()
        if line.startswith("| janus | NAR T = 10")
    ]
    assert [c.strip() for c in speed.split("|")[3:8]] == ["40.0", "2.00", "4.00", "2.00", "4.00"]
    assert "loss.objective = janus; loss.aux = 0.0" in text
    assert "nar-T1-c3, nar-T4-c3" in text.split("Not evaluated")[1]

    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '<img src="data:image/png;base64,' in page
    assert page.count("<figure>") == len(list((tmp_path / "out").glob("*.png"))) == 5
    assert "http" not in page


def test_a_missing_evaluation_is_a_blank(tmp_path):
    write(tmp_path, "ar")
    write(tmp_path, "janus", ways={"ar-b5": 3})
    found = judged(tmp_path)
    table = tables.quality(found)
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["row"] == "janus"
    assert row["AR greedy"] == ""
    assert row["AR beam 5"]
    assert "ar-b1" in found.missing["janus"]
    assert tables.score_of(found, "janus", "ar-b1") is None


def test_folders_are_tables_of_their_own(tmp_path):
    for direction in ("deen", "ende"):
        write(tmp_path / direction, "ar")
    write(tmp_path / "deen", "janus")
    write(tmp_path / "ende", "janus", model__dropout=0.1)
    write(tmp_path / "ende", "rdrop", model__dropout=0.1)
    sections = results.write(tmp_path, samples=20)
    assert [s.name for s in sections] == ["deen", "ende"]
    assert [r.name for r in sections[0].judged.runs] == ["ar", "janus"]
    assert "model.dropout" in why(sections[1].judged, "ar")
    assert (tmp_path / "ende-learning.png").exists()
    assert "## deen" in (tmp_path / "table.md").read_text("utf-8")


def test_learning_curves_are_of_the_likelihood_where_dev_was_never_decoded(tmp_path):
    write(tmp_path / "both", "ar")
    undecoded = write(tmp_path / "undecoded", "ar")
    rows = [json.loads(line) for line in (undecoded / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "dev":
            row["metrics"] = {"loss": 2.0, "nll_ar": 1.5}
    (undecoded / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = results.write(tmp_path, samples=20)
    captions = {s.name: s.pictures[f"{s.name}-learning.png"] for s in sections}
    assert captions == {"both": "BLEU on dev by updates", "undecoded": "Nats a token on dev by updates"}


def test_nothing_to_report_on_is_said(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "there is none below it" in capsys.readouterr().err
    write(tmp_path, "ar")
    assert cli.main(["report", str(tmp_path), "--baseline=at"]) == 1
    assert "no such row; there are ar" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()


# -- runs that are told apart -------------------------------------------------------------------------


def test_broken_directories_hide_no_other(tmp_path):
    three(tmp_path)
    write(tmp_path, "torn")
    (tmp_path / "torn" / "config.json").write_text('{"seed": ')
    write(tmp_path, "unknown_key")
    (tmp_path / "unknown_key" / "config.json").write_text('{"sed": 1}')
    write(tmp_path, "damaged")
    lines = (tmp_path / "damaged" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "damaged" / "metrics.jsonl").write_text("\n".join([lines[0], "garbage", *lines[1:], ""]))
    (tmp_path / "only_checkpoints" / "checkpoints").mkdir(parents=True)
    (tmp_path / "text").write_text("no folder")
    sections = results.write(tmp_path, samples=20)
    found = sections[0].judged
    assert [run.name for run in found.runs] == ["ar", "rdrop", "janus"]
    assert "config.json" in why(found, "torn")
    assert "did you mean 'seed'" in why(found, "unknown_key")
    assert "metrics.jsonl:2: damaged row" in why(found, "damaged")
    assert "no config.json" in why(found, "only_checkpoints")
    assert "metrics.jsonl: no metrics here" in why(found, "only_checkpoints")
    assert "only_checkpoints" in (tmp_path / "table.md").read_text("utf-8")


def test_unfinished_runs(tmp_path):
    three(tmp_path)
    write(tmp_path, "cmlm", steps=350)
    write(tmp_path, "longer", steps=600)
    run = write(tmp_path, "no_dev")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["kind"] != "dev"))
    (tmp_path / "janus-s1").mkdir()
    (tmp_path / "janus-s1" / "config.json").write_text((tmp_path / "janus" / "config.json").read_text())
    found = judged(tmp_path)
    assert why(found, "cmlm") == "unfinished, 350 of 400 updates"
    assert "600 updates, more than its train.steps, 400" in why(found, "longer")
    assert "last evaluation on dev missing" in why(found, "no_dev")
    assert "metrics.jsonl" in why(found, "janus-s1")
    assert [run.name for run in found.rows["janus"]] == ["janus"]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model__dropout": 0.1}, "model.dropout = 0.1, that of the others 0.3"),
        ({"batch__tokens": 4096}, "batch.tokens = 4096, that of the others 2048"),
        ({"optim__lr": 1e-3}, "optim.lr = 0.001"),
        ({"optim__ema": 0.5}, "optim.ema = 0.5"),
        ({"model__vocab_size": 500}, "model.vocab_size = 500"),
        ({"data__source": "en", "data__target": "de"}, "data.source = 'en'"),
        ({"data__size": 7}, "data.size = 7"),
        ({"loss__label_smoothing": 0.0}, "loss.label_smoothing = 0.0"),
        ({"train__dev_beam": 5}, "train.dev_beam = 5"),
        ({"decode__candidates": 7}, "decode.candidates = 7"),  # dev is decoded so, and chooses the checkpoint
    ],
)
def test_other_settings(tmp_path, keys, told):
    three(tmp_path)
    write(tmp_path, "cmlm", **keys)
    found = judged(tmp_path)
    assert told in why(found, "cmlm")
    assert "cmlm" not in found.rows


def test_other_numbers_of_updates(tmp_path):
    three(tmp_path)
    write(tmp_path, "cmlm", steps=200, train={"steps": 200, "eval_every": 200, "checkpoint_every": 200})
    assert why(judged(tmp_path), "cmlm") == "train.steps = 200, that of the others 400"


def test_what_rows_are_about_and_what_changes_nothing_may_differ(tmp_path):
    three(tmp_path)
    write(tmp_path, "uniform", batch__sampler="uniform", batch__workers=7, decode__beam=3, loss__chunk=0)
    write(tmp_path, "aligned", model__ar_positions="aligned", data__dir="/elsewhere", train__log_every=7)
    write(tmp_path, "figure", model__ar_positions="figure", train={"steps": 400, "eval_every": 200})
    assert not judged(tmp_path).apart_runs


def test_where_the_loss_chooses_the_checkpoint_what_dev_is_decoded_with_may_differ(tmp_path):
    write(tmp_path, "ar", train={"steps": 400, "best": "loss"})
    write(tmp_path, "janus", train={"steps": 400, "best": "loss"}, decode__candidates=7)
    assert not judged(tmp_path).apart_runs


def test_skipped_updates_set_apart(tmp_path):
    three(tmp_path)
    run = write(tmp_path, "janus-s1", train__nonfinite="skip")
    skipped = fabricate.event("skipped", 70, COMMIT)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(skipped) + "\n")
    assert why(judged(tmp_path), "janus-s1") == "1 of its updates were skipped (train.nonfinite)"


def test_seeds_of_the_baseline_are_told_apart(tmp_path):
    for name, wrong in (("ar", 5), ("ar-s1", 4), ("rdrop", 3), ("janus", 3), ("janus-s1", 2)):
        write(tmp_path, name, ways={"ar-b5": wrong})
    (section,) = results.write(tmp_path, samples=20)
    against = {v.run: v.against for v in section.versus}
    assert against == {
        "rdrop": "ar, seed 0, AR beam 5",
        "janus": "ar, seed 0, AR beam 5",
        "janus-s1": "ar, seed 1, AR beam 5",
    }
    with open(tmp_path / "table.csv", newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if line["row"] == "janus"]
    found = {v.run: v.found for v in section.versus}
    for key, name in (("difference", "difference"), ("p", "p_value")):
        values = [float(x) for x in line[key].split("; ")]
        assert values == [getattr(found[run], name) for run in ("janus", "janus-s1")]
    assert line["against"] == "ar, seed 0, AR beam 5; ar, seed 1, AR beam 5"
    assert float(line["interval_low"].split("; ")[1]) == found["janus-s1"].interval[0]


def test_time_on_another_device_is_in_no_mean(tmp_path):
    three(tmp_path)
    run = write(tmp_path, "janus-s1", second=0.001)
    text = (run / "metrics.jsonl").read_text().replace('"device": "cpu"', '"device": "gpu"')
    (run / "metrics.jsonl").write_text(text)
    results.write(tmp_path, samples=20)
    with open(tmp_path / "table.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["row"] == "janus"]
    assert {(float(line["seconds_per_update"]), line["device"]) for line in lines} == {(0.1, "cpu")}


def test_where_opinions_are_even_the_baseline_decides(tmp_path):
    write(tmp_path, "ar", model__dropout=0.2)
    write(tmp_path, "ar_content", model__dropout=0.1)
    assert why(judged(tmp_path), "ar_content") == "model.dropout = 0.1, that of the others 0.2"
    assert why(judged(tmp_path, baseline="ar_content"), "ar").endswith("others 0.1")


@pytest.mark.parametrize(
    ("commits", "told"),
    [
        (("b" * 12,), f"trained by commit {'b' * 12}, the others by {COMMIT}"),
        ((f"{COMMIT}-dirty",), "changes that nobody can check out"),
        ((COMMIT, "b" * 12), f"trained by several commits: {COMMIT}, {'b' * 12}"),
        ((None,), "trained by commit unknown"),
    ],
)
def test_other_commits(tmp_path, commits, told):
    three(tmp_path)
    write(tmp_path, "cmlm", commits=commits)
    assert told in why(judged(tmp_path), "cmlm")
    assert not judged(tmp_path, any_commit=True).apart_runs


def test_a_folder_of_changed_checkouts_compares_nothing_unless_asked(tmp_path):
    for name in ("ar", "janus"):
        write(tmp_path, name, commits=("b-dirty",))
    assert not judged(tmp_path).runs
    results.write(tmp_path, samples=20)
    assert "No run can stand in the table" in (tmp_path / "table.md").read_text("utf-8")
    sections = results.write(tmp_path, samples=20, any_commit=True)
    assert len(sections[0].judged.runs) == 2
    assert "Commits were not told apart" in (tmp_path / "table.md").read_text("utf-8")


def test_another_vocabulary(tmp_path):
    three(tmp_path)
    run = write(tmp_path, "cmlm")
    (run / "vocab.json").write_text(json.dumps({"sha256": "1" * 64}))
    assert why(judged(tmp_path), "cmlm") == "vocabulary 111111111111..., that of the others 000000000000..."


def test_seeds_of_a_row_are_the_same_experiment(tmp_path):
    three(tmp_path)
    write(tmp_path, "janus-s1")
    write(tmp_path, "janus-s2", loss__kl_ar_aux=0.0)
    write(tmp_path, "janus-s3", seed=1)
    found = judged(tmp_path)
    assert [run.name for run in found.rows["janus"]] == ["janus", "janus-s1"]
    assert "loss.kl_ar_aux = 0.0, that of its row's other seeds 3.0" in why(found, "janus-s2")
    assert why(found, "janus-s3") == "the same seed as janus-s1: 1"


# -- evaluations that are told apart ------------------------------------------------------------------


def changed(way="ar-b5", **changes):
    """A result with some keys replaced, dotted with __."""
    found = result(way, hypotheses(3))
    for key, value in changes.items():
        *path, leaf = key.split("__")
        part = found
        for name in path:
            part = part[name]
        part[leaf] = value
    return found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint": "step 200"}, "of step 200, and best on dev is step 400: evaluate again"),
        ({"checkpoint": "average of steps 100, 200, 400"}, "best on dev is step 400"),
        ({"vocabulary_sha256": "1" * 64}, "of another vocabulary than its run has"),
        ({"data": "parallel_text/other"}, "test data parallel_text/other"),
        ({"scores__sentences": 11}, "sentences: 11, that of the others 12"),
        ({"scores__bleu_signature": "nrefs:1|tok:intl"}, "BLEU signature nrefs:1|tok:intl"),
        ({"scores__chrf_signature": "nw:2"}, "chrF signature nw:2"),
        ({"scores__bleu_tok_lc_signature": "x"}, "signature of the lower-case BLEU x"),
        ({"options__beam": 4}, "beam = 4, its name says 5"),
        ({"options__length_penalty": 0.6}, "decoded with length_penalty = 0.6, the others with 1.0"),
        ({"versions__commit": "e" * 12}, f"decoded by commit {'e' * 12}, the others by {DECODER}"),
        ({"versions__commit": f"{DECODER}-dirty"}, "changes that nobody can check out"),
        ({"decode": "nar"}, "decode = 'nar', its name says 'ar'"),
        ({"lengths": "of the references"}, "decoded at lengths of the references, its name says otherwise"),
        ({"scores": {}}, "not the result of an evaluation: scores.sentences is None"),
    ],
)
def test_other_evaluations(tmp_path, changes, told):
    three(tmp_path)
    write(tmp_path, "ar_content", ways={"ar-b1": 3, "ar-b5": changed(**changes)})
    found = judged(tmp_path)
    assert told in evaluation_why(found, "ar_content", "ar-b5")
    assert ("ar_content", "ar-b1") in found.evaluations


def test_what_each_way_reads_of_a_model():
    assert tables.ways_of("ar") == tables.ways_of("rdrop") == ("ar-b1", "ar-b5")
    alone = ("nar-T1-c3", "nar-T4-c3", "nar-T10-c3", "nar-T10-c1-true_length")
    assert tables.ways_of("cmlm") == alone
    both = tables.ways_of("janus")
    assert both == tuple(way.name for way in tables.WAYS)
    assert {"nar-T10-c3-rescore", "draft"} <= set(both) - {*alone, "ar-b1", "ar-b5"}
    names = [
        evaluate.name_of(w.how.decode, DecodeConfig(**w.how.options), true_length=w.true_length)
        for w in tables.WAYS
    ]
    assert names == list(both)


def test_true_lengths_have_a_column_of_their_own(tmp_path):
    three(tmp_path)
    way = "nar-T10-c1-true_length"
    for run, lengths in (("janus", tables.TRUE), ("cmlm", tables.PREDICTED)):
        one = changed("nar-T10-c3", options__candidates=1, lengths=lengths)
        write(tmp_path / "t", run, ways={way: one})
    found = judged(tmp_path / "t", baseline="janus")
    assert ("janus", way) in found.evaluations
    assert "decoded at lengths predicted" in evaluation_why(found, "cmlm", way)


def test_evaluations_that_the_table_has_no_column_for(tmp_path):
    three(tmp_path)
    folder = tmp_path / "janus" / "eval"
    text = (folder / "test.ar-b5.json").read_text()
    (folder / "test.ar-b5-average5.json").write_text(text)
    (folder / "val.ar-b5.json").write_text(text)
    (folder / "test.ar-b1.json").write_text('{"split"')
    found = judged(tmp_path)
    assert "another checkpoint" in evaluation_why(found, "janus", "ar-b5-average5")
    assert "cannot be read" in evaluation_why(found, "janus", "ar-b1")
    assert [a.reasons[0] for a in found.apart_evaluations if a.what == "val.ar-b5"] == [
        "of another split; the table is about test"
    ]
    assert ("janus", "ar-b5") in found.evaluations


def test_bootstraps_that_cannot_be(tmp_path, monkeypatch):
    three(tmp_path)
    (tmp_path / "rdrop" / "eval" / "test.ar-b1.hyp").unlink()
    (tmp_path / "rdrop" / "eval" / "test.ar-b5.hyp").write_text("x\n" * 12)
    (tmp_path / "janus" / "eval" / "test.ar-b1.hyp").write_text("x\n" * 11)
    sections = results.write(tmp_path, samples=20)
    reasons = {(v.run, v.way): v.why_not for v in sections[0].versus if not v.found}
    assert reasons["rdrop", "ar-b1"] == "rdrop has no test.ar-b1.hyp"
    assert "ar-b5.hyp scores 0.00, its .json says" in reasons["rdrop", "ar-b5"]
    assert "11 and 12" in reasons["janus", "ar-b1"]
    assert len(reasons) == 3
    assert "Not compared" in (tmp_path / "table.md").read_text("utf-8")
    monkeypatch.setattr(results, "open_split", lambda *_: Pairs("other"))
    sections = results.write(tmp_path, samples=20)
    assert all("other data now" in v.why_not or "no test" in v.why_not for v in sections[0].versus)


def test_speeds_of_another_device_or_commit(tmp_path):
    rates = {"AR greedy": 20.0, "AR beam 5": 10.0}
    write(tmp_path, "ar", bench_=fabricate.bench(rates))
    write(tmp_path, "rdrop", bench_=fabricate.bench(rates, device="H200"))
    write(tmp_path, "ar_content", bench_=fabricate.bench(rates, commit="e" * 12))
    write(tmp_path, "janus", bench_={"device": "cpu"})
    found = tables.speeds(judged(tmp_path))
    assert {row for row, *_ in found.found} == {"ar"}
    told = {one.run: one.reasons[0] for one in found.apart}
    assert told["rdrop"] == "measured on H200, the others on cpu"
    assert told["ar_content"].startswith("measured by commit eee")
    assert told["janus"].startswith("not what bench writes")


def test_the_best_checkpoint_is_that_of_dev(tmp_path):
    write(tmp_path, "ar")
    run = results.read_run(tmp_path / "ar")
    assert tables.best_steps(run) == {400}
    assert tables.update_seconds(run) == pytest.approx(0.1)


def test_a_window_is_counted_from_what_set_back_the_clock():
    """Windows after an evaluation are shorter, and compiling is no part of an update."""
    rows = [fabricate.event("started", 0, COMMIT)]
    compiled = 0.0
    for step, window, compiling in ((50, 50, 7.0), (100, 50, 0.0), (150, 30, 3.0), (200, 50, 0.0)):
        compiled += compiling
        timing = {"data_s": 0.0, "step_s": compiling, "wait_s": 0.2 * window, "compile_s": compiled}
        rows.append({"step": step, "kind": "train", "metrics": {}, "timing": timing})
    made = fabricate.config_of("ar", train={"steps": 200, "eval_every": 120, "checkpoint_every": 120})
    assert tables.update_seconds(tables.Trained("ar", made, rows)) == pytest.approx(0.2)
    assert tables.update_seconds(tables.Trained("ar", made, rows[:1])) is None


def test_tables_are_told_in_three_ways():
    table = tables.Table("a | b", ("row", "x"), (("<r|1>", "1.0"), ("r2", "")), "A note.")
    assert "| <r\\|1> | 1.0 |" in table.markdown()
    assert "&lt;r|1&gt;" in table.html()
    rows = [{"row": "ar", "bleu": 0.1 + 0.2, "seconds_per_update": 1.0}]
    assert "0.30000000000000004" in tables.to_csv(rows)
    assert "seconds_per_update" not in tables.to_csv(rows, timed=False)
