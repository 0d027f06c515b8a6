"""The memory plan of an export, made from shapes alone: how much it may hold at once, and what the least is.

The bound is on the process's peak resident memory: what is resident when the work begins (interpreter, libraries, the
plan itself), a reserve for what the allocator keeps, and the working set of whichever stage needs the most. Writing and
comparing hold a few copies of one chunk of rows; running the graph holds a budget of weights and the activations.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, UsageError
from .config import MoEConfig
from .weights import Weight

MIB = 1 << 20
RESERVE = 96 * MIB  # freed memory that the allocator keeps, and fragments of it (measured: 60 MiB)
# float32 bytes. Larger ones are slower: they leave the cache, and the allocator gives them back to the system each time
# (measured, nanoseconds a value to quantize and write, user + system: 512 KiB 5.1 + 0.9, 4 MiB 5.5 + 4.0).
LARGEST_CHUNK = MIB // 2
SMALLEST_CHUNK = MIB // 4
LARGEST_GRAPH = 256 * MIB  # more is no faster
_COPIES = 12  # of a chunk that quantizing or comparing it holds at once (measured: 8)
_WHOLE_COPIES = 4  # of a unit that can only be read whole: the one before it, itself, and it as it was stored
_READ_COPIES = 3  # of a chunk that the reference holds
_MOMENTS = 5  # float64 copies of a matrix's second moments that inverting them holds
_ROUND = 8 * MIB  # so that the figure of a refusal works although two runs differ by a little

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}{end}": 1024**power for power, letter in enumerate("kmgt", 1) for end in ("ib", "i", "")}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: `chunk` of float32 rows at once, `graph` of weights while the graph is checked, `peak` in all."""

    chunk: int = LARGEST_CHUNK
    graph: int = LARGEST_GRAPH
    peak: int = 0


@dataclass(frozen=True)
class GraphNeeds:
    """Of the parity check's graph, in bytes: the least budget that runs every step, and what activations take."""

    smallest: int
    activations: int


def plan_memory(
    weights: list[Weight], graph: GraphNeeds | None, limit: int | str | None, extra: int = 0
) -> MemoryPlan:
    """Divide `limit` (bytes, "2GiB", or None: a quarter of what is free); `graph` is None without a parity check.

    `extra`: bytes that an algorithm holds beside a chunk.

    Raises:
        CheckpointError: the limit is below the least that works; says which that is.
        UsageError: the limit is no size.
    """
    base = resident_bytes() + RESERVE
    whole = max((4 * math.prod(weight.unit_shape) for weight in weights if _is_whole(weight)), default=0)
    widest = max((4 * weight.shape[-1] for weight in weights), default=0)
    least_chunk = max(SMALLEST_CHUNK, 2 * widest)

    def peak(chunk: int, budget: int) -> int:
        stages = [_COPIES * chunk + _WHOLE_COPIES * whole + extra]
        if graph is not None:
            stages.append(budget + graph.activations + _READ_COPIES * max(chunk, widest))
        return base + max(stages)

    smallest = graph.smallest if graph is not None else 0
    least = peak(least_chunk, smallest)
    bound = _find_bound(limit, least)
    chunk = max(LARGEST_CHUNK, least_chunk)
    while chunk > least_chunk and peak(chunk, smallest) > bound:
        chunk = max(chunk // 2, least_chunk)
    spare = bound - peak(chunk, smallest)
    budget = max(smallest, min(smallest + spare, LARGEST_GRAPH))
    return MemoryPlan(chunk, budget, peak(chunk, budget))


def calibration_bytes(weights: list[Weight], config: MoEConfig, tokens: int) -> int:
    """What calibrating holds at most: inputs of the matrices of one layer, and the moments and values of one matrix."""
    layers: dict[str, int] = {}
    widest = largest = 0
    for weight in weights:
        if weight.precision == "linear":
            times = config.moe.num_experts_per_tok if weight.role == "experts" else 1
            layer = weight.name.rpartition("layers.")[2].split(".")[0]
            layers[layer] = layers.get(layer, 0) + times * weight.shape[-1]
            widest = max(widest, weight.shape[-1])
            if weight.role != "head":  # the largest matrix, of which only a chunk of rows is ever held
                largest = max(largest, math.prod(weight.unit_shape))
    recorded = tokens * (max(layers.values(), default=0) + 4 * config.hidden_size)
    return 4 * (recorded + _COPIES * largest) + _MOMENTS * 8 * widest * widest


def _find_bound(limit: int | str | None, least: int) -> int:
    shown = -(-least // _ROUND) * _ROUND
    if limit is None:
        free = free_bytes()
        if shown > free:
            raise CheckpointError(
                f"this export needs {format_size(shown)} of memory at least, {format_size(free)} are free; "
                "free some, or export where there is more"
            )
        return max(free // 4, shown)
    bound = parse_size(limit)
    if bound < least:
        raise CheckpointError(
            f"--max-memory {format_size(bound)} is too small for this checkpoint: the smallest that works is "
            f"{format_size(shown)}; use --max-memory {format_size(shown)} or more"
        )
    return bound


def _is_whole(weight: Weight) -> bool:
    """Whether parts of the tensor's units cannot be read alone: a unit is held then."""
    return not all(piece.ranged for piece in weight.pieces())


def give_back() -> None:
    """What was freed goes back to the system, where the C library keeps it otherwise (glibc: up to half of a peak)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def rows_at_once(weight: Weight, chunk: int) -> int:
    """How many rows of a unit seen as [rows, in] are worked on together: an even number."""
    return max(2, chunk // (4 * max(1, weight.shape[-1])) // 2 * 2)


def parse_size(text: int | str) -> int:
    """Bytes of "2GiB", "500MB", "1.5g" (1024 based) or plain bytes.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]{0,3})\s*", str(text).lower())
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"memory size {text!r} is not understood; write 2GiB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(count: int) -> str:
    """A size as `parse_size` reads it: whole MiB or GiB where they are exact, else MiB rounded down."""
    if count >= 1 << 30 and count % (1 << 30) == 0:
        return f"{count >> 30}GiB"
    return f"{count >> 20}MiB" if count >= MIB else f"{count}B"


def resident_bytes() -> int:
    """The process's resident memory now (where only the peak is known, the peak)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows: numpy, onnx and onnxruntime take about this much
        return 200 * MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes() -> int:
    """Memory that can be had without swapping: of the machine, and of the control group that the process is in."""
    free = [limit for limit in (_meminfo_available(), _cgroup_available()) if limit is not None]
    if free:
        return min(free)
    names = getattr(os, "sysconf_names", {})
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30  # Windows says it only through its own interface: half of a usual laptop


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return None
