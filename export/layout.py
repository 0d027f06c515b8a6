"""Where each canonical tensor lies in weights.bin, decided from shapes alone, before a byte is read.

Every tensor is stored once, 64-byte aligned. int4 is unsigned, two to a byte, low nibble first, blocks along the
input dimension, so that one offset serves `DequantizeLinear`, `MatMulNBits` and `QMoE`. int6, which ONNX does not
know, is bytes that `moedge.SixBitPlanes` takes: the upper four bits of all codes as int4, then the lower two
(`quantization.pack_int6`); its zero points are those of the 8-bit codes that it gives.

Scales of codes of 4 bits are float8 (`quantization.FLOAT8`), those of 6 bits, of MLA's matrices by head and of what a
quantized checkpoint brings float16. Where a matrix has one that this does not hold, its scales are of the next wider
type behind everything else (`widen_scales`), which is known only when they are made.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from .options import BY_CHANNEL, GROUP_SIZES, HEAD, SIX_BIT_BLOCK
from .quantization import Integers, pick_group_size
from .weights import Weight

ALIGNMENT = 64
Dtype = Literal["float32", "float16", "bfloat16", "float8", "uint8", "uint6", "uint4", "int64"]
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "uint8": 8, "uint6": 6, "uint4": 4, "int64": 64}
_WIDER: dict[Dtype, Dtype] = {"float8": "float16", "float16": "float32"}


@dataclass(frozen=True)
class Slot:
    """A tensor in weights.bin: bytes `offset` to `offset + nbytes`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * _BITS[self.dtype] + 7) // 8

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """As the graph has it: 6-bit codes are bytes there, two thirds of them the upper bits."""
        return (3, *self.shape[:-1], self.shape[-1] // 4) if self.dtype == "uint6" else self.shape


@dataclass(frozen=True)
class Stored:
    """A canonical tensor as it is stored: floating point, or codes with scales and zero points."""

    weight: Weight
    data: Slot
    scales: Slot | None = None
    zero_points: Slot | None = None
    group_size: int = 0
    shared_zero_points: bool = False
    by_channel: bool = False  # one scale a row, repeated for each group: kernels know no longer groups
    order: Slot | None = None  # int64 [in], or [units, in]: `Weight.order`

    @property
    def bits(self) -> int:
        return _BITS[self.data.dtype]

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def channels(self) -> int:
        """Input channels: as many as columns, or fewer where zeros fill groups."""
        order = self.weight.order
        return self.weight.shape[-1] if order is None else int(order.max()) + 1

    @property
    def nbytes(self) -> int:
        """What reading this tensor costs; a shared constant of zero points counts for nothing."""
        slots = [self.data, self.scales, None if self.shared_zero_points else self.zero_points, self.order]
        return sum(slot.nbytes for slot in slots if slot is not None)


@dataclass(frozen=True)
class Layout:
    """Every stored tensor by canonical name, and the file's size."""

    stored: dict[str, Stored]
    constants: tuple[tuple[Slot, int], ...]  # (slot, byte value): zero points that every symmetric tensor shares
    nbytes: int

    def __getitem__(self, name: str) -> Stored:
        return self.stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def widen_scales(self, name: str) -> Layout:
        """The same with one tensor's scales in the next wider type, at the end of the file."""
        stored, allocator = self.stored[name], _Allocator(self.nbytes)
        assert stored.scales is not None
        scales = allocator.take(stored.scales.name, _WIDER[stored.scales.dtype], stored.scales.shape)
        changed = {name: dataclasses.replace(stored, scales=scales)}
        return Layout(self.stored | changed, self.constants, allocator.end)

    def sizes_by_role(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for stored in self.stored.values():
            sizes[stored.weight.role] = sizes.get(stored.weight.role, 0) + stored.nbytes
        return sizes


@dataclass(frozen=True)
class Choice:
    """How a tensor is stored: `group_size` 0 is floating point; `zero_points`: its own, not the shared middle."""

    dtype: Dtype
    group_size: int = 0
    zero_points: bool = False
    by_channel: bool = False


def plan_layout(
    plan: list[Weight], weights: str, group_size: int, *, zero_points: bool, head: str = HEAD
) -> Layout:
    """Give each tensor its dtype, group size and place. `zero_points`: those of linears are their own, not the middle.

    `group_size`: the largest; `BY_CHANNEL` for one scale a row. `head`: int8, int6 or int4, where `weights` are
    int4. Integers that a quantized checkpoint brings are kept as they are, whatever is asked for.
    """
    allocator = _Allocator()
    symmetric: dict[Dtype, int] = {}
    brought = _gather_brought(plan)
    choices = [(weight, _choose(weight, brought, weights, group_size, zero_points, head)) for weight in plan]
    for weight, choice in choices:
        if choice.group_size and not choice.zero_points:
            count, dtype = math.prod(weight.shape) // choice.group_size, _points_dtype(choice)
            symmetric[dtype] = max(symmetric.get(dtype, 0), count)
    constants = {dtype: allocator.take(f"symmetric.{dtype}", dtype, (count,)) for dtype, count in symmetric.items()}
    stored = {weight.name: _place(weight, choice, allocator, constants) for weight, choice in choices}
    fill = tuple((slot, 0x88 if slot.dtype == "uint4" else 0x80) for slot in constants.values())
    return Layout(stored, fill, allocator.end)


def _points_dtype(choice: Choice) -> Dtype:
    """Of zero points."""
    return "uint8" if choice.dtype == "uint6" else choice.dtype


def _place(weight: Weight, choice: Choice, allocator: _Allocator, constants: dict[Dtype, Slot]) -> Stored:
    data = allocator.take(weight.name, choice.dtype, weight.shape)
    order = None if weight.order is None else allocator.take(f"{weight.name}.order", "int64", weight.order.shape)
    if not choice.group_size:
        return Stored(weight, data, order=order)
    shape = (*weight.shape[:-1], weight.shape[-1] // choice.group_size)
    scales = allocator.take(f"{weight.name}.scales", _scales_dtype(weight, choice), shape)
    name = f"{weight.name}.zero_points"
    if choice.zero_points:
        zero = allocator.take(name, choice.dtype, shape)
    else:
        dtype = _points_dtype(choice)
        zero = Slot(name, dtype, shape, constants[dtype].offset)
    return Stored(weight, data, scales, zero, choice.group_size, not choice.zero_points, choice.by_channel, order)


def _scales_dtype(weight: Weight, choice: Choice) -> Dtype:
    if choice.dtype == "uint8":
        return "float32"
    by_head = weight.role == "attention" and len(weight.shape) == 3  # whose kernel has its own way of reading them
    came = weight.precision != "keep" and any(piece.integers is not None for piece in weight.pieces())
    return "float16" if choice.dtype == "uint6" or by_head or came else "float8"


def _link(weight: Weight) -> str:
    """Tensors of one link are stored alike: a layer's expert stacks, which one kernel takes."""
    return weight.name.rsplit(".", 2)[0] if weight.role == "experts" else weight.name


def _gather_brought(plan: list[Weight]) -> dict[str, set[Integers]]:
    """By link: the integers that its pieces bring from a quantized checkpoint, which are kept."""
    brought: dict[str, set[Integers]] = {}
    for weight in plan:
        for piece in weight.pieces() if weight.precision != "keep" else ():
            if piece.integers is not None:
                brought.setdefault(_link(weight), set()).add(piece.integers)
    return brought


def _choose(
    weight: Weight, brought: dict[str, set[Integers]], weights: str, group_size: int, zero_points: bool, head: str
) -> Choice:
    """What was brought, else what was asked for. A matrix that no group size divides stays float32."""
    if weight.precision == "keep":
        return Choice(weight.kept_as)
    if _link(weight) in brought:
        return _keep(weight, brought[_link(weight)])
    if weights in ("fp32", "fp16"):
        return Choice("float32" if weights == "fp32" else "float16")
    widths = (weight.shape[-1], *weight.group_with)
    by_channel = group_size == BY_CHANNEL
    group_size = max(GROUP_SIZES) if by_channel else group_size
    own_head = weight.role == "head" and head != "int4"
    wide = weight.precision != "linear" or own_head or _comes_rounded(weight)
    dtype: Dtype = "uint8" if weights == "int8" or wide else "uint4"
    if own_head and head == "int6" and weight.precision != "table" and weight.shape[-1] % SIX_BIT_BLOCK == 0:
        dtype = "uint6"
    if zero_points and not wide:
        group = pick_group_size(group_size, *widths, even=dtype == "uint4")
        if group is not None:
            return Choice(dtype, group, True, by_channel)
    group = pick_group_size(group_size, *widths)
    return Choice("float32") if group is None else Choice(dtype, group, by_channel=by_channel)


def _comes_rounded(weight: Weight) -> bool:
    """Heads of a latent whose integers cannot be kept, for their order of channels: in 4 bits they would lose twice."""
    packed = [piece.packed for piece in weight.pieces() if piece.packed is not None]
    return weight.role == "attention" and any(each.integers is not None for each in packed)


def _keep(weight: Weight, integers: set[Integers]) -> Choice:
    """The narrowest form that holds these integers bit for bit; float32, which is exact too, where none does."""
    # Rows of a table are gathered, and onnxruntime gathers no nibbles.
    bits = max(8 if weight.precision == "table" else 4, *(held.bits for held in integers))
    common = math.gcd(*(held.group_size for held in integers))
    widest = common & -common  # every size that is offered is a power of two
    # Codes of 4 bits with a zero point of their own move it to the middle when they are stored in 8: TensorRT would
    # have to make up for a zero point far from it, in half precision.
    own = any(held.zero_points and held.bits == bits for held in integers)
    widths = (weight.shape[-1], *weight.group_with)
    if bits == 4:
        group = pick_group_size(widest, *widths, even=own)
        if group is not None:
            return Choice("uint4", group, own)
        own = False
    group = pick_group_size(widest, *widths)
    return Choice("float32") if group is None else Choice("uint8", group, own)


class _Allocator:
    def __init__(self, end: int = 0) -> None:
        self.end = end

    def take(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> Slot:
        slot = Slot(name, dtype, shape, self.end)
        self.end = -(-(self.end + slot.nbytes) // ALIGNMENT) * ALIGNMENT
        return slot
