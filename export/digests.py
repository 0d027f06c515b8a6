"""What the quantizer was given and what it decided, in short, so that the parity check can tell other bytes from it.

A quantizer such as gptq moves values away from the checkpoint's on purpose, and neighbouring scales may differ by less
than rounding does: comparing values alone would forgive small faults. So the writer notes a digest of the values that
go into the quantizer and one of those that come out; the check digests what it reads from the checkpoint and from
weights.bin itself. They must agree to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng  # numpy loads it when it is first asked for, and then loses a Ctrl-C

from .checkpoint import Array

Key = tuple[str, int, int]  # canonical tensor, its unit, place of the piece in the unit

_SEED = 20261123
_patterns: dict[int, Array] = {}


@dataclass
class Digest:
    """Of one piece, part by part in the order of its rows: values before and after quantization."""

    before: int = 0
    after: int = 0

    def add(self, before: Array, after: Array) -> None:
        """Some more rows, float32 [rows, in] both; the same partition gives the same digest."""
        self.before = _chain(self.before, before)
        self.after = _chain(self.after, after)

    def find_fault(self, found: Digest) -> str | None:
        """What `found`, made from the files, says of what was quantized."""
        if found.before != self.before:
            return "other values than these were quantized"
        return None if found.after == self.after else "what was written is not what the quantizer gave"


def digest(values: Array) -> int:
    """32 bits of float32 [rows, in]: its words, each times an odd number of its place, summed modulo 2^32."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(-1)
    if words.size not in _patterns:
        if len(_patterns) > 3:  # parts of a tensor have two sizes at most
            _patterns.clear()
        rng = default_rng(_SEED)
        _patterns[words.size] = rng.integers(0, 1 << 32, words.size, np.uint32) | np.uint32(1)
    mixed = words ^ (words >> np.uint32(16))  # bfloat16 leaves the lower half empty
    mixed *= _patterns[words.size]
    return int(mixed.sum(dtype=np.uint32))


def _chain(before: int, values: Array) -> int:
    return (before * 0x9E3779B97F4A7C15 + digest(values)) % (1 << 64)
