"""The GPUs that kernels are compiled for, and one of each by its data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from fused.kernels.tuning.rules import Device
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """An architecture, and the figures of one GPU that has it, all of them peaks.

    `lanes`: instructions of single threads that a processor issues in a clock. `special`: issue
    slots that a special function (exponential, reciprocal, root) takes, its pipe being that much
    narrower: 16 results a clock and processor on all of these.
    """

    target: GPUTarget
    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s
    lanes: int
    source: str

    @property
    def special(self) -> float:
        return self.lanes / 16

    @property
    def issue(self) -> float:
        """Instructions of single threads a second."""
        return self.processors * self.lanes * self.clock

    @property
    def device(self) -> Device:
        """What the tuning rules know of it."""
        arch = self.target.arch if self.target.backend == "cuda" else 0
        return Device(self.processors, self.target.warp_size, arch)


def _nvidia(arch: int, name: str, processors: int, ghz: float, gb: float, source: str) -> Gpu:
    # Four schedulers of 32 threads; special functions: CUDA C++ Programming Guide, throughput of
    # native arithmetic instructions.
    return Gpu(GPUTarget("cuda", arch, 32), name, processors, ghz * 1e9, gb * 1e9, 128, source)


# Clocks are boost clocks, the highest: under load a GPU runs slower and has less headroom.
TARGETS = {
    "sm_80": _nvidia(80, "A100 80GB SXM", 108, 1.41, 2039, "NVIDIA A100 data sheet, GA100 paper"),
    # 67 TFLOPS of float32 are 132 SMs x 128 lanes x 2 operations x 1.98 GHz.
    "sm_90": _nvidia(90, "H100 SXM", 132, 1.98, 3350, "NVIDIA H100 data sheet"),
    # 75 TFLOPS of float32 are 148 SMs at 1.98 GHz.
    "sm_100": _nvidia(100, "B200", 148, 1.98, 7700, "NVIDIA HGX B200 data sheet"),
    "sm_120": _nvidia(120, "RTX 5090", 170, 2.407, 1792, "NVIDIA RTX Blackwell paper"),
    # Four SIMDs of 16 lanes; scalar instructions are issued beside the vector ones.
    "gfx942": Gpu(
        GPUTarget("hip", "gfx942", 64), "MI300X", 304, 2.1e9, 5.3e12, 64,
        "AMD Instinct MI300X data sheet",
    ),
}  # fmt: skip
