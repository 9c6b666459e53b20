"""Rules and constraints on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from janus_jax import sharding

SHAPE = (2, 2, 2)


@pytest.fixture(scope="module")
def devices():
    return Mesh(np.array(jax.devices()).reshape(SHAPE), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/target_table", (64, 16), ("tensor", "fsdp")),
        ("opt_state/1/mu/target_table", (64, 16), ("tensor", "fsdp")),
        ("params/decoder/layers/cross/query/kernel", (6, 16, 16), (None, "fsdp", "tensor")),
        ("params/decoder/layers/cross/query/bias", (6, 16), (None, "tensor")),
        ("params/encoder/layers/attention/out/kernel", (6, 16, 16), (None, "tensor", "fsdp")),
        ("params/encoder/layers/attention/out/bias", (6, 16), ()),
        ("params/encoder/layers/ffn/fall/kernel", (6, 32, 16), (None, "tensor", "fsdp")),
        ("ema/encoder/input/positions", (128, 16), (None, "fsdp")),
        ("params/encoder/layers/ffn_norm/scale", (6, 16), ()),
        ("step", (), ()),
    ],
)
def test_rules(path, shape, spec):
    assert tuple(sharding.spec_of(path, shape)) == spec


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 4))
    assert sharding.constrain(x, sharding.ROWS) is x
    assert sharding.row_shares() == 1


def test_on_a_mesh_an_activation_lies_as_asked(devices):
    with jax.set_mesh(devices):
        assert sharding.row_shares() == 4
        found = jax.jit(lambda x: sharding.constrain(x * 2, sharding.ROWS, None, sharding.TENSOR))(
            jnp.ones((8, 3, 4))
        )
    expected = NamedSharding(devices, PartitionSpec(("data", "fsdp"), None, "tensor"))
    assert found.sharding.is_equivalent_to(expected, 3)
    np.testing.assert_array_equal(found, 2 * np.ones((8, 3, 4)))


def test_inside_a_shard_map_there_is_nothing_to_constrain(devices):
    def own(x):
        return sharding.constrain(x, sharding.ROWS) + 1

    rows = PartitionSpec(sharding.ROWS)
    each = jax.shard_map(own, mesh=devices, in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(jax.jit(each)(jnp.zeros(8)), np.ones(8))
