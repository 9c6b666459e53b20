"""How arrays lie on the axes of a mesh: the names of the axes, the rules, the constraints.

  data     replicas: each computes its own rows of a batch; across slices first
  fsdp     more of the same for rows; parameters and optimiser state are cut over it as well
  tensor   one row is computed by several devices: heads, ffn width and vocabulary are cut over it

A parameter's place follows from its path alone, by the first rule that matches; no model code names
a device.  Inside a jitted function `constrain` says how an activation lies: without it the compiler
may guess, and compute something whole on every device.  Outside a mesh it does nothing.

Room: pure core.  Imports nothing of ours; reads the mesh that the caller has set (`jax.set_mesh`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
ROWS = (DATA, FSDP)  # what the rows of a batch are cut over

Rule = tuple[str, tuple[str | None, ...]]  # pattern searched in "params/encoder/...", axes of the last dims

# Matrices are cut over `tensor` along what heads, ffn or vocabulary are, and over `fsdp` along D.  What no
# rule names (layer norms, the bias of a map back to D, counters) is small and lies whole on every device.
RULES: tuple[Rule, ...] = (
    (r"(target|source|output)_table$", (TENSOR, FSDP)),  # [V, D]
    (r"output_bias$", (TENSOR,)),  # [V]
    (r"(length_table|positions)$", (None, FSDP)),  # [C or P, D]
    (r"(query|key|value|rise)/kernel$", (FSDP, TENSOR)),  # [L, D, H K or F]
    (r"(query|key|value|rise)/bias$", (TENSOR,)),  # [L, H K or F]
    (r"(out|fall)/kernel$", (TENSOR, FSDP)),  # [L, H K or F, D]
)


def spec_of(path: str, shape: Sequence[int], rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """How the array at `path` lies; a rule speaks of its last dimensions, the others are not cut."""
    for pattern, axes in rules:
        if re.search(pattern, path):
            return PartitionSpec(*[None] * (len(shape) - len(axes)), *axes)
    return PartitionSpec()


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its dimensions laid over these axes, of the mesh that is set; as it is where none is.

    Axes of the last dimensions that are left out are not cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = AxisType.Manual in mesh.axis_types  # inside a shard_map everything lies where it lies
    if mesh.empty or mesh.size == 1 or manual:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def row_shares() -> int:
    """Over how many devices the rows of a batch are cut, on the mesh that is set; 1 where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROWS)
