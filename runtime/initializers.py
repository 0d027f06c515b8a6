"""Where a graph's tensors lie in weights.bin, read straight from the ONNX file, so that checking needs no onnx package.

An ONNX file is a protobuf message; of its fields only those on the way to a tensor's place are read
(onnx.proto3: ModelProto.graph 7, GraphProto.initializer 5, TensorProto's dims 1, name 8, external_data 13).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleError

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _NAME, _EXTERNAL = 1, 8, 13
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


@dataclass(frozen=True)
class Placed:
    """A tensor in an external file: `length` bytes from `offset` of `location`."""

    name: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def read_placed(path: Path) -> list[Placed]:
    """The tensors of an ONNX file that lie in external files.

    Raises:
        BundleError: it is no ONNX file.
    """
    placed = []
    try:
        for field, graph in _fields(memoryview(path.read_bytes())):
            if field != _GRAPH or isinstance(graph, int):
                continue
            for inner, tensor in _fields(graph):
                if inner == _INITIALIZER and not isinstance(tensor, int):
                    found = _placed(tensor)
                    if found is not None:
                        placed.append(found)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a readable ONNX file ({error}); export the bundle again") from error
    return placed


def _placed(tensor: memoryview) -> Placed | None:
    dims: list[int] = []
    name, external = "", dict[str, str]()
    for field, value in _fields(tensor):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else [number for number, _ in _varints(value)]
        elif field == _NAME and not isinstance(value, int):
            name = str(value, "utf-8")
        elif field == _EXTERNAL and not isinstance(value, int):
            entry = {key: str(text, "utf-8") for key, text in _fields(value) if not isinstance(text, int)}
            external[entry[_KEY]] = entry.get(_VALUE, "")
    if not external:
        return None
    return Placed(name, tuple(dims), external["location"], int(external.get("offset", 0)), int(external["length"]))


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; fixed-width values, which nothing here needs, come as their bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} goes past the end")
        yield tag >> 3, message[at : at + size]
        at += size


def _varints(message: memoryview) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value, at


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
