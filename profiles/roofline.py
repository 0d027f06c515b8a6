"""How long a pass over the layers takes on a device: a roofline for each kind of operation, and what comes on top.

Each operation takes the longer of its bytes over the bandwidth and its arithmetic over the peak (Williams, Waterman and
Patterson, Roofline, CACM 52(4), 2009). What share of a device's figures is reached is assumed, once, with a band. CPUs
have a file of their own: roofline_cpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .device import DeviceProfile
from .shape import ModelShape

ENDS = ("slow", "expected", "fast")


@dataclass(frozen=True)
class Work:
    """One kind of operation over all layers: bytes read, operations done, and the precision they are done in.

    `bits`: of a stored weight, 0 where it is none or no integer.
    """

    name: str
    bytes: float
    flops: float
    precision: str
    bits: int = 0


@dataclass(frozen=True)
class Pass:
    """One run over all layers: its work, the tokens that go through, and the sequences that they are of."""

    work: Sequence[Work]
    tokens: int
    lanes: int = 1


class Roofline(Protocol):
    """What a kind of device makes of work, at one end of the assumed band (`slow`, `expected`, `fast`)."""

    @property
    def source(self) -> str:
        """Where its assumptions are from."""

    def work_seconds(self, work: Work, device: DeviceProfile, shape: ModelShape, end: str = "expected") -> float:
        """One kind of operation by itself."""

    def pass_seconds(self, each: Pass, shape: ModelShape, device: DeviceProfile, end: str = "expected") -> float:
        """A whole pass."""


@dataclass(frozen=True)
class Band:
    """An assumed figure: what is expected, and the ends between which the truth is thought to lie (slow to fast)."""

    slow: float
    expected: float
    fast: float

    def at(self, end: str) -> float:
        value: float = getattr(self, end)
        return value


@dataclass(frozen=True, kw_only=True)
class GpuRoofline:
    """What share of its bandwidth and arithmetic a GPU reaches, and what its kernels cost beside them.

    A gap between kernels that depend on one another bounds small models; where no CUDA graph is captured so does the
    host's pace of launching them (`host_launch_us`, 0 where they are captured). `pass_overhead_us`: binding,
    synchronizing, copying logits.
    """

    bandwidth_share: Band
    flops_share: Band
    kernels_per_layer: Band
    host_launch_us: Band
    pass_overhead_us: Band
    source: str

    def work_seconds(self, work: Work, device: DeviceProfile, shape: ModelShape, end: str = "expected") -> float:
        peak = device.flops.get(work.precision, device.flops["fp32"])
        return max(
            work.bytes / (device.bandwidth_bytes_per_s * self.bandwidth_share.at(end)),
            work.flops / (peak * self.flops_share.at(end)),
        )

    def pass_seconds(self, each: Pass, shape: ModelShape, device: DeviceProfile, end: str = "expected") -> float:
        kernels = self.kernels_per_layer.at(end) * shape.layers
        busy = sum(self.work_seconds(work, device, shape, end) for work in each.work)
        busy += kernels * device.launch_overhead_us * 1e-6
        launching = kernels * self.host_launch_us.at(end) * 1e-6
        return max(busy, launching) + self.pass_overhead_us.at(end) * 1e-6


GPU = GpuRoofline(
    bandwidth_share=Band(0.30, 0.60, 0.85),
    flops_share=Band(0.15, 0.40, 0.70),
    kernels_per_layer=Band(28, 14, 10),
    host_launch_us=Band(10, 5, 0),
    pass_overhead_us=Band(200, 60, 20),
    source="assumed, not measured: chosen so that published decode rates (tokens/s) of Qwen3-30B-A3B on an RTX 4090 "
    "(196), on Jetson Thor (81) and of DeepSeek-V2-Lite on an RTX 3090 (180) lie in the band; those are other engines",
)
# The same chips in small, behind a processor that launches at half the pace.
JETSON = replace(GPU, host_launch_us=Band(20, 10, 0), pass_overhead_us=Band(500, 150, 50))
