"""The weights of a TensorRT network: a file of its own, in layouts that TensorRT reads fast, streamed from weights.bin.

TensorRT takes signed INT4 and INT8 with zero point 0: codes are flipped as they pass (XOR 0x88 and 0x80). Zero points
become offsets: scale * (code - zero point) = scale * flipped + scale * (middle - zero point). Codes of 6 bits, which
TensorRT has not, become INT8. Every matrix has one layout that both optimization profiles read, because a second one is
a second copy in the engine.
N = out, K = in, B = block (inputs that share a scale), E = experts, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import Progress
from ...errors import BuildError
from ...export.quantization import FLOAT8, split_int6, widen_int6
from ._canonical import SIX_BITS, Matrix
from ._trt_fp8 import Scales, Values, codes_of, rounded, scales_of

Array = np.ndarray[Any, Any]
Chunks = Callable[[], Iterator[Array]]

ALIGNMENT = 64
_CHUNK_BYTES = 16 << 20
_FLIP = {4: 0x88, 8: 0x80}
_CODES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_FLOATS: dict[Any, type[np.generic]] = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


@dataclass(frozen=True)
class Stored:
    """A lowered matrix: codes with scales and their block, or floating point (`bits` 0).

    `offsets`, like the scales: what each value of a block is more than code times scale; None for nothing. `by_row`:
    FP8, whose scales [N] are one a row.
    """

    data: ir.Value
    scales: ir.Value | None
    bits: int
    block: int
    offsets: ir.Value | None = None

    @property
    def by_row(self) -> bool:
        return self.data.dtype == ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True)
class _Tensor:
    value: ir.Value
    offset: int
    nbytes: int
    chunks: Chunks


class LoweredWeights:
    """Plans the file tensor by tensor, then writes it with a bounded part in memory.

    `real`: the floating point type of weights and scales, FLOAT16 for a device and FLOAT for the check. `fp8`: matrices
    that every token multiplies, and experts, are quantized again to FP8.
    """

    def __init__(self, real: ir.DataType, location: str, *, fp8: bool = False) -> None:
        self.real = real
        self.fp8 = fp8
        self.squared_error = self.squares = 0.0
        self.location = location
        self.tensors: list[_Tensor] = []
        self.nbytes = 0

    # what can be stored

    def linear(self, name: str, matrices: list[Matrix], *, as_it_is: bool = False) -> Stored:
        """Rows of one or more matrices [N, K], one above the other, scales [N, K/B]; `as_it_is`: never FP8."""
        first = matrices[0]
        width = first.shape[-1]
        rows = sum(matrix.shape[0] for matrix in matrices)
        if self.fp8 and not as_it_is:
            sources = [self._values(matrix) for matrix in matrices]
            return self._by_row(name, (rows, width), lambda change: _each_row(sources, change)())
        data = [_SixBits(matrix) if matrix.six_bits else matrix.data for matrix in matrices]
        if not first.bits:
            return Stored(self.add(name, self.real, (rows, width), _each_row(data, self._real)), None, 0, 0)
        block, bits = _split_block(first.block_size, width), _stored_bits(first)
        codes = self.add(name, _CODES[bits], (rows, width), _each_row(data, _flip_of(first)))
        scale_rows = _each_row(_scales_of(matrices), lambda part: self._scales(part, first.block_size, block, name))
        shape = (rows, width // block)
        scales = self.add(f"{name}.scales", self.real, shape, scale_rows)
        if all(matrix.symmetric for matrix in matrices):
            return Stored(codes, scales, bits, block)
        offset_rows = _each_row([_Offsets(matrix, block) for matrix in matrices], self._real)
        return Stored(codes, scales, bits, block, self.add(f"{name}.offsets", self.real, shape, offset_rows))

    def expert_rows(self, name: str, experts: Matrix, shared: Matrix | None) -> Stored:
        """gate_up [E, 2I, H], rows interleaved, as [E*2I, H] with each expert's gate rows before its up rows.

        `shared` [2*n*I, H] (all gate rows, then all up rows) follows as n more experts.
        """
        count, double, width = experts.shape
        inner = double // 2
        more = 0 if shared is None else shared.shape[0] // double
        rows = (count + more) * double

        def place(stack: ir.Value, extra: ir.Value | None, change: Callable[[Array], Array]) -> Iterator[Array]:
            view = _bytes_or_floats(stack)
            for expert in range(count):
                yield change(view[expert].reshape(inner, 2, -1).transpose(1, 0, 2))
            tail = None if extra is None else _bytes_or_floats(extra)
            for expert in range(more if tail is not None else 0):
                assert tail is not None
                gate = tail[expert * inner : (expert + 1) * inner]
                up = tail[(more + expert) * inner : (more + expert + 1) * inner]
                yield change(np.stack([gate, up]))

        return self._stack(name, (rows, width), experts, shared, place)

    def expert_columns(self, name: str, experts: Matrix, shared: Matrix | None) -> Stored:
        """down [E, H, I] as [H, E*I], so that one product sums over all experts; `shared` [H, n*I] follows."""
        count, rows, inner = experts.shape
        more = 0 if shared is None else shared.shape[1] // inner

        def place(stack: ir.Value, extra: ir.Value | None, change: Callable[[Array], Array]) -> Iterator[Array]:
            view = _bytes_or_floats(stack)
            tail = None if extra is None else _bytes_or_floats(extra).reshape(rows, more, -1)
            step = max(1, _CHUNK_BYTES // (count * view.shape[2] * view.itemsize))
            for start in range(0, rows, step):
                part = view[:, start : start + step].transpose(1, 0, 2)
                yield change(part if tail is None else np.concatenate([part, tail[start : start + step]], axis=1))

        return self._stack(name, (rows, (count + more) * inner), experts, shared, place)

    def _stack(
        self, name: str, shape: tuple[int, int], experts: Matrix, shared: Matrix | None, place: Callable[..., Any]
    ) -> Stored:
        """Codes and scales of a stack of experts, `place`d alike; blocks narrowed to what both sources allow."""
        tail = None if shared is None else shared.data
        if self.fp8:
            source, extra = self._values(experts), None if shared is None else self._values(shared)
            return self._by_row(name, shape, lambda change: place(source, extra, change))
        if not experts.bits:
            data = self.add(name, self.real, shape, lambda: place(experts.data, tail, self._real))
            return Stored(data, None, 0, 0)
        matrices = [experts] if shared is None else [experts, shared]
        block = math.gcd(*[matrix.block_size for matrix in matrices])
        if shape[1] == block:
            block = _split_block(block, shape[1])
        codes = self.add(name, _CODES[experts.bits], shape, lambda: place(experts.data, tail, _flip_of(experts)))
        narrow = [_Narrowed(matrix, block) for matrix in matrices]
        blocks = (shape[0], shape[1] // block)
        scales = self.add(
            f"{name}.scales",
            self.real,
            blocks,
            lambda: place(narrow[0], narrow[1] if shared else None, lambda part: self._scales(part, 1, 1, name)),
        )
        if all(matrix.symmetric for matrix in matrices):
            return Stored(codes, scales, experts.bits, block)
        more = [_Offsets(matrix, block) for matrix in matrices]
        offsets = self.add(
            f"{name}.offsets", self.real, blocks, lambda: place(more[0], more[1] if shared else None, self._real)
        )
        return Stored(codes, scales, experts.bits, block, offsets)

    def _values(self, matrix: Matrix) -> Values:
        return Values(matrix, _SixBits(matrix) if matrix.six_bits else matrix.data, _bytes_or_floats, _zero_points)

    def _by_row(self, name: str, shape: tuple[int, int], rows: Callable[[Callable[[Array], Array]], Any]) -> Stored:
        """FP8 codes [N, K] and scales [N] of the float values whose whole rows `rows` gives to a function."""
        real, width = _FLOATS[self.real], shape[1]
        codes = self.add(
            name,
            ir.DataType.FLOAT8E4M3FN,
            shape,
            lambda: rows(lambda part: self._fp8_codes(self._real(part).astype(np.float32).reshape(-1, width))),
        )
        scales = self.add(
            f"{name}.scales",
            self.real,
            shape[:1],
            lambda: rows(lambda part: scales_of(self._real(part).astype(np.float32).reshape(-1, width), real)),
        )
        return Stored(codes, scales, 8, width)

    def _fp8_codes(self, values: Array) -> Array:
        real = _FLOATS[self.real]
        self.squared_error += float(np.square(values - rounded(values, real), dtype=np.float64).sum())
        self.squares += float(np.square(values, dtype=np.float64).sum())
        return codes_of(values, real)

    @property
    def fp8_error(self) -> float | None:
        """Of what was written: root mean square of what rounding to FP8 moved, over that of the weights."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else None

    def heads(self, name: str, matrix: Matrix, *, turned: bool) -> ir.Value:
        """[heads, a, b] as floating point, `turned` to [heads, b, a]."""
        count, rows, width = matrix.shape
        shape = (count, width, rows) if turned else (count, rows, width)

        def chunks() -> Iterator[Array]:
            view = self._values(matrix)
            for head in range(count):
                yield self._real(view[head].T if turned else view[head])

        return self.add(name, self.real, shape, chunks)

    def head_rows(self, name: str, matrices: list[Matrix]) -> ir.Value:
        """[heads, a, r] matrices as floating point [heads * a, r], one above the other."""
        width = matrices[0].shape[2]
        rows = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)

        def chunks() -> Iterator[Array]:
            for matrix in matrices:
                for head in self._values(matrix):
                    yield self._real(head)

        return self.add(name, self.real, (rows, width), chunks)

    def padded_rows(self, name: str, matrix: ir.Value, more: int) -> ir.Value:
        """Floating point [N, K] as float32 with `more` rows of zeros."""
        assert isinstance(matrix.const_value, ir.ExternalTensor)
        rows, width = _shape_of(matrix.const_value)

        def chunks() -> Iterator[Array]:
            yield _bytes_or_floats(matrix).astype(np.float32)
            yield np.zeros((more, width), np.float32)

        return self.add(name, ir.DataType.FLOAT, (rows + more, width), chunks)

    def gate_before_up(self, name: str, biases: ir.Value) -> ir.Value:
        """float32 [E, 2I], interleaved, as [E, 2I] with each expert's gate before its up."""
        assert biases.const_value is not None
        count, double = biases.const_value.shape.numpy()

        def chunks() -> Iterator[Array]:
            yield _bytes_or_floats(biases).reshape(count, double // 2, 2).transpose(0, 2, 1)

        return self.add(name, ir.DataType.FLOAT, (count, double), chunks)

    def take_over(self, graph: ir.Graph) -> None:
        """Copy what the graph still reads from elsewhere: norms, routers, biases, orders of channels, as they are."""
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.location != self.location:
                kept = tensor.dtype in (ir.DataType.FLOAT, ir.DataType.INT64)
                assert kept and value.name is not None, f"{value} is left unlowered"
                source = ir.Value(name=value.name, const_value=tensor)
                new = self.add(value.name, tensor.dtype, _shape_of(tensor), _whole(source))
                value.const_value = new.const_value

    # the file

    def add(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], chunks: Chunks) -> ir.Value:
        """A tensor behind the last one; its bytes are made when the file is written."""
        nbytes = (math.prod(shape) * dtype.bitwidth + 7) // 8
        tensor = ir.ExternalTensor(self.location, self.nbytes, nbytes, dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.tensors.append(_Tensor(value, self.nbytes, nbytes, chunks))
        self.nbytes = -(-(self.nbytes + nbytes) // ALIGNMENT) * ALIGNMENT
        return value

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """Write all tensors.

        Raises:
            BuildError: a weight that half precision cannot hold.
        """
        with path.open("wb") as stream:
            for tensor in self.tensors:
                stream.write(bytes(tensor.offset - stream.tell()))
                for chunk in tensor.chunks():
                    stream.write(np.ascontiguousarray(chunk).data)
                    if progress is not None:
                        progress("laying out weights", stream.tell(), self.nbytes)
                written = stream.tell() - tensor.offset
                assert written == tensor.nbytes, f"{tensor.value.name}: {written} bytes, {tensor.nbytes} planned"

    def _real(self, part: Array) -> Array:
        values = part.astype(_FLOATS[self.real])
        if not np.isfinite(values).all():
            raise BuildError(
                "a weight exceeds 65504, the largest number of half precision; this target computes in fp16: build for "
                "a profile of the onnxruntime target (moedge build ... --profile cpu)"
            )
        return values

    def _scales(self, part: Array, block: int, narrower: int, name: str) -> Array:
        """Scales as `real`, each given to every part of its block. Zero is refused by TensorRT, so none underflows."""
        values = self._real(np.repeat(part, block // narrower, axis=-1))
        clamped: Array = np.maximum(values, np.finfo(values.dtype).smallest_subnormal)
        return clamped


@dataclass(frozen=True)
class _SixBits:
    """Codes of 6 bits that are to be 8-bit ones; stands for the value of their bytes."""

    matrix: Matrix


class _SixBitRows:
    """The 8-bit codes of mapped bytes [3, N, K / 4], rows by slices."""

    itemsize = 1

    def __init__(self, matrix: Matrix) -> None:
        if matrix.six_bits != SIX_BITS:
            raise BuildError(
                "the head's 6-bit codes lie as an earlier version of moedge wrote them, and only --profile cpu still "
                "takes them; export the bundle again"
            )
        self.shape = matrix.shape
        self.upper, self.lower = split_int6(_bytes_or_floats(matrix.data))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        return widen_int6(self.upper[rows], self.lower[rows])


class _Float8Rows:
    """The float32 scales of a mapped view of float8 ones, rows by indices."""

    itemsize = 4

    def __init__(self, packed: Array) -> None:
        self.packed = packed
        self.shape = packed.shape

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, key: Any) -> Array:
        scales: Array = FLOAT8[self.packed[key]]
        return scales

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:]


@dataclass(frozen=True)
class _Narrowed:
    """Scales of a matrix, repeated for a narrower block; stands for the value of the scales."""

    matrix: Matrix
    block: int


@dataclass(frozen=True)
class _Offsets:
    """Offsets of a matrix, repeated for a narrower block."""

    matrix: Matrix
    block: int

    def read(self) -> Array:
        """float32, shaped like the repeated scales."""
        matrix, middle = self.matrix, 1 << (self.matrix.bits - 1)
        assert matrix.scales is not None
        scales = np.asarray(_bytes_or_floats(Scales(matrix.scales)))
        if matrix.symmetric or matrix.zero_points is None:
            offsets = np.zeros(scales.shape, np.float32)
        else:
            offsets = scales * (np.float32(middle) - _zero_points(matrix.zero_points).reshape(scales.shape))
        return np.repeat(offsets, matrix.block_size // self.block, axis=-1)


def _zero_points(value: ir.Value) -> Array:
    """uint8 [n], one for each group, of a tensor that packs two of 4 bits into a byte, the low one first."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.length is not None
    held = np.memmap(tensor.path, dtype=np.uint8, mode="r", offset=tensor.offset or 0, shape=(tensor.length,))
    if tensor.dtype != ir.DataType.UINT4:
        return held
    pairs = np.stack([held & 15, held >> 4], axis=-1).reshape(-1)
    points: Array = pairs[: math.prod(_shape_of(tensor))]
    return points


def _split_block(block: int, width: int) -> int:
    """A single block as wide as the row is not fused by TensorRT (TENSORRT.md, Q6): halve it, the scales repeat."""
    return block // 2 if block == width else block


def _scales_of(matrices: list[Matrix]) -> list[Scales]:
    return [Scales(matrix.scales) for matrix in matrices if matrix.scales is not None]


def _stored_bits(matrix: Matrix) -> int:
    return 8 if matrix.six_bits else matrix.bits


def _flip_of(matrix: Matrix) -> Callable[[Array], Array]:
    flip = np.uint8(_FLIP[_stored_bits(matrix)])
    return lambda part: part ^ flip


def _bytes_or_floats(source: Any) -> Any:
    """A mapped view [..., width]: codes as bytes (two INT4 each), floats as they are."""
    if isinstance(source, Values):
        return source
    if isinstance(source, _Offsets):
        return source.read()
    if isinstance(source, _SixBits):
        return _SixBitRows(source.matrix)
    if isinstance(source, _Narrowed):
        assert source.matrix.scales is not None
        view = np.asarray(_bytes_or_floats(Scales(source.matrix.scales)))
        return np.repeat(view, source.matrix.block_size // source.block, axis=-1)
    if isinstance(source, Scales):
        view = _bytes_or_floats(source.stored)
        return _Float8Rows(view) if source.stored.dtype == ir.DataType.UINT8 else view
    tensor = source.const_value
    if not isinstance(tensor, ir.ExternalTensor):  # a part that was copied
        return tensor.numpy()
    assert tensor.length is not None
    shape = _shape_of(tensor)
    others = {ir.DataType.BFLOAT16: tensor.dtype.numpy(), ir.DataType.INT64: np.int64}
    dtype: Any = {**_FLOATS, **others}.get(tensor.dtype, np.uint8)
    if tensor.dtype == ir.DataType.UINT4:
        shape = (*shape[:-1], shape[-1] // 2)
    return np.memmap(tensor.path, dtype=dtype, mode="r", offset=tensor.offset or 0, shape=shape)


def _shape_of(tensor: ir.ExternalTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())


def _whole(source: ir.Value) -> Chunks:
    return lambda: iter([_bytes_or_floats(source)])


def _each_row(
    sources: Sequence[ir.Value | _Offsets | _SixBits | Scales | Values], change: Callable[[Array], Array]
) -> Chunks:
    """Rows of [N, width] matrices in order, `change`d."""

    def chunks() -> Iterator[Array]:
        for source in sources:
            view = _bytes_or_floats(source)
            step = max(1, _CHUNK_BYTES // (view.shape[1] * view.itemsize))
            for start in range(0, len(view), step):
                yield change(view[start : start + step])

    return chunks
