import dataclasses
import functools
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from janus_jax import mesh, sharding
from janus_jax.config import Config, MeshConfig, ModelConfig, OptimConfig
from janus_jax.step import init_state

LAYOUTS = [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=1, tensor=4)]


def test_all_devices_by_default():
    m = mesh.make_mesh(MeshConfig())
    assert dict(m.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert set(m.axis_types) == {AxisType.Auto}
    assert mesh.row_shares(m) == 8


@pytest.mark.parametrize("data", [1, 2, 4])
def test_some_devices(data):
    m = mesh.make_mesh(MeshConfig(data=data))
    assert mesh.row_shares(m) == data
    assert list(m.devices.flat) == jax.devices()[:data]


def test_three_axes():
    m = mesh.make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(m.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.row_shares(m) == 4
    assert mesh.part_of(m) == ((0, 1, 2, 3), 4)


@pytest.mark.parametrize("data", [3, 16, 0])
def test_a_mesh_that_does_not_divide_the_devices(data):
    with pytest.raises(mesh.MeshError, match=rf"mesh\.data = {data} .* 8 devices .* -1 .* 1, 2, 4, 8"):
        mesh.make_mesh(MeshConfig(data=data))


def test_inner_axes_that_do_not_divide_the_devices():
    with pytest.raises(mesh.MeshError, match=r"fsdp x mesh\.tensor = 3 x 2 = 6 .* 8 devices .* 1, 2, 4, 8"):
        mesh.make_mesh(MeshConfig(fsdp=3, tensor=2))
    with pytest.raises(mesh.MeshError, match=r"mesh\.data = 4 x 4 \(fsdp x tensor\) .* one of 1, 2"):
        mesh.make_mesh(MeshConfig(data=4, fsdp=4))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device that is not there."""

    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


def test_a_mesh_that_leaves_a_process_idle():
    chips = [Chip(i, process_index=i // 4) for i in range(8)]
    with pytest.raises(mesh.MeshError, match=r"mesh\.data = 4 leaves 4 of the 8 devices of 2 processes"):
        mesh.make_mesh(MeshConfig(data=4), chips)


def test_data_goes_across_slices_and_nothing_else_does():
    chips = [Chip(i, process_index=i // 4, slice_index=i // 4) for i in range(8)]
    m = mesh.make_mesh(MeshConfig(fsdp=2, tensor=2), chips)
    slices = np.vectorize(lambda chip: chip.slice_index, otypes=[int])(m.devices)
    assert (slices == np.array([0, 1]).reshape(2, 1, 1)).all()
    with pytest.raises(mesh.MeshError, match=r"does not divide over the 2 slices.*to at most 4"):
        mesh.make_mesh(MeshConfig(fsdp=8), chips)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_batch_is_cut_by_rows_and_stays_the_same(layout):
    m = mesh.make_mesh(layout)
    host = {
        "source": np.arange(16 * 5, dtype=np.int32).reshape(16, 5),
        "masked": np.arange(32).reshape(16, 2) % 3 == 0,
        "index": np.arange(16, dtype=np.int32),
    }
    batch = mesh.global_batch(m, host)
    assert batch.keys() == host.keys()
    for key, rows in host.items():
        assert batch[key].dtype == rows.dtype
        assert batch[key].sharding == mesh.batch_sharding(m)
        own = 16 // mesh.row_shares(m)
        assert {s.data.shape for s in batch[key].addressable_shards} == {(own, *rows.shape[1:])}
        np.testing.assert_array_equal(batch[key], rows)


def test_rows_that_do_not_divide():
    with pytest.raises(mesh.MeshError, match=r"12 rows of 'source' .* 8 devices.*mesh\.data"):
        mesh.global_batch(mesh.make_mesh(MeshConfig()), {"source": np.zeros((12, 4), np.int32)})


MODEL = ModelConfig(vocab_size=64, dim=16, ffn=32, heads=4, encoder_layers=2, decoder_layers=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_matrix_is_cut_as_far_as_the_mesh_goes(layout):
    """And optimiser state lies as its parameters do: nothing large is whole on a device."""
    m = mesh.make_mesh(layout)
    config = Config(model=MODEL, optim=OptimConfig(ema=0.9))
    abstract = jax.eval_shape(functools.partial(init_state, config))
    shardings = mesh.state_shardings(m, abstract)
    sizes = {path: (array, size) for path, array, _, size in mesh.sharding_table(abstract, shardings)}
    matrices = [p for p in sizes if re.search(r"kernel|table|positions", p)]
    assert sum(p.startswith("opt_state") for p in matrices) == 2 * sum(p.startswith("ema") for p in matrices)
    pieces = layout.fsdp * layout.tensor
    for path in matrices:
        kind, shape = sizes[path][0].split()
        whole = np.prod([int(n) for n in shape.split("x")]) * np.dtype(kind).itemsize
        expected = layout.fsdp if re.search("length_table|positions", path) else pieces
        assert sizes[path][1] * expected == whole, path


def test_parameters_are_born_where_they_belong():
    m = mesh.make_mesh(MeshConfig(fsdp=2, tensor=2))
    init = functools.partial(init_state, Config(model=MODEL))
    abstract = jax.eval_shape(init)
    shardings = mesh.state_shardings(m, abstract)
    described = mesh.with_shardings(abstract, shardings).params["target_table"]
    assert described.sharding == shardings.params["target_table"]
    born = jax.jit(init, out_shardings=shardings)()
    same = jax.tree.map(lambda x, laid: x.sharding.is_equivalent_to(laid, x.ndim), born, shardings)
    assert all(jax.tree.leaves(same))
    np.testing.assert_array_equal(born.params["target_table"], jax.jit(init)().params["target_table"])


def test_the_first_rule_that_matches_decides_and_must_divide():
    m = mesh.make_mesh(MeshConfig(fsdp=8))
    abstract = {"params": {"table": jnp.ones((4, 8)), "bias": jnp.ones(3)}}
    rules = (("params/table", (None, "fsdp")), ("table|bias", ("fsdp",)))
    with pytest.raises(mesh.MeshError, match=r"fsdp = 8 does not divide dimension 0 of params/bias, \(3,\)"):
        mesh.state_shardings(m, abstract, rules)
    specs = jax.tree.map(lambda s: s.spec, mesh.state_shardings(m, abstract, rules[:1]))
    assert specs == {"params": {"table": PartitionSpec(None, "fsdp"), "bias": PartitionSpec()}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_takes_the_same_devices_as_one_axis(layout):
    m = mesh.local_mesh(layout)
    assert dict(m.shape) == {"data": mesh.make_mesh(layout).size, "fsdp": 1, "tensor": 1}

    def double(x):
        return 2 * x, jnp.sum(x)[None]

    rows = PartitionSpec(sharding.ROWS)
    doubled, sums = mesh.on_each_device(double, m, (rows,), (rows, rows))(np.arange(8.0))
    np.testing.assert_array_equal(doubled, 2 * np.arange(8.0))
    np.testing.assert_array_equal(sums, np.arange(8.0).reshape(m.size, -1).sum(1))


@pytest.mark.parametrize("layout", [MeshConfig(tensor=16), MeshConfig(data=2, fsdp=8), MeshConfig(data=16)])
def test_decoding_needs_no_mesh_of_the_size_of_training(layout):
    with pytest.raises(mesh.MeshError):
        mesh.make_mesh(layout)
    assert dict(mesh.local_mesh(layout).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


def test_sums_over_the_cut_batch_are_those_of_one_device():
    rows = {"x": np.random.default_rng(0).integers(0, 100, (16, 3)).astype(np.int32)}
    many, one = (mesh.global_batch(mesh.make_mesh(MeshConfig(data=n)), rows)["x"] for n in (8, 1))
    assert int(jax.jit(jnp.sum)(many)) == int(jax.jit(jnp.sum)(one)) == rows["x"].sum()


def test_devices():
    assert mesh.device_kind() == "cpu"
    assert mesh.device_memory_stats() == {}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "its package is not installed"),
        (
            RuntimeError("Unable to initialize backend 'x': why (set JAX_PLATFORMS='' to ..)"),
            "Unable .*: why",
        ),
    ],
)
def test_a_platform_that_is_not_here(monkeypatch, error, reason):
    def fail():
        raise error

    mesh.check_devices()
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(mesh.MeshError, match=rf"jax cannot start JAX_PLATFORMS=\w*: {reason}; install"):
        mesh.check_devices()
    error = RuntimeError("the coordinator is gone")
    with pytest.raises(RuntimeError, match="the coordinator is gone"):
        mesh.check_devices()


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {
                "bytes_in_use": self.used,
                "peak_bytes_in_use": 2 * self.used,
                "bytes_limit": 100,
                "other": 1,
            }

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(10), Device(30)])
    assert mesh.device_memory_stats() == {"bytes_in_use": 30, "peak_bytes_in_use": 60, "bytes_limit": 100}


def test_elsewhere_portable_numbers_ask_for_nothing(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    before = dict(os.environ)
    mesh.ask_for_portable_numbers()
    assert os.environ == before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="portable among x86-64 alone")
def test_portable_numbers():
    """In processes of their own, as jax reads it once; one of them has one core."""
    program = """
import os, sys
if sys.argv[1] == "one core":
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
from janus_jax import mesh
mesh.ask_for_portable_numbers()
import jax, jax.numpy as jnp, numpy as np
x = np.random.default_rng(0).standard_normal((384, 512)).astype(np.float32)
roots = jax.jit(lambda x: jax.lax.rsqrt(jnp.abs(x)))(x)
np.testing.assert_array_equal(roots, 1 / np.sqrt(np.abs(x)))  # processors have estimates of their own
print(float(jax.jit(jnp.sum)(x)).hex())  # the order of the terms is a matter of the threads
print(os.environ["NPROC"], os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["XLA_FLAGS"])
"""
    plain = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS", "ONEDNN_MAX_CPU_ISA")}

    def run(cores, **given):
        words = [sys.executable, "-W", "error", "-c", program, cores]
        done = subprocess.run(words, env=plain | given, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    flags = " ".join(mesh.PORTABLE_FLAGS)
    total, said = run("all cores")
    assert said == f"2 AVX2 {flags}"
    assert run("one core") == [total, said]
    _, said = run("all cores", NPROC="3", XLA_FLAGS="--xla_cpu_max_isa=AVX --xla_cpu_ftz=true")
    assert said == f"3 AVX2 --xla_cpu_max_isa=AVX --xla_cpu_ftz=true {mesh.PORTABLE_FLAGS[1]}"


def test_the_compilation_cache_fills_and_is_used(tmp_path):
    """In a process of its own, as the setting is global; a compilation before it must not disable it."""
    program = """
import sys, jax, jax.numpy as jnp
from janus_jax import mesh
jax.jit(lambda x: x + 1)(jnp.ones(3))
mesh.set_compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else None)
jax.jit(lambda x: jnp.tanh(x @ x.T))(jnp.ones((4, 4))).block_until_ready()
print(len(hits))
"""
    run = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "cache")]
    hits = [int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert hits[0] == 0
    assert hits[1] > 0
    assert any((tmp_path / "cache").iterdir())
