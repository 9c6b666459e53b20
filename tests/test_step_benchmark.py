"""The systems that benchmarks/step.py times compute the same thing, and its command holds."""

import dataclasses
import functools
import gzip
import itertools
import json

import jax
import numpy as np
import pytest

from benchmarks import parts, trace
from benchmarks import step as benchmark
from janus_jax import bench, config, cost, losses, run, step

CONFIG = config.from_dict(
    {
        "batch": {"buckets": [8], "tokens": 48, "mask_rate": 0.6},
        "model": {
            "vocab_size": 30,
            "dim": 8,
            "ffn": 12,
            "heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "max_positions": 8,
            "max_length": 9,
            "dropout": 0.0,
        },
        "loss": {"chunk": 16},
    }
)


@functools.partial(jax.jit, static_argnames=("chosen", "objective"))
def loss_and_gradient(params, batch, chosen, objective):
    weights = losses.weights(batch["target"], batch["masked"], chosen.loss, chosen.model.ids)
    return jax.value_and_grad(objective, has_aux=True)(params, batch, chosen, None, weights)


def test_batches_of_a_run_are_of_a_length_that_it_has(tiny_run):
    batch = dataclasses.replace(tiny_run.config.batch, buckets=(3, 24, 48))
    c = dataclasses.replace(tiny_run.config, batch=batch)
    opened = run.Run(tiny_run.folder, c)
    assert bench.middle_bucket(c) == bench.middle_bucket(c, opened) == 24
    assert next(bench.batches_of(c, opened, 24, 1))["target"].shape[1] == 24
    with pytest.raises(run.RunError, match=r"no training pair falls into the bucket of 48; .* pairs for 24"):
        next(bench.batches_of(c, opened, 48, 1))


def test_the_obvious_version_and_ours_have_one_loss_and_one_gradient():
    """Those in between are compared in test_step.py."""
    batch = next(bench.batches_of(CONFIG, None, 8, 1))
    rng = np.random.default_rng(0)
    params = jax.eval_shape(functools.partial(step.init_state, CONFIG)).params
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    systems = benchmark.configurations(CONFIG)
    expected = loss_and_gradient(params, batch, systems["separate"], benchmark.separate)
    ours = loss_and_gradient(params, batch, systems["gathered"], step.objective)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected)


def test_flops_fall_from_system_to_system():
    systems = benchmark.configurations(CONFIG)
    counted = [benchmark.flops(c, 6, 8, separately=name == "separate") for name, c in systems.items()]
    assert counted[1] == cost.train_step(systems["one pass"], 6, 8).executed
    assert all(a > b for a, b in itertools.pairwise(counted))


def written_config(folder):
    path = folder / "config.py"
    values = {k: v for k, v in CONFIG.to_dict().items() if k in ("batch", "model", "loss")}
    path.write_text(
        "from janus_jax.config import from_dict, to_config_dict\n"
        f"def get_config():\n    return to_config_dict(from_dict({values!r}))\n",
        encoding="utf-8",
    )
    return path


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    path = written_config(tmp_path)
    arguments = [f"--config={path}", "--config.model.decoder_layers=1", "--rounds=2", "--systems=separate,AR"]
    assert benchmark.main([*arguments, f"--json={tmp_path / 'step.json'}"]) == 0
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    assert list(found["systems"]) == ["separate", "AR"]
    assert found["config"]["model"]["decoder_layers"] == 1
    assert all(len(row["seconds"]) == 2 for row in found["systems"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in found["systems"])


def test_a_profile_tells_where_the_time_goes(tmp_path, capsys):
    arguments = [f"--config={written_config(tmp_path)}", "--rounds=1"]
    written = tmp_path / "step.json"
    chosen = ["--systems=gathered", f"--profile={tmp_path / 'trace'}", f"--json={written}"]
    assert benchmark.main([*arguments, *chosen]) == 0
    told = json.loads(written.read_text(encoding="utf-8"))["systems"]["gathered"]["profile"]
    assert all(seconds > 0 for seconds in told.values())
    found = {name.partition(",")[0] for name in told}
    assert found >= {"encoder", "decoder", "loss over the vocabulary", "embeddings", parts.OTHER}
    assert {name.rpartition(", ")[2] for name in told} >= {"forward", "backward"}
    assert "where the time of one update of ours goes" in capsys.readouterr().out


def test_instructions_that_hold_others_are_not_counted_twice():
    program = """
ENTRY %main (a: f32[8,8]) -> f32[8] {
  %dot.1 = f32[8,8]{1,0} dot(%a, %b), metadata={op_name="jit(f)/jvp(J)/encoder/ffn/rise/dot_general"}
  %while.2 = (s32[], f32[8]{0}) while(%t), body=%b, metadata={op_name="jit(f)/jvp(loss_masked)/while"}
  %copy.4 = f32[8]{0} copy(%d)
  ROOT %fusion.3 = f32[8]{0} fusion(%c), metadata={op_name="jit(f)/transpose(jvp(J))/decoder/cross"}
}
"""
    assert {name: parts.part(op) for name, op in parts.origins(program).items()} == {
        "dot.1": "encoder, feed-forward, forward",
        "fusion.3": "decoder, cross-attention, backward",
        "copy.4": parts.OTHER,
    }


def test_kernels_of_a_cuda_graph_are_found_and_the_host_is_not_counted(tmp_path):
    """Inside a graph the event's instruction is the graph, and its name is the fusion's."""
    program = """
ENTRY %main (a: f32[8,8]) -> f32[8] {
  %fusion.1 = f32[8,8]{1,0} fusion(%a), metadata={op_name="jit(f)/jvp(J)/encoder/ffn/rise/dot_general"}
  ROOT %dot.3 = f32[8]{0} dot(%c), metadata={op_name="jit(f)/transpose(jvp(J))/decoder/cross"}
}
"""
    listed = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "X", "pid": 1, "ts": 0, "name": "fusion.1", "dur": 5.0, "args": {"hlo_op": "command_buffer"}},
        {"ph": "X", "pid": 1, "ts": 3, "name": "nvjet_sm90", "dur": 7.0, "args": {"hlo_op": "dot.3"}},
        {"ph": "X", "pid": 1, "ts": 30, "name": "nvjet", "dur": 11.0, "args": {"hlo_op": "command_buffer"}},
        {"ph": "X", "pid": 2, "tid": 4, "ts": 0, "name": "dot.3", "dur": 90.0},
    ]
    events = written_profile(tmp_path, listed)
    found = parts.seconds_by_part(events, program)
    assert found == {"decoder, cross-attention, backward": 7e-6, "encoder, feed-forward, forward": 5e-6}
    assert trace.busy(e for e in events if e.on_device) == pytest.approx(21e-6)  # 0 to 10, 30 to 41
    workers = {"ph": "M", "pid": 2, "tid": 4, "name": "thread_name", "args": {"name": "tf_XLAEigen/7"}}
    listed = [workers, *({**event, "pid": 2} for event in listed if event["ph"] == "X")]  # all as on a CPU
    events = written_profile(tmp_path, listed)
    found = parts.seconds_by_part(events, program)
    assert found["decoder, cross-attention, backward"] == pytest.approx(97e-6)
    assert [e.on_device for e in events] == [True] * 4


def written_profile(folder, listed):
    """The events of a profile that holds these."""
    path = folder / "trace.json.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump({"traceEvents": listed}, file)
    return trace.events(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems=AR", "--profile=traces"], "name it in --systems"),
        (["--length=7"], "--length must be one of batch.buckets"),
        (["--config=nowhere.py"], "nowhere.py"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys):
    assert benchmark.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.dmi=3", "did you mean --config.model.dim?"),
        ("--rouns=3", "unrecognized arguments: --rouns=3"),
        ("--rounds=0", "from 1 up"),
        ("--systems=fast", "no system 'fast'"),
    ],
)
def test_a_wrong_argument_is_named(argument, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([argument])
    assert message in capsys.readouterr().err
