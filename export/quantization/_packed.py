"""What the quantized checkpoint formats share: checks of packed tensors, unpacking, and the two kinds of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..options import GROUP_SIZES
from . import Array, Integers, Quantized, check_finite, unpack_int4


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [out, in] held as integers that are kept; `read(start, stop)` gives rows of it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    integers: Integers
    origin: str
    read: Callable[[int, int], Quantized]
    columns: None = None

    def read_codes(self, checkpoint: Checkpoint, start: int, stop: int) -> Quantized:
        return self.read(start, stop)

    def read_values(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        return self.read(start, stop).dequantize()


@dataclass(frozen=True)
class FloatMatrix:
    """A matrix, or a stack of them, that is dequantized as it is read; `read(start, stop)` gives float32."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    origin: str
    read: Callable[[int, int], Array]
    columns: None = None
    integers: None = None

    def read_codes(self, checkpoint: Checkpoint, start: int, stop: int) -> Quantized:
        raise AssertionError(f"{self.names[0]} holds no integers to keep")

    def read_values(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        return self.read(start, stop)


def find_companion(checkpoint: Checkpoint, name: str, beside: str) -> str:
    """`name`, which must be in the checkpoint because `beside` is; raises CheckpointError where it is lost."""
    if name not in checkpoint:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} is missing beside {beside!r}; download the checkpoint again"
        )
    return name


def check_packed(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], what: str) -> None:
    """A packed tensor has the shape and one of the dtypes that its matrix implies; raises CheckpointError."""
    entry = checkpoint.entries[name]
    if entry.shape != shape or entry.dtype.name not in dtypes:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} is {entry.dtype.name} {list(entry.shape)}, {what} implies "
            f"{' or '.join(dtypes)} {list(shape)}; correct config.json or download the checkpoint again"
        )


FLOATS = ("float16", "bfloat16", "float32")
LARGEST_SCALE = 2.0**111  # times any code, FP8's 57344 among them, still far from float32's end
# What else a module may carry that weights do not need: scales of activations and of a quantized cache.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale")
_CACHE = ("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point")


def list_activations(checkpoint: Checkpoint, stem: str) -> tuple[str, ...]:
    """Tensors of the module `stem`, and of the attention around it, that only a quantized runtime would read."""
    parent = stem.rpartition(".")[0]
    names = [f"{stem}.{part}" for part in (*_ACTIVATIONS, *_CACHE)]
    if parent.endswith("self_attn"):
        names += [f"{parent}.{part}" for part in _CACHE]
    return tuple(name for name in names if name in checkpoint)


def find_groups(checkpoint: Checkpoint, name: str, groups: int, width: int) -> int:
    """The group size of `groups` scales over `width` input channels; raises CheckpointError when they do not divide."""
    if not groups or not width or width % groups:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} has {groups} groups of scales, which do not divide {width} input "
            "channels; quantize again with a group size that does"
        )
    return width // groups


def find_bits(checkpoint: Checkpoint, name: str, words: int, width: int) -> int:
    """Bits of a code when `width` of them fill `words` int32; raises CheckpointError for all but 4 and 8."""
    bits = next((bits for bits in (4, 8) if -(-width * bits // 32) == words), 0)
    if not bits:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} packs {width} input channels into {words} words of 32 bits; "
            f"4 bits would take {-(-width // 8)} and 8 bits {-(-width // 4)}, other widths are not supported"
        )
    return bits


def unpack_words(words: Array, bits: int) -> Array:
    """int32 [..., n] -> uint8 [..., n * 32 / bits]: codes of 4 or 8 bits, the lowest bits first."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return unpack_int4(data) if bits == 4 else data


def read_scales(checkpoint: Checkpoint, name: str) -> Array:
    """float32: a whole tensor of scales; raises CheckpointError as `check_scales`."""
    scales = checkpoint.read(name).astype(np.float32)
    check_scales(checkpoint, name, scales)
    return scales


def check_scales(checkpoint: Checkpoint, name: str, scales: Array) -> None:
    """Raises CheckpointError for NaN and infinity, and for what takes values beyond float32."""
    check_finite(checkpoint, name, scales)
    if scales.size and np.abs(scales).max() > LARGEST_SCALE:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds a scale of {np.abs(scales).max():.0e}, beyond what weights can "
            "have; download it again"
        )


def read_columns(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Array:
    """Columns `start` to `stop` of a matrix, in its own dtype: where output channels run along the last axis."""
    entry = checkpoint.entries[name]
    rows, width = entry.shape
    if (start, stop) == (0, width):
        return checkpoint.read(name)
    columns = np.empty((rows, stop - start), entry.dtype)
    size = entry.dtype.itemsize
    with entry.shard.open("rb", buffering=0) as stream:
        for row in range(rows):
            stream.seek(entry.offset + (row * width + start) * size)
            data = stream.read(columns[row].nbytes)
            if len(data) != columns[row].nbytes:
                raise CheckpointError(f"{entry.shard}: ended early in tensor {name!r}; download it again")
            columns[row] = np.frombuffer(data, entry.dtype)
    return columns


def read_turned_scales(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Array:
    """float32 [stop - start, groups] out of scales [groups, out]; raises CheckpointError as `check_scales`."""
    scales = read_columns(checkpoint, name, start, stop).astype(np.float32)
    check_scales(checkpoint, name, scales)
    return np.ascontiguousarray(scales.T)


def read_turned_codes(
    checkpoint: Checkpoint, name: str, start: int, stop: int, unpack: Callable[[Array], Array], each: int
) -> Array:
    """uint8 [stop - start, n] out of words int32 [n, out / each] that `unpack` to [n, out]."""
    first = start // each
    codes = unpack(read_columns(checkpoint, name, first, -(-stop // each)))
    return np.ascontiguousarray(codes[:, start - first * each : stop - first * each].T)


def read_order(checkpoint: Checkpoint, name: str, groups: int, width: int) -> Array | None:
    """int64 [in]: the group of each input channel (`g_idx`); None when channels are in the order of their groups.

    Raises:
        CheckpointError: the tensor has another shape, or names groups that are not there.
    """
    check_packed(checkpoint, name, (width,), ("int32", "int64"), f"a width of {width}")
    order: Array = checkpoint.read(name).astype(np.int64)
    if order.min() < 0 or order.max() >= groups:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} names groups {order.min()} to {order.max()}, there are {groups}; "
            "download the checkpoint again"
        )
    return None if np.array_equal(order, np.arange(width) // (width // groups)) else order


_FINEST = min(GROUP_SIZES)


@dataclass(frozen=True)
class OrderedMatrix:
    """Integers whose channel i belongs to group order[i] (`g_idx`): what GPTQ's desc_act and actorder leave.

    Kernels want the channels of a group side by side: `columns` puts them so, and whoever multiplies by the matrix puts
    the inputs in the same order. Groups of unequal size are filled with columns of zeros.
    """

    codes: IntegerMatrix
    order: Array
    columns: Array
    integers: Integers
    places: Array  # the group of each block of columns

    @property
    def names(self) -> tuple[str, ...]:
        return self.codes.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def origin(self) -> str:
        return f"{self.codes.origin}, channels grouped by activation (g_idx)"

    def read_codes(self, checkpoint: Checkpoint, start: int, stop: int) -> Quantized:
        found = self.codes.read(start, stop)
        middle = np.uint8(1 << (found.bits - 1))
        zeros = None if found.zero_points is None else np.ascontiguousarray(found.zero_points[:, self.places])
        fill = middle if zeros is None else np.repeat(zeros, self.integers.group_size, axis=1)
        codes = np.where(self.columns < 0, fill, found.codes[:, self.columns])
        scales = np.ascontiguousarray(found.scales[:, self.places])
        return Quantized(codes, scales, zeros, found.bits, self.integers.group_size)

    def read_values(self, checkpoint: Checkpoint, start: int, stop: int) -> Array:
        """Channels in their own order; apart from `read_codes`, which is judged by it."""
        return dequantize_ordered(self.codes.read(start, stop), self.order)


def bind_ordered(codes: IntegerMatrix, order: Array) -> OrderedMatrix:
    """`codes` whose channel i belongs to group order[i]."""
    counts = np.bincount(order, minlength=codes.shape[1] // codes.integers.group_size)
    equal = (counts == codes.integers.group_size).all()
    block = codes.integers.group_size if equal else _FINEST
    runs, places = [], []
    for group, channels in enumerate(np.split(np.argsort(order, kind="stable"), np.cumsum(counts)[:-1])):
        blocks = -(-len(channels) // block)
        runs.append(np.pad(channels, (0, blocks * block - len(channels)), constant_values=-1))
        places += [group] * blocks
    integers = Integers(codes.integers.bits, block, codes.integers.zero_points)
    return OrderedMatrix(codes, order, np.concatenate(runs), integers, np.array(places))


def dequantize_ordered(quantized: Quantized, order: Array) -> Array:
    """float32 [rows, in] of codes whose channel i belongs to group order[i]."""
    middle = 1 << (quantized.bits - 1)
    values = quantized.codes.astype(np.float32)
    values -= middle if quantized.zero_points is None else quantized.zero_points[:, order].astype(np.float32)
    values *= quantized.scales[:, order]
    return values
