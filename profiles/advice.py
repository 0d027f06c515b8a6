"""What to change when a model does not fit a device: fewer bits, shorter context, smaller batch.

Each change alone where it is enough, else two together, else all three. Everything that is advised was asked of the
fit check that failed, so that it is what that check then finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..export.options import usual_head
from .shape import ModelShape, has_own_kernels, widens_scales

# Bits of one weight with its group's scale, fp32, of 6 bits fp16, of 4 a byte, and its zero point, by dtype; `group` is
# the group size.
_BITS: dict[str, Callable[[int], float]] = {
    "float32": lambda group: 32.0,
    "float16": lambda group: 16.0,
    "bfloat16": lambda group: 16.0,
    "uint8": lambda group: 8.0 + 40.0 / group,
    "int8": lambda group: 8.0 + 32.0 / group,
    "uint6": lambda group: 6.0 + 16.0 / group,
    "uint4": lambda group: 4.0 + 12.0 / group,
    "int4": lambda group: 4.0 + 8.0 / group,
}
# By what stands behind `--weights`: the dtype of most tensors.
_INT4_HEAD = "int4 --head int4"
_NARROWER = {"fp16": "float16", "int8": "uint8", "int4": "uint4", _INT4_HEAD: "uint4"}
_NEVER_QUANTIZED = ("norm", "router", "other")
_GRAIN = 256  # tokens of context: below it, the next smaller powers of two down to 16

# (bytes of the weights or None for the bundle's own, sequences, tokens of each) -> (fits, bytes needed).
Ask = Callable[[int | None, int, int], tuple[bool, int]]


@dataclass(frozen=True)
class Suggestion:
    """A change that makes it fit; `option` is how to ask for it, `total_bytes` what is then needed."""

    change: str
    option: str
    total_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"change": self.change, "option": self.option, "total_bytes": self.total_bytes}


@dataclass(frozen=True)
class _Change:
    """Weights exported anew (None: as they are), sequences and tokens of each."""

    weights: str | None
    batch: int
    length: int


def suggest(ask: Ask, narrower: Mapping[str, int], batch: int, length: int) -> tuple[Suggestion, ...]:
    """The changes that make it fit, the fewest at a time, bits before context before batch; empty where none does.

    narrower: bytes of all weights by what stands behind `--weights`, the widest first.
    """
    for kinds in (("b", "c", "n"), ("bc", "bn", "cn"), ("bcn",)):
        found = [_find(ask, kind, narrower, batch, length) for kind in kinds]
        told = [_tell(change, ask, narrower, batch, length) for change in found if change is not None]
        if told:
            return tuple(told if len(kinds[0]) == 1 else told[:1])
    return ()


def _find(ask: Ask, kind: str, narrower: Mapping[str, int], batch: int, length: int) -> _Change | None:
    """The least change of these kinds (b: bits, c: context, n: batch): the widest weights, then the longest context."""
    for weights in list(narrower) if "b" in kind else [None]:
        count, tokens = _shrink(ask, None if weights is None else narrower[weights], kind, batch, length)
        if count and tokens:
            return _Change(weights, count, tokens)
    return None


def _shrink(ask: Ask, weight_bytes: int | None, kind: str, batch: int, length: int) -> tuple[int, int]:
    """(sequences, tokens of each) that fit with these weights; a zero where none do."""
    if "c" in kind:
        count = 1 if "n" in kind else batch
        return count, _round(_largest(lambda tokens: ask(weight_bytes, count, tokens)[0], length))
    if "n" in kind:
        return _largest(lambda count: ask(weight_bytes, count, length)[0], batch), length
    return (batch, length) if ask(weight_bytes, batch, length)[0] else (0, 0)


def _tell(change: _Change, ask: Ask, narrower: Mapping[str, int], batch: int, length: int) -> Suggestion:
    weights = None if change.weights is None else narrower[change.weights]
    words = [
        ("fewer bits", f"moedge export --weights {change.weights}", change.weights is not None),
        ("shorter context", f"--max-seq-len {change.length}", change.length != length),
        ("smaller batch", f"--max-batch {change.batch}", change.batch != batch),
    ]
    changed = [(name, option) for name, option, made in words if made]
    _, total = ask(weights, change.batch, change.length)
    return Suggestion(" and ".join(name for name, _ in changed), " and ".join(option for _, option in changed), total)


def _round(tokens: int) -> int:
    """A context of round size, no longer than this; 0 where it is of no use."""
    if tokens >= _GRAIN:
        return tokens // _GRAIN * _GRAIN
    return 1 << (tokens.bit_length() - 1) if tokens >= 16 else 0


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest n in 1..below-1 with `fits(n)`, by halving; 0 where there is none. Needs grow with n."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def narrower_weights(manifest: Mapping[str, Any], target: str | None = None) -> dict[str, int]:
    """Bytes of all weights by the `--weights` options that are narrower than the bundle's, the widest first.

    `target`: whose engine has them; None: the bundle. Integers that a quantized checkpoint brought are kept by every
    export: of those nothing is promised.
    """
    manifest = _as_read(manifest, target)
    quantization, sizes = manifest["quantization"], manifest["sizes"]
    have = quantization.get("weights")
    if have == "int4" and quantization.get("head") == "int4":
        have = _INT4_HEAD
    options = list(_NARROWER)
    if not (sizes.get("embedding") and sizes.get("head")):  # a tied head of fewer bits is a copy: more bytes, not fewer
        options.remove(_INT4_HEAD)
    later = options[options.index(have) + 1 :] if have in options else options
    now = sum(sizes.values())
    found = {option: narrower_weight_bytes(manifest, option, target) for option in later}
    return {option: count for option, count in found.items() if count < now}


def narrower_weight_bytes(manifest: Mapping[str, Any], option: str, target: str | None = None) -> int:
    """Bytes of all weights when exported with `--weights option`: as the exporter would lay them out.

    `target`: as of `narrower_weights`. Where the exporter is not installed, or the manifest is of a torch model: from
    the classes' bits alone.
    """
    manifest, usual = _as_read(manifest, target), _usual_head(manifest, target)
    exact = _laid_out_bytes(manifest, option, usual, wide_scales=target is not None and widens_scales(target))
    return round(sum(_narrower_sizes(manifest, option, f"u{usual}"))) if exact is None else exact


def _as_read(manifest: Mapping[str, Any], target: str | None) -> Mapping[str, Any]:
    """The manifest with head, scales and routers as a target's engine has them."""
    shape = ModelShape.from_manifest(manifest)
    there = shape if target is None else shape.on(target)
    if there is shape:
        return manifest
    quantization = manifest["quantization"]
    classes = quantization["classes"]
    counted = ("float8_scales", "float16_scales", "bfloat16_values")
    classes = {
        name: {key: value for key, value in entry.items() if key not in counted}  # they are wider there
        for name, entry in classes.items()
    }
    if there.head_bits != shape.head_bits:
        classes = {**classes, "head": {**classes["head"], "dtype": "uint8"}}
    return {**manifest, "sizes": dict(there.sizes), "quantization": {**quantization, "classes": classes}}


def _usual_head(manifest: Mapping[str, Any], target: str | None) -> str:
    """What a head is beside int4 weights where nobody asks, on a target that may keep 6 bits in 8."""
    if target is not None and not has_own_kernels(target):
        return "int8"
    sizes = manifest["sizes"]
    tied = not (sizes.get("embedding") and sizes.get("head"))
    return usual_head(manifest["config"]["hidden_size"], tied=tied)


def _laid_out_bytes(manifest: Mapping[str, Any], option: str, usual: str, *, wide_scales: bool) -> int | None:
    try:
        from ..export.checkpoint import Checkpoint
        from ..export.config import moe_config_from_json
        from ..export.families import find_family
        from ..export.heads import choose_head
        from ..export.layout import plan_layout
        from ..export.options import GROUP_SIZES
        from ..export.weights import is_router

        config = moe_config_from_json(manifest["config"])
        plan = find_family(Checkpoint(Path(), {"model_type": config.family}, {})).plan_weights(config)
    except (ImportError, KeyError, TypeError, CheckpointError):
        return None
    classes = manifest["quantization"].get("classes") or {}
    if (classes.get("router") or {}).get("bfloat16_values"):  # as the checkpoint has them
        plan = [dataclasses.replace(weight, kept_as="bfloat16") if is_router(weight) else weight for weight in plan]
    weights, _, head = option.partition(" --head ")
    own = head or (usual if weights == "int4" else None)
    layout = plan_layout(plan, weights, max(GROUP_SIZES), zero_points=False, head=choose_head(weights, own))
    if wide_scales:
        for name, stored in layout.stored.items():
            while stored.scales is not None and stored.scales.dtype != "float32":
                layout = layout.widen_scales(name)
                stored = layout[name]
    return sum(layout.sizes_by_role().values())


def _narrower_sizes(manifest: Mapping[str, Any], option: str, head: str) -> Iterator[float]:
    """By class: as narrow already, or never quantized, stay; the embedding stops at int8, the head where not asked."""
    stop = {"int4": {"embedding": "uint8", "head": head}, _INT4_HEAD: {"embedding": "uint8"}}
    classes = manifest["quantization"].get("classes") or {}
    for name, count in manifest["sizes"].items():
        entry = classes.get(name) or {}
        bits = _BITS.get(str(entry.get("dtype")))
        if bits is None or name in _NEVER_QUANTIZED:
            yield count
            continue
        group = entry.get("group_size") or 128
        wanted = stop.get(option, {}).get(name, _NARROWER[option])
        yield count * min(1.0, _BITS[wanted](group) / bits(group))
