"""A model over several devices of one kind, where one does not hold it: an estimate on top of an estimate.

The layers are split over the devices and a token goes through them one after the other (pipeline), which needs no fast
link: a stream's latency is that of one device large enough, plus a hand-over between neighbours. As many streams as
devices can be under way at once, and then all devices are busy. Tensor parallel links would be quicker for one stream;
nothing is assumed of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .device import DeviceProfile
from .estimate import estimate
from .fit import PREFILL_CHUNK, check_fit
from .roofline import Band
from .shape import ModelShape

# Between neighbours: a latency, and activations in fp16 over PCI Express 4.0 x8. Assumptions.
HAND_OVER_S = Band(100e-6, 30e-6, 10e-6)
LINK_BYTES_PER_S = 16e9
SOURCE = "layers split over the devices, one hand-over of 10 to 100 us between neighbours; assumed, not measured"


def devices_needed(manifest: Mapping[str, Any], device: DeviceProfile, batch: int, max_seq_len: int) -> int | None:
    """The fewest devices that hold the model, its layers split as evenly as whole layers allow; None: not even one a
    layer is enough."""
    shape = ModelShape.from_manifest(manifest).on(device.target)
    fit = check_fit(manifest, device, batch, max_seq_len)
    if fit.fits:
        return 1
    ends = max(shape.sizes.get("embedding", 0), shape.sizes.get("head", 0))
    inner = fit.weight_bytes - shape.sizes.get("embedding", 0) - shape.sizes.get("head", 0) + fit.cache_bytes
    fixed = ends + fit.workspace_bytes + fit.runtime_bytes
    for count in range(2, shape.layers + 1):
        layers = -(-shape.layers // count)
        if fixed + inner * layers / shape.layers <= device.available_bytes:
            return count
    return None


def estimate_devices(
    manifest: Mapping[str, Any],
    device: DeviceProfile,
    count: int,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
) -> dict[str, Any]:
    """`estimate` for `count` devices together; added: `devices`, `usd_per_hour`, and `usd_per_million_tokens` of one
    stream beside `usd_per_million_tokens_busy` of as many streams as devices.

    Raises what `estimate` raises.
    """
    together = dataclasses.replace(
        device,
        memory_bytes=count * device.memory_bytes,
        memory_reserved_bytes=count * device.memory_reserved_bytes,
    )
    result = estimate(manifest, together, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
    shape = ModelShape.from_manifest(manifest)
    chunks = batch * -(-prompt_tokens // PREFILL_CHUNK)
    _add(result["itl_ms"], count, 1, 2 * batch * shape.hidden_size)
    _add(result["ttft_ms"], count, chunks, 2 * shape.hidden_size * min(prompt_tokens, PREFILL_CHUNK))
    rate = batch / (result["itl_ms"]["p50"] / 1e3)
    price = None if device.price_usd_per_hour is None else count * device.price_usd_per_hour
    one = None if price is None else price / (rate * 3600) * 1e6
    reached = result["bytes_per_token"] * rate / batch
    return result | {
        "device": device.title if count == 1 else f"{count} x {device.title}",
        "devices": count,
        "prefill_tokens_per_s": batch * prompt_tokens / (result["ttft_ms"]["p50"] / 1e3),
        "decode_tokens_per_s": rate,
        "bandwidth_bytes_per_s": reached,
        "fraction_of_limit": reached / device.bandwidth_bytes_per_s,
        "usd_per_hour": price,
        "usd_per_million_tokens": one,
        "usd_per_million_tokens_busy": None if one is None else one / count,
        "assumptions": result["assumptions"] if count == 1 else f"{result['assumptions']}; {SOURCE}",
    }


def _add(times: dict[str, Any], devices: int, passes: int, size: float) -> None:
    """Add the hand-overs of `passes` passes, `size` bytes each, in milliseconds."""
    for key, end in (("low", "fast"), ("p50", "expected"), ("high", "slow")):
        times[key] += 1e3 * passes * (devices - 1) * (HAND_OVER_S.at(end) + size / LINK_BYTES_PER_S)
