"""NVIDIA GPUs as XLA's compiler wants them described, so that it compiles for one that is not there.

What decides how a program is cut into kernels: the instruction set, how many cores there are, how much each
holds.  From NVIDIA's white papers and tuning guides of the Ampere and Hopper architectures; the clock is the
boost clock.  Memory and bandwidth are those of `chips`.

Room: pure core.  Imports chips.
"""

from __future__ import annotations

from dataclasses import dataclass

from janus_jax import chips

MOST = 8  # GPUs of one host


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    kind: str  # as jax calls the device
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared: int  # bytes of shared memory of a core
    l2: int  # bytes
    clock: float  # GHz

    def description(self) -> str:
        """A `GpuTargetConfigProto` as text.

        Raises:
          KeyError: `chips` has no figures for it.
        """
        chip = chips.find(self.kind)
        if chip is None:
            raise KeyError(self.kind)
        major, minor = self.capability
        extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              name: "{self.kind}"
              device_vendor: "NVIDIA Corporation"
              cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
              core_count: {self.cores}
              fpus_per_core: {128 if major >= 9 else 64}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {int(chip.hbm_bandwidth)}
              device_memory_size: {chip.hbm_bytes}
              l2_cache_size: {self.l2}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              driver_version: "13.0.0"
              runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.10.0"
            }}"""


GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 167936, 40 * 2**20, 1.41),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167936, 40 * 2**20, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 233472, 50 * 2**20, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 233472, 50 * 2**20, 1.98),
}
