"""A pass over the layers on a CPU: what the machine says of itself, and what was fitted to our engine's kernels.

The bandwidth is the machine's own, measured where it is at hand. The rest is in cpu_fit.json beside this file, which
scripts/fit_estimate.py measures and writes: shares of bandwidth and arithmetic that the kernels reach, what it costs to
unpack quantized weights (once for all tokens of a pass), and the fixed costs of a pass and its layers, of which a small
model's time is made. docs/estimates.md says how well this then predicts shapes that it was not fitted to.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import DeviceProfile
from .roofline import Pass, Work
from .shape import ModelShape

FILE = Path(__file__).with_name("cpu_fit.json")
_FITTED_LAUNCH_US = 3.0  # cpu.toml's launch_overhead_us: other CPUs' fixed costs are in proportion to theirs
_OTHER_MACHINE = 1.5  # how much wider the band is on a CPU that nothing was measured on


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is fitted. `layer_us`: a layer's fixed cost; `latent_us`, `mixture_us` what latent attention and a mixture
    of experts add; `lane_us` what each further sequence of a step adds to a layer. `channel_ns`: element-wise work for
    a token, layer and channel, on one core. `unpack4`, `unpack8`: operations to bring a byte of 4 (or 6) or 8 bit
    weights into registers, however many tokens then use it. `cached_speed`: how much faster than memory the last cache
    is."""

    pass_us: float
    layer_us: float
    latent_us: float
    mixture_us: float
    lane_us: float
    channel_ns: float
    bandwidth_share: float
    cached_speed: float
    int8_share: float
    fp32_share: float
    unpack4: float
    unpack8: float


@dataclass(frozen=True)
class CpuRoofline:
    """`spread`: the band is the expected time over and times this."""

    constants: Constants
    spread: float
    source: str

    def work_seconds(self, work: Work, device: DeviceProfile, shape: ModelShape, end: str = "expected") -> float:
        fitted = self.constants
        shares = {"int8": fitted.int8_share}
        peak = device.flops.get(work.precision, device.flops["fp32"]) * shares.get(work.precision, fitted.fp32_share)
        unpacking = {4: fitted.unpack4, 6: fitted.unpack4, 8: fitted.unpack8}.get(work.bits, 0.0) * work.bytes
        reading = work.bytes / (device.bandwidth_bytes_per_s * fitted.bandwidth_share)
        hit = _cached(shape, device)
        reading *= 1 - hit + hit / fitted.cached_speed
        return max(reading, (work.flops + unpacking) / peak) * self._factor(device, end)

    def pass_seconds(self, each: Pass, shape: ModelShape, device: DeviceProfile, end: str = "expected") -> float:
        fitted = self.constants
        layer_us = fitted.layer_us + fitted.latent_us * shape.latent_attention + fitted.lane_us * (each.lanes - 1)
        fixed_us = fitted.pass_us + shape.layers * layer_us + shape.moe_layers * fitted.mixture_us
        fixed_us *= device.launch_overhead_us / _FITTED_LAUNCH_US
        channels = each.tokens * shape.layers * shape.hidden_size / (device.cores or 1)
        own = 1e-6 * fixed_us + 1e-9 * channels * fitted.channel_ns
        work = sum(self.work_seconds(one, device, shape) for one in each.work)
        return (own + work) * self._factor(device, end)

    def _factor(self, device: DeviceProfile, end: str) -> float:
        spread = self.spread if device.this_machine else self.spread * _OTHER_MACHINE
        return {"slow": spread, "expected": 1.0, "fast": 1 / spread}[end]


def _cached(shape: ModelShape, device: DeviceProfile) -> float:
    """The share of a pass's reading that lies in the last cache already: all of a model that fits, none of one twice as
    large."""
    if not device.cache_bytes:
        return 0.0
    return min(1.0, max(0.0, 2 - shape.weight_bytes / device.cache_bytes))


@functools.cache
def load_fit(path: Path = FILE) -> CpuRoofline:
    """What scripts/fit_estimate.py wrote."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    given = document["constants"]
    constants = Constants(**{each.name: float(given[each.name]) for each in dataclasses.fields(Constants)})
    made = document["made"]
    source = (
        f"fitted to {made['measurements']} measurements of {made['shapes']} shapes on {made['cpu']}, {made['threads']} "
        f"threads, onnxruntime {made['onnxruntime']}, kernels {made['kernels']}, {made['date']}, root mean square "
        f"error {100 * document['error']:.0f}%; docs/estimates.md says how well it predicts other shapes"
    )
    return CpuRoofline(constants, document["spread"], source)


def spread_of(errors: list[float]) -> float:
    """The band's factor from errors of logarithms: twice their root mean square, and two fifths at least: other shapes
    are predicted less well than those that were fitted."""
    square = sum(error * error for error in errors) / len(errors)
    return max(1.4, math.exp(2 * math.sqrt(square)))
