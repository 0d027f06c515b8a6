"""Weight quantization: one file per algorithm, and one per quantized checkpoint format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..options import ALGORITHMS, GROUP_SIZES

Array = np.ndarray[Any, Any]

# The scales that a byte holds, float32 [256]: four bits of exponent, then four of mantissa, from 2^-15 to below 2. No
# sign, zero, infinity or NaN: a scale needs none.
_GRAIN = 1 << 19  # between neighbours, in the bits of float32
FLOAT8 = (np.arange(256, dtype=np.int32) * _GRAIN + np.array(2.0**-15, np.float32).view(np.int32)).view(np.float32)
FLOAT8.setflags(write=False)


@dataclass(frozen=True)
class Quantized:
    """Codes uint8 [rows, in] (one a byte), scales float32 [rows, in/group], zero points uint8 like scales, or None
    for the symmetric middle (8 of int4, 128 of int8). value = (code - zero point) * scale."""

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int
    group_size: int

    def dequantize(self) -> Array:
        """float32 [rows, in]."""
        rows, columns = self.codes.shape
        zero: Any = 1 << (self.bits - 1) if self.zero_points is None else self.zero_points.astype(np.float32)[..., None]
        grouped = self.codes.reshape(rows, -1, self.group_size).astype(np.float32) - zero
        values: Array = (grouped * self.scales[..., None]).reshape(rows, columns)
        return values

    def regroup(self, bits: int, group_size: int, *, zero_points: bool) -> Quantized:
        """The same values in a wider form: smaller groups (scales repeated), more bits, zero points written out.

        Codes stay bit for bit, or move with their zero point to the middle of the wider range.
        """
        if (bits, group_size, zero_points) == (self.bits, self.group_size, self.zero_points is not None):
            return self
        times = self.group_size // group_size
        assert times * group_size == self.group_size and bits >= self.bits
        codes, zeros = self.codes, self.zero_points
        if zeros is None and (zero_points or bits > self.bits):
            zeros = np.full(self.scales.shape, 1 << (self.bits - 1), np.uint8)
        if zeros is not None and not zero_points:
            # Only 4 bits in 8 get here: every code minus its zero point fits around the wider middle.
            grouped = codes.reshape(*zeros.shape, self.group_size)
            codes = (grouped - zeros[..., None] + np.uint8(1 << (bits - 1))).reshape(codes.shape)
            zeros = None
        zeros = None if zeros is None else np.repeat(zeros, times, axis=-1)
        return Quantized(codes, np.repeat(self.scales, times, axis=-1), zeros, bits, group_size)


@dataclass(frozen=True)
class Integers:
    """How a quantized checkpoint holds a matrix as integers; without `zero_points` they sit around the middle."""

    bits: int
    group_size: int
    zero_points: bool


class PackedMatrix(Protocol):
    """A matrix [rows, in], or a stack of them, as a quantized checkpoint holds it. Ranges are of the first axis."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the checkpoint it is made of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What it unpacks to."""

    @property
    def integers(self) -> Integers | None:
        """None for float formats, and for integers that no canonical tensor can hold: those are quantized again."""

    @property
    def columns(self) -> Array | None:
        """int64 [n]: which input channel each column of `read_codes` is, -1 for none (a column of zeros), where the
        format groups channels that do not lie side by side; None for the channels in their order."""

    @property
    def origin(self) -> str:
        """What it is, in words, for the notes of an export; empty where there is nothing to say."""

    def read_values(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        """float32; raises CheckpointError naming the tensor that holds NaN or infinity."""

    def read_codes(self, checkpoint: Checkpoint, start: int, stop: int) -> Quantized:
        """The integers bit for bit, where there are `integers`, in the order of `columns`; raises as `read_values`."""


def check_finite(checkpoint: Checkpoint, name: str, values: Array, start: int = 0) -> None:
    """Raises CheckpointError for NaN and infinity, naming the row; `start`: the first row that `values` holds."""
    finite = np.isfinite(values)
    if not finite.all():
        row = start + int(np.argwhere(~finite)[0][0]) if values.ndim else 0
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds NaN or infinity in row {row}; download it again"
        )


class Algorithm(Protocol):
    """What an algorithm's module offers. `ZERO_POINTS`: what it makes where nobody says."""

    ZERO_POINTS: bool

    def quantize(self, values: Array, bits: int, group_size: int, *, zero_points: bool = False) -> Quantized:
        """values float32 [rows, in], in divisible by group_size; without `zero_points` the symmetric middle is used."""


@runtime_checkable
class Calibrated(Algorithm, Protocol):
    """An algorithm that treats each unit of each tensor by what is known of its inputs."""

    def at(self, weight: str, unit: int) -> Algorithm:
        """What quantizes one unit of a canonical tensor; units are asked for in the order of the layout."""

    def notes(self) -> list[str]:
        """What an export should say of it."""


def find_algorithm(name: str) -> Algorithm:
    """The module of an algorithm; raises CheckpointError for an unknown one, listing the known."""
    if name not in ALGORITHMS:
        raise CheckpointError(f"algorithm {name!r} is not known; known: {', '.join(ALGORITHMS)}")
    algorithm: Algorithm = importlib.import_module(f".{name}", __name__)
    return algorithm


def round_scales(scales: Array, bits: int) -> Array:
    """float32 scales as stored beside codes of `bits`: of 4 rounded to float8, of 6 to float16, where they are normal
    numbers there; what float8 has no place for goes to float16.

    Codes are made for the rounded scales, so that the rounding costs next to nothing.
    """
    if bits >= 8:
        return scales
    with np.errstate(over="ignore", under="ignore"):
        halves = scales.astype(np.float16).astype(np.float32)
    least, most = np.finfo(np.float16).tiny, np.finfo(np.float16).max
    rounded: Array = np.where((scales >= least) & (scales <= most), halves, scales)
    if bits == 4:
        places = scales.astype(np.float32, copy=False).view(np.int32)
        nearest = places + (_GRAIN // 2 - 1) + (places // _GRAIN & 1) & -_GRAIN  # ties to even
        there = (scales > 0) & (nearest >= FLOAT8.view(np.int32)[0]) & (nearest <= FLOAT8.view(np.int32)[-1])
        rounded = np.where(there, nearest.view(np.float32), rounded)
    return rounded


def fit_scales(scales: Array, dtype: str) -> bool:
    """Whether a type, float8 or float16, holds every one of these float32 scales exactly."""
    if dtype == "float8":
        return bool((FLOAT8[pack_float8(scales)] == scales).all())
    with np.errstate(over="ignore", under="ignore"):
        return bool((scales.astype(np.float16) == scales).all())


def pack_float8(scales: Array) -> Array:
    """float32 scales -> uint8: which of FLOAT8 each is, the nearest below where it is none of them."""
    places = (scales.astype(np.float32, copy=False).view(np.int32) - FLOAT8.view(np.int32)[0]) // _GRAIN
    packed: Array = places.clip(0, len(FLOAT8) - 1).astype(np.uint8)
    return packed


def pick_group_size(wanted: int, *widths: int, even: bool = False) -> int | None:
    """The largest group size up to `wanted` that divides every width, `even`: into an even number of groups; None when
    none does. onnxruntime's kernels pack int4 zero points row by row, ONNX packs the whole tensor: the two are the
    same bytes when a row has an even number of groups.
    """
    step = 2 if even else 1
    sizes = (size for size in GROUP_SIZES if size <= wanted)
    return next((size for size in sizes if all(width % (step * size) == 0 for width in widths)), None)


def pack_int4(codes: Array) -> Array:
    """uint8 [..., n] of values 0 to 15 -> uint8 [..., n/2], low nibble first."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed = flat[0::2] | (flat[1::2] << 4)
    shape = (*codes.shape[:-1], codes.shape[-1] // 2) if codes.shape[-1] % 2 == 0 else packed.shape
    result: Array = packed.reshape(shape)
    return result


def pack_int6(codes: Array) -> tuple[Array, Array]:
    """uint8 [..., n] of values 0 to 63 -> their upper four bits uint8 [..., n/2] as `pack_int4` gives them, and their
    lower two uint8 [..., n/4], four to a byte, the lowest bits first. weights.bin has all of the former before those.
    """
    lower = codes.reshape(*codes.shape[:-1], -1, 4) & 3
    packed: Array = lower[..., 0] | lower[..., 1] << 2 | lower[..., 2] << 4 | lower[..., 3] << 6
    return pack_int4(codes >> 2), packed


def unpack_int6(upper: Array, lower: Array) -> Array:
    """The inverse of `pack_int6`: uint8 [..., n]."""
    codes = unpack_int4(upper) << 2
    pairs = codes.reshape(*lower.shape, 4)
    for place in range(4):
        pairs[..., place] |= lower >> 2 * place & 3
    return codes


def widen_int6(upper: Array, lower: Array) -> Array:
    """As `unpack_int6`, the codes as 8-bit ones, whose middle is 128: what `moedge.SixBitPlanes` gives."""
    widened: Array = unpack_int6(upper, lower) + np.uint8(96)
    return widened


def split_int6(planes: Array) -> tuple[Array, Array]:
    """uint8 [3, n, k/4] as a matrix of 6-bit codes is stored -> what `unpack_int6` takes, [n, k/2] and [n, k/4]."""
    return planes[:2].reshape(planes.shape[1], -1), planes[2]


def slice_int6(planes: Array, first: int, end: int) -> Array:
    """Rows `first` to `end - 1` of stored 6-bit codes, which lie in two places: a copy uint8 [3, end - first, k/4]."""
    upper, lower = (plane[first:end].reshape(-1) for plane in split_int6(planes))
    return np.concatenate([upper, lower]).reshape(3, end - first, planes.shape[2])


def unpack_int4(packed: Array) -> Array:
    """The inverse of `pack_int4` for an even last axis: uint8 [..., n/2] -> uint8 [..., n]."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[..., 0] = packed & 15
    codes[..., 1] = packed >> 4
    unpacked: Array = codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)
    return unpacked
