import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from janus_jax import mesh


def test_all_devices_by_default():
    m = mesh.make_mesh()
    assert dict(m.shape) == {"data": jax.device_count()} == {"data": 8}
    assert m.axis_types == (AxisType.Auto,)
    assert mesh.data_parallelism(m) == 8


@pytest.mark.parametrize("data", [1, 2, 4])
def test_some_devices(data):
    m = mesh.make_mesh(data)
    assert mesh.data_parallelism(m) == data
    assert list(m.devices.flat) == jax.devices()[:data]


@pytest.mark.parametrize("data", [3, 16, 0, -2])
def test_a_mesh_that_does_not_divide_the_devices(data):
    with pytest.raises(mesh.MeshError, match=rf"mesh\.data = {data} .* 8 devices .* -1 .* 1, 2, 4, 8"):
        mesh.make_mesh(data)


def test_a_mesh_that_leaves_a_process_idle(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(mesh.MeshError, match=r"mesh\.data = 4 leaves 4 of the 8 devices of 2 processes"):
        mesh.make_mesh(4)


def test_a_batch_is_cut_by_rows_and_stays_the_same():
    m = mesh.make_mesh()
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
        assert {s.data.shape for s in batch[key].addressable_shards} == {(2, *rows.shape[1:])}
        np.testing.assert_array_equal(batch[key], rows)


def test_rows_that_do_not_divide():
    with pytest.raises(mesh.MeshError, match=r"12 rows of 'source' .* mesh\.data = 8 .* batch\.tokens"):
        mesh.global_batch(mesh.make_mesh(), {"source": np.zeros((12, 4), np.int32)})


def test_the_state_is_whole_on_every_device():
    m = mesh.make_mesh()
    abstract = jax.eval_shape(lambda: {"step": jnp.int32(0), "params": {"w": jnp.ones((8, 3))}})
    shardings = mesh.state_shardings(m, abstract)
    assert set(jax.tree.leaves(shardings)) == {mesh.replicated(m)}
    state = jax.jit(
        lambda: {"step": jnp.int32(0), "params": {"w": jnp.ones((8, 3))}}, out_shardings=shardings
    )()
    assert state["params"]["w"].is_fully_replicated
    described = mesh.with_shardings(abstract, shardings)["params"]["w"]
    assert (described.shape, described.dtype, described.sharding) == ((8, 3), jnp.float32, mesh.replicated(m))


def test_the_first_rule_that_matches_decides():
    m = mesh.make_mesh()
    abstract = {"params": {"embed": jnp.ones((8, 3)), "bias": jnp.ones(3)}}
    rules = (("params/embed", PartitionSpec("data")), ("", PartitionSpec()))
    specs = jax.tree.map(lambda s: s.spec, mesh.state_shardings(m, abstract, rules))
    assert specs == {"params": {"embed": PartitionSpec("data"), "bias": PartitionSpec()}}
    with pytest.raises(mesh.MeshError, match="params/bias"):
        mesh.state_shardings(m, abstract, rules[:1])


def test_sums_over_the_cut_batch_are_those_of_one_device():
    rows = {"x": np.random.default_rng(0).integers(0, 100, (16, 3)).astype(np.int32)}
    many, one = (mesh.global_batch(mesh.make_mesh(n), rows)["x"] for n in (8, 1))
    assert int(jax.jit(jnp.sum)(many)) == int(jax.jit(jnp.sum)(one)) == rows["x"].sum()


def test_processes_and_devices():
    assert (mesh.process_index(), mesh.process_count(), mesh.is_main()) == (0, 1, True)
    assert mesh.device_kind() == "cpu"
    assert mesh.device_memory_stats() == {}


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
