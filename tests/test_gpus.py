import math
import re

import pytest

from janus_jax import chips, gpus, mesh


@pytest.mark.parametrize("name", gpus.GPUS)
def test_a_description_has_the_figures_of_the_chip(name):
    gpu = gpus.GPUS[name]
    chip, text = chips.find(gpu.kind), gpu.description()
    said = dict(re.findall(r"(\w+): ([\d.]+)", text))
    assert int(said["device_memory_size"]) == chip.hbm_bytes
    assert int(said["memory_bandwidth"]) == chip.hbm_bandwidth
    assert chip.name.lower().replace(" ", "-").startswith(f"nvidia-{name.partition('-')[0]}")
    # Dense bf16 of a core a cycle: what NVIDIA publishes for the tensor cores of the generation.
    per_cycle = {8: 2048, 9: 4096}[gpu.capability[0]]
    assert math.isclose(gpu.cores * gpu.clock * 1e9 * per_cycle, chip.flops, rel_tol=0.09)


def test_a_model_without_figures_says_so():
    with pytest.raises(KeyError, match="NVIDIA T4"):
        gpus.Gpu("NVIDIA T4", (7, 5), 40, 65536, 4 * 2**20, 1.59).description()


def test_every_model_is_a_topology():
    assert all(mesh.TOPOLOGIES[name] == ("1", "2", "4", "8") for name in gpus.GPUS)
