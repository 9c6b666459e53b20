"""Figures of accelerator chips, and the roofline: what bounds a program, and how long it takes at least.

The table holds what the makers publish; nothing in it is measured by us, and no program reaches all of it.
What a kernel of a GPU and a wait of its host take, no maker publishes: both are fitted to what an H200 took
for decoding one sentence (docs/performance.md, "Kernels"), and taken for every GPU.
The peak is that of bf16, which is also what jax multiplies float32 in by default on a TPU.

TPU figures: the "System architecture" pages of the Cloud TPU documentation
(https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; read in 2026).  They state inter-chip bandwidth in
both directions together: half of it is what a chip can send.  Data-centre bandwidth per chip is the
network cards of a host over its chips (v5e: 2 x 100 Gbit/s for 8 chips; v6e: 4 x 200 Gbit/s for 8; v5p: 50
Gbit/s per chip).  For v4 none is published: v5e's is assumed.
GPU figures: NVIDIA's data sheets of A100 (40GB, 80GB; SXM, PCIe), H100 (SXM, PCIe, NVL) and H200 SXM (dense
bf16, NVLink one way, on PCIe cards through a bridge), with one 400 Gbit/s card per GPU between hosts
(A100: 200).

Room: pure core.  Imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

GIB = 2**30
HOP_SECONDS = 1e-6  # from one chip to its neighbour; about a microsecond on every generation
DCN_SECONDS = 5e-5  # one exchange between hosts of two slices: an assumption, not a published figure
KERNEL_SECONDS = 1.4e-6  # a kernel of a GPU, however little it computes
WAIT_SECONDS = 2.4e-5  # the host of a GPU looks at what a loop or a branch is to do next


@dataclass(frozen=True)
class Chip:
    """One chip (one JAX device): its peaks and links."""

    name: str
    flops: float  # bf16 FLOP/s, dense
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that it can send to other chips of its slice (GPUs: of its host)
    links: int  # of the torus: 4 in two dimensions, 6 in three; 1 behind a switch
    dcn_bandwidth: float  # bytes/s that it can send to another slice (GPUs: another host)
    measured: bool = False  # not from the table but found out on the machine itself


# The key is the prefix of jax's device_kind, in lower case.
CHIPS: dict[str, Chip] = {
    "tpu v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, 6, 3.125e9),
    "tpu v5 lite": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 4, 3.125e9),
    "tpu v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 4, 3.125e9),
    "tpu v5": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 600e9, 6, 6.25e9),
    "tpu v6 lite": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 400e9, 4, 12.5e9),
    "tpu v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 400e9, 4, 12.5e9),
    "nvidia a100-sxm4-40gb": Chip("NVIDIA A100 40GB", 312e12, 40 * GIB, 1555e9, 300e9, 1, 25e9),
    "nvidia a100-pcie-40gb": Chip("NVIDIA A100 PCIe 40GB", 312e12, 40 * GIB, 1555e9, 300e9, 1, 25e9),
    "nvidia a100 80gb pcie": Chip("NVIDIA A100 PCIe 80GB", 312e12, 80 * GIB, 1935e9, 300e9, 1, 25e9),
    "nvidia a100": Chip("NVIDIA A100 80GB", 312e12, 80 * GIB, 2039e9, 300e9, 1, 25e9),
    "nvidia h100": Chip("NVIDIA H100", 989e12, 80 * GIB, 3350e9, 450e9, 1, 50e9),
    "nvidia h100 pcie": Chip("NVIDIA H100 PCIe", 756e12, 80 * GIB, 2000e9, 300e9, 1, 50e9),
    "nvidia h100 nvl": Chip("NVIDIA H100 NVL", 835e12, 94 * 10**9, 3938e9, 300e9, 1, 50e9),
    "nvidia h200": Chip("NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, 1, 50e9),
}


def find(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, or None where the table has no figures."""
    names = [k for k in CHIPS if device_kind.lower().startswith(k)]
    return CHIPS[max(names, key=len)] if names else None


@dataclass(frozen=True)
class Traffic:
    """One collective as the links see it."""

    bytes: float  # that each chip sends, each time
    group: int  # chips that take part together
    times: float
    crosses: bool  # slices


@dataclass(frozen=True)
class Roofline:
    """Seconds that a program needs at least, by what it uses; all per run of it, on each chip.

    `launches`: what a GPU takes for the number of its kernels and waits alone; None on other chips.
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    launches: float | None = None

    @property
    def bound(self) -> str:
        """What takes longest: compute, memory, ici, dcn or launches."""
        parts = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return max(parts, key=lambda k: parts[k])

    @property
    def overlapped(self) -> float:
        """Seconds if everything overlapped with everything: no program is faster."""
        return max(self.compute, self.memory, self.ici, self.dcn, self.launches or 0.0)

    @property
    def serial(self) -> float:
        """Seconds if communication overlapped with nothing: what we predict, on the careful side.

        On a GPU nothing overlaps: one kernel multiplies, the next one moves memory.
        """
        if self.launches is None:
            return max(self.compute, self.memory) + self.ici + self.dcn
        return self.compute + self.memory + self.launches + self.ici + self.dcn


def roofline(
    chip: Chip,
    *,
    flops: float,
    hbm: float,
    traffic: Iterable[Traffic],
    slice_chips: int,
    launches: tuple[float, float] | None = None,
) -> Roofline:
    """The times of a program.

    Args:
      chip: its figures.
      flops: of one run, on each chip.
      hbm: bytes read from and written to main memory, on each chip.
      traffic: what is exchanged.
      slice_chips: chips of one slice.
      launches: of a GPU's program: kernels, and waits of the host.
    """
    ici = dcn = 0.0
    for t in traffic:
        if t.crosses:
            dcn += t.times * (t.bytes / chip.dcn_bandwidth + DCN_SECONDS)
        else:
            seconds = t.bytes / _bandwidth(chip, t.group, slice_chips)
            ici += t.times * (seconds + _latency(chip, t.group, slice_chips))
    queue = None if launches is None else launches[0] * KERNEL_SECONDS + launches[1] * WAIT_SECONDS
    return Roofline(flops / chip.flops, hbm / chip.hbm_bandwidth, ici, dcn, queue)


def _bandwidth(chip: Chip, group: int, slice_chips: int) -> float:
    """Bytes/s that a chip sends in a collective of `group` chips.

    The whole slice uses every link.  A smaller group lies along one dimension of the torus and uses the two
    links of that dimension.
    """
    if chip.links == 1 or group >= slice_chips:
        return chip.ici_bandwidth
    return chip.ici_bandwidth * 2 / chip.links


def _latency(chip: Chip, group: int, slice_chips: int) -> float:
    """Seconds until the farthest chip of a group is reached: half a ring in each dimension it spans."""
    if chip.links == 1:
        return HOP_SECONDS
    dimensions = chip.links // 2 if group >= slice_chips else 1
    return HOP_SECONDS * dimensions * max(1, math.ceil(group ** (1 / dimensions) / 2))
