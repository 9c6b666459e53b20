"""Devices: the mesh, how arrays lie on it, and what there is to know about the machine.

The axes of the mesh and the rules of what is cut over which are in `sharding`; here they meet devices.

Room: devices; the only one besides processes that asks jax for devices.  Imports sharding and config.
Letters: B rows of the global batch.
"""

from __future__ import annotations

import difflib
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from janus_jax import gpus, sharding
from janus_jax.config import MeshConfig

Tree = Any  # a pytree
PORTABLE = {"ONEDNN_MAX_CPU_ISA": "AVX2", "NPROC": "2"}  # NPROC: XLA's threads, each with a share of a sum
PORTABLE_FLAGS = ("--xla_cpu_max_isa=AVX2", "--xla_cpu_enable_platform_dependent_math=false")


class MeshError(ValueError):
    """Devices or batches that do not divide; the message names the key, both numbers and the remedy."""


class Part(NamedTuple):
    """Which shares of the rows of every batch a process has to bring: `mine`, counted from 0, of `of`."""

    mine: tuple[int, ...]
    of: int


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of data x fsdp x tensor devices.

    `data` reaches across slices (groups of devices with a fast network among themselves) where there are
    several, so that fsdp and tensor, which exchange more, stay inside one.

    Args:
      config: sizes of the axes; data = -1 takes what the others leave.  Fewer than all devices is for one
        process only, which then leaves the others idle.
      devices: which; default all devices of all processes.

    Raises:
      MeshError: the sizes do not divide the devices, leave another process without work, or would cut fsdp
        or tensor across slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, inner = len(devices), config.fsdp * config.tensor
    if count % inner:
        raise MeshError(
            f"mesh.fsdp x mesh.tensor = {config.fsdp} x {config.tensor} = {inner} does not divide the "
            f"{count} devices here; choose a product among {_listed(_divisors(count))}"
        )
    data = count // inner if config.data == -1 else config.data
    used = data * inner
    if data < 1 or count % used:
        allowed = _divisors(count // inner)
        raise MeshError(
            f"mesh.data = {config.data}{f' x {inner} (fsdp x tensor)' if inner > 1 else ''} does not divide "
            f"the {count} devices here; set it to -1 (all) or one of {_listed(allowed)}"
        )
    if used < count and len({d.process_index for d in devices}) > 1:
        raise MeshError(
            f"mesh.data = {config.data} leaves {count - used} of the {count} devices of "
            f"{len({d.process_index for d in devices})} processes without work; set it to -1 or "
            f"{count // inner}"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    shape = (data, config.fsdp, config.tensor)
    if used < count or slices == 1:
        laid = mesh_utils.create_device_mesh(shape, devices[:used], allow_split_physical_axes=True)
    elif data % slices:
        raise MeshError(
            f"mesh.data = {data} does not divide over the {slices} slices, so that mesh.fsdp or mesh.tensor "
            f"would reach across; lower mesh.fsdp x mesh.tensor ({inner}) to at most {count // slices}"
        )
    else:
        laid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *shape[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(laid, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def local_mesh(config: MeshConfig) -> Mesh:
    """As many of this process's devices as `config` has in all (data = -1: every one), on the axis `data`.

    Decoding needs no more: parameters fit on one device, and sentences need nothing of each other.  So a run
    decodes anywhere, however many devices it was trained on.
    """
    most = config.data * config.fsdp * config.tensor if config.data != -1 else None
    devices = np.array(jax.local_devices()[:most]).reshape(-1, 1, 1)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def on_each_device(
    function: Callable[..., Any], mesh: Mesh, in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """`function` computed by every device on its own part of the arguments, without communication.

    Args:
      function: of arrays.
      mesh: the devices.
      in_axes: a PartitionSpec (or a tree of them) for each argument.
      out_axes: the same for the results.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_axes, out_specs=out_axes, check_vma=False)


def row_shares(mesh: Mesh) -> int:
    """How many shares the rows of a batch are cut into."""
    return math.prod(mesh.shape[axis] for axis in sharding.ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis (rows) cut over `data` and `fsdp`, the others whole."""
    return NamedSharding(mesh, PartitionSpec(sharding.ROWS))


def state_shardings(
    mesh: Mesh, abstract_state: Tree, rules: Sequence[sharding.Rule] = sharding.RULES
) -> Tree:
    """A sharding for each array of a training state (or of parameters), by the rules of `sharding`.

    Args:
      mesh: where to.
      abstract_state: pytree of anything with a shape, as `jax.eval_shape` returns it.
      rules: which axes cut what.

    Raises:
      MeshError: a rule cuts a dimension that its axis does not divide.
    """

    def place(path: tuple[Any, ...], array: Any) -> NamedSharding:
        name = _path(path)
        spec = sharding.spec_of(name, array.shape, rules)
        for dimension, (size, axis) in enumerate(zip(array.shape, tuple(spec), strict=False)):
            if axis is not None and size % mesh.shape[axis]:
                raise MeshError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide dimension {dimension} of {name}, "
                    f"{tuple(array.shape)}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def sharding_table(abstract: Tree, shardings: Tree) -> list[tuple[str, str, str, int]]:
    """(path, shape and type, axes of each dimension, bytes on each device) of every array, in order."""
    rows = []
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    for (path, array), laid in zip(leaves, jax.tree.leaves(shardings), strict=True):
        axes = ", ".join("-" if axis is None else str(axis) for axis in laid.spec) or "whole"
        size = math.prod(laid.shard_shape(array.shape)) * np.dtype(array.dtype).itemsize
        shape = "x".join(map(str, array.shape)) or "scalar"
        rows.append((_path(path), f"{np.dtype(array.dtype).name} {shape}", axes, size))
    return rows


def with_shardings(abstract_state: Tree, shardings: Tree) -> Tree:
    """`abstract_state` as ShapeDtypeStructs that carry `shardings`: what restoring a checkpoint asks for."""
    return jax.tree.map(
        lambda x, laid: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=laid), abstract_state, shardings
    )


def part_of(mesh: Mesh) -> Part:
    """The shares of rows that the devices of this process compute.

    Processes whose devices compute the same rows (they differ in `tensor` alone) have the same share.
    """
    shares = row_shares(mesh)
    owned = batch_sharding(mesh).addressable_devices_indices_map((shares,))
    return Part(tuple(sorted({rows[0].indices(shares)[0] for rows in owned.values() if rows})), shares)


def global_batch(mesh: Mesh, host_batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """The whole batch [B, ...] on the mesh, from the rows that `part_of` says, one share after the other.

    Raises:
      MeshError: the rows do not divide over the devices.
    """
    part, laid = part_of(mesh), batch_sharding(mesh)

    def place(key: str, rows: np.ndarray) -> jax.Array:
        if len(rows) % len(part.mine):
            raise MeshError(
                f"the {len(rows)} rows of {key!r} do not divide over {len(part.mine)} devices; choose "
                f"a multiple of {len(part.mine)} rows, or fewer devices (mesh.data)"
            )
        size = len(rows) // len(part.mine)
        whole = (size * part.of, *rows.shape[1:])

        def shard(index: Any) -> np.ndarray:
            share = index[0].indices(whole[0])[0] // size
            at = part.mine.index(share) * size
            return rows[at : at + size]

        return jax.make_array_from_callback(whole, laid, shard)

    return {key: place(key, rows) for key, rows in host_batch.items()}


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def ask_for_portable_numbers() -> None:
    """Has x86-64 processors with AVX2 compute the same numbers to the last digit, as far as XLA can be told.

    Left alone, XLA and its libraries take what they find: wider instructions, the processor's own estimate of
    1 / sqrt(x), a share of each sum for every core, and each has other last digits.  What cannot be told:
    long sums come in blocks by the size of the caches (docs/parity.md).  Call it before jax starts its
    devices, as they read this once.  What the environment says of the same already, stays.  Elsewhere than on
    x86-64 it does nothing.
    """
    if platform.machine() != "x86_64":
        return
    for name, value in PORTABLE.items():
        os.environ.setdefault(name, value)
    given = os.environ.get("XLA_FLAGS", "")
    wanted = (flag for flag in PORTABLE_FLAGS if flag.partition("=")[0] not in given)
    os.environ["XLA_FLAGS"] = " ".join((given, *wanted)).strip()


def check_devices() -> None:
    """Raises MeshError where jax cannot start what JAX_PLATFORMS asks for.

    Call it before anything else needs devices, and after processes have joined.
    """
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the latter, without a word, where its package is missing
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS=")[0].rstrip(".")
        if reason and "initialize backend" not in reason:
            raise  # the loss of another process, for one
        raise MeshError(
            f"jax cannot start JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: "
            f"{reason or 'its package is not installed'}; install what it needs (for cuda: pip install "
            "'janus-jax[cuda]'), or choose another, such as JAX_PLATFORMS=cpu"
        ) from error


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


# Shapes of slices that Cloud TPU offers; other products work as well.
_PLANES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_HOSTS = tuple(str(2**n) for n in range(gpus.MOST.bit_length()))
TOPOLOGIES = {"v4": _CUBES, "v5e": _PLANES, "v5p": _CUBES, "v6e": _PLANES, **dict.fromkeys(gpus.GPUS, _HOSTS)}


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Descriptions of devices that need not be here: to compile for, not to run on.

    Args:
      name: of TPUs, generation and shape of one slice, such as "v5e:16x16" or "v4:4x4x8"; of GPUs, model and
        how many of them a host has, such as "h200:8".
      slices: how many slices, or hosts.

    Raises:
      MeshError: no such topology, or libtpu, or jax's plugin for CUDA, which hold the compilers, is not
        installed.
    """
    chip, _, shape = name.partition(":")
    form = r"[1-8]" if chip in gpus.GPUS else r"\d+(x\d+){1,2}"
    if chip not in TOPOLOGIES or not re.fullmatch(form, shape):
        near = difflib.get_close_matches(
            name, [f"{c}:{s}" for c, all_ in TOPOLOGIES.items() for s in all_], 1
        )
        raise MeshError(
            f"there is no topology {name!r}{f'; did you mean {near[0]!r}?' if near else ''}  Write "
            "GENERATION:SHAPE, " + ", or ".join(f"{c}:{{{','.join(TOPOLOGIES[c])}}}" for c in TOPOLOGIES)
        )
    # Without these, the compilers look for the machine that they are on, and complain when there is none.
    for key, value in _NO_DEVICE_HERE.items():
        os.environ.setdefault(key, value)
    # A program for absent devices cannot be read back from the cache: jax warns, and compiles again.
    jax.config.update("jax_enable_compilation_cache", False)
    return _gpus(chip, shape, slices) if chip in gpus.GPUS else _tpus(chip, name, slices)


def _tpus(chip: str, name: str, slices: int) -> list[Any]:
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on the machines themselves
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:
        if "not installed" in str(error) or isinstance(error, ImportError):
            raise MeshError(
                "compiling for TPUs needs libtpu, which is not installed: pip install 'janus-jax[tpu]'"
            ) from error
        reason = str(error).partition("\n")[0]
        if "INVALID_ARGUMENT" in reason:
            shapes = ", ".join(TOPOLOGIES[chip])
            raise MeshError(f"{name!r} is no slice of {chip}: {reason}; choose one of {shapes}") from error
        raise MeshError(f"libtpu cannot describe {name!r}: {reason}") from error


def _gpus(model: str, count: str, hosts: int) -> list[Any]:
    described = gpus.GPUS[model].description()
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=described, topology=f"{hosts}x1x{count}"
        )
    except NotImplementedError as error:
        raise MeshError(
            "compiling for NVIDIA GPUs needs jax's plugin for CUDA, which is not installed: "
            "pip install 'janus-jax[compilers]'"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise MeshError(f"jax's plugin for CUDA cannot describe {model}:{count}: {reason}") from error
    return list(found.devices)


_NO_DEVICE_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so none needs to be locked
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it asks the driver
    "TF_CPP_MIN_LOG_LEVEL": "2",  # the plugin says that there is no driver
}
