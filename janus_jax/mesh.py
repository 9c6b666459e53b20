"""Devices: the mesh, how arrays lie on it, and what there is to know about the machine.

One axis, `data`: every device holds all parameters and a share of the rows of each batch.  How a parameter
lies is decided by the first matching rule of a table (path pattern -> PartitionSpec), outside the model, so
that further axes are rows of that table.

Room: devices; the only one that asks jax for devices or process numbers.  Imports nothing of ours.
Letters: B rows of the global batch, b rows that this process holds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any  # a pytree
Rule = tuple[str, PartitionSpec]  # pattern searched in "params/encoder/...", and how such an array lies

DATA = "data"
REPLICATED: tuple[Rule, ...] = (("", PartitionSpec()),)


class MeshError(ValueError):
    """Devices or batches that do not divide; the message names the key, both numbers and the remedy."""


def make_mesh(data: int = -1) -> Mesh:
    """A mesh of `data` replicas on the axis `data`.

    Args:
      data: config key mesh.data; -1 means all devices.  Fewer than all is for one process only, which then
        leaves the other devices idle.

    Raises:
      MeshError: `data` does not divide the devices, or leaves another process without work.
    """
    devices = jax.devices()
    count = len(devices)
    used = count if data == -1 else data
    if used < 1 or count % used:
        raise MeshError(
            f"mesh.data = {data} does not divide the {count} devices here; "
            f"set it to -1 (all) or one of {', '.join(map(str, _divisors(count)))}"
        )
    if used < count and jax.process_count() > 1:
        raise MeshError(
            f"mesh.data = {data} leaves {count - used} of the {count} devices of {jax.process_count()} "
            f"processes without work; set it to -1 or {count}"
        )
    return jax.make_mesh((used,), (DATA,), axis_types=(AxisType.Auto,), devices=devices[:used])


def data_parallelism(mesh: Mesh) -> int:
    """How many shares a batch is cut into."""
    return mesh.shape[DATA]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (rows) cut over `data`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def state_shardings(mesh: Mesh, abstract_state: Tree, rules: Sequence[Rule] = REPLICATED) -> Tree:
    """A sharding for each array of a training state.

    Args:
      mesh: where to.
      abstract_state: pytree of anything with a shape, as `jax.eval_shape` returns it.
      rules: the first whose pattern is found in the array's path ("params/encoder/...") decides.

    Raises:
      MeshError: an array that no rule matches.
    """

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, spec)
        raise MeshError(f"no sharding rule matches {name!r}; add one to the table")

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def with_shardings(abstract_state: Tree, shardings: Tree) -> Tree:
    """`abstract_state` as ShapeDtypeStructs that carry `shardings`: what restoring a checkpoint asks for."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_state,
        shardings,
    )


def global_batch(mesh: Mesh, host_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The whole batch [B, ...] on the mesh, from each process's own rows [b, ...].

    Raises:
      MeshError: the rows do not divide over the devices.
    """
    sharding, shares = batch_sharding(mesh), data_parallelism(mesh)
    for key, rows in host_batch.items():
        total = rows.shape[0] * jax.process_count()
        if total % shares:
            raise MeshError(
                f"the {total} rows of {key!r} do not divide over mesh.data = {shares} devices; choose "
                f"batch.tokens so that every bucket gets a multiple of {shares} rows, or fewer devices"
            )
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in host_batch.items()}


def process_index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """How many processes run together."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process is the one that prints and writes reports."""
    return jax.process_index() == 0


def device_kind() -> str:
    """What the devices are called, such as "cpu", "NVIDIA H200" or "TPU v5 lite"."""
    return jax.devices()[0].device_kind


def device_memory_stats() -> dict[str, int]:
    """Bytes in use, at the peak, and available: the fullest of this process's devices.

    Returns:
      {"bytes_in_use", "peak_bytes_in_use", "bytes_limit"} where the backend tells; empty on CPU.
    """
    names = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")
    stats = [s for d in jax.local_devices() if (s := d.memory_stats())]
    return {n: max(s[n] for s in stats) for n in names if stats and all(n in s for s in stats)}


def set_compilation_cache(folder: str | os.PathLike[str]) -> None:
    """Keeps every compiled program in `folder`, so that a restart does not compile again."""
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # else a cache opened by an earlier compilation stays in use


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
