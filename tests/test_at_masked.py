"""launch/tables/at_masked.py against the losses that training writes down."""

import dataclasses
import pathlib
import runpy

import jax
import pytest

from janus_jax import losses, run, step
from janus_jax.data.encoded import encode_split
from janus_jax.data.pipeline import eval_batches
from janus_jax.data.sources import open_split

AT_MASKED = pathlib.Path(__file__).parents[1] / "launch" / "tables" / "at_masked.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(AT_MASKED))


def test_the_losses_that_dev_has(tiny_run, script):
    opened = run.open_run(tiny_run.folder)
    params, name = opened.params("latest")
    found_name, found = script["measure"](opened, "latest")
    assert found_name == name
    split = open_split(opened.config.data, opened.data_folder, opened.config.data.dev_split)
    examples = encode_split(split, opened.vocabulary(), opened.data_folder)
    sums, weights = {}, {}
    evaluate = jax.jit(step.eval_step, static_argnames="config")
    for batch in eval_batches(examples, opened.config.batch):
        for term, (value, weight) in evaluate(params, batch, config=opened.config).items():
            sums[term] = sums.get(term, 0.0) + float(value)
            weights[term] = weights.get(term, 0.0) + float(weight)
    nll = {term: sums[term] / weights[term] for term in sums if term.startswith("nll_")}
    assert found["ar_all"] == pytest.approx(nll["nll_ar"], rel=1e-5)
    assert found["aux"] == pytest.approx(nll["nll_aux"], rel=1e-5)
    assert found["nar"] == pytest.approx(nll["nll_nar"], rel=1e-5)
    assert found["ar"] != pytest.approx(found["ar_all"], rel=1e-5)  # other tokens
    assert 0 < found["ahead"] < 1


def test_what_is_not_trained_is_blank(tiny_copy, script, capsys):
    config = tiny_copy.config
    alone = dataclasses.replace(config.loss, objective="ar")
    assert losses.taught(alone) == {"ar"}
    run.Run(tiny_copy.folder, dataclasses.replace(config, loss=alone)).record()
    assert script["main"]([str(tiny_copy.folder), "--checkpoint=latest"]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert [bool(cell) for cell in cells] == [True, True, True, False, False, False, True]


def test_no_run(tmp_path, script, capsys):
    assert script["main"]([str(tmp_path / "none")]) == 1
    assert "none is not a run directory" in capsys.readouterr().err
