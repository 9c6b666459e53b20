import math

import pytest

from janus_jax import chips
from janus_jax.chips import GIB, Chip, Traffic

CHIP = Chip("made up", 100e12, 16 * GIB, 1e12, 400e9, 4, 5e9)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 NVL", "NVIDIA H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 PCIe 40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
    ],
)
def test_chips_are_found_by_what_jax_calls_them(kind, name):
    assert chips.find(kind).name == name


def test_a_chip_without_figures():
    assert chips.find("cpu") is None


def test_every_figure_is_plausible():
    for chip in chips.CHIPS.values():
        assert 100e12 < chip.flops < 2e15
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth < chip.flops / 50
        assert chip.links in (1, 4, 6)


def test_the_roofline_of_one_chip():
    found = chips.roofline(CHIP, flops=1e12, hbm=3e10, traffic=[], slice_chips=1)
    assert (found.compute, found.memory, found.ici, found.dcn) == (0.01, 0.03, 0, 0)
    assert found.bound == "memory"
    assert found.overlapped == found.serial == 0.03


def test_networks():
    whole = Traffic(bytes=4e9, group=16, times=2, crosses=False)  # all four links, both dimensions
    part = Traffic(bytes=4e9, group=4, times=1, crosses=False)  # the two links of one dimension
    far = Traffic(bytes=5e8, group=2, times=3, crosses=True)
    found = chips.roofline(CHIP, flops=1e12, hbm=0, traffic=[whole, part, far], slice_chips=16)
    hops = 2 * 4e-6 + 2e-6
    assert math.isclose(found.ici, 2 * 0.01 + 0.02 + hops)
    assert math.isclose(found.dcn, 3 * (0.1 + chips.DCN_SECONDS))
    assert found.bound == "dcn"
    assert math.isclose(found.serial, 0.01 + found.ici + found.dcn)


def test_on_a_gpu_nothing_overlaps():
    found = chips.roofline(CHIP, flops=1e12, hbm=3e10, traffic=[], slice_chips=1, launches=(1000, 500))
    assert math.isclose(found.launches, 1000 * chips.KERNEL_SECONDS + 500 * chips.WAIT_SECONDS)
    assert math.isclose(found.serial, 0.01 + 0.03 + found.launches)
    assert found.overlapped == 0.03
    assert found.bound == "memory"
    small = chips.roofline(CHIP, flops=1e6, hbm=1e6, traffic=[], slice_chips=1, launches=(1000, 0))
    assert small.bound == "launches"


def test_behind_a_switch_every_group_has_the_whole_bandwidth():
    gpu = Chip("made up", 1e15, 80 * GIB, 3e12, 400e9, 1, 50e9)
    found = chips.roofline(gpu, flops=0, hbm=0, traffic=[Traffic(4e9, 2, 1, False)], slice_chips=8)
    assert math.isclose(found.ici, 0.01 + chips.HOP_SECONDS)
