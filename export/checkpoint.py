"""Reading a Hugging Face checkpoint folder one tensor at a time.

The safetensors header is read and checked here, and tensors are read with plain file reads: the library maps
whole files, which counts the model into the process's resident memory, and its numpy side has no FP8.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..bundle import MANIFEST, read_json
from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

Array = np.ndarray[Any, Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `offset` and `nbytes` within the file `shard`."""

    shard: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, every offset checked against the file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header contradicts itself or the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: truncated or not safetensors (a header of {length} bytes announced, the file has "
                    f"{size}); download it again"
                )
            raw = stream.read(length)
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read ({cause.strerror}); download the checkpoint again") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the safetensors header is not JSON; download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not an object; download it again")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _read_entry(path, name, entry, start, size) for name, entry in header.items()}
    _check_overlaps(path, entries)
    return entries


def _read_entry(path: Path, name: str, entry: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry; download it again") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known: {known}")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) or len(shape) > 8:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry; download it again")
    if end > size - start or begin > end:
        raise CheckpointError(
            f"{path}: truncated: tensor {name!r} ends at byte {start + end}, the file has {size}; download it again"
        )
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name!r} has {end - begin} bytes, its shape {list(shape)} as {dtype} needs "
            f"{math.prod(shape) * _DTYPES[dtype].itemsize}; download it again"
        )
    return TensorEntry(path, _DTYPES[dtype], tuple(shape), start + begin, end - begin)


def _check_overlaps(path: Path, entries: dict[str, TensorEntry]) -> None:
    previous_end, previous_name = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.nbytes and entry.offset < previous_end:
            raise CheckpointError(f"{path}: tensors {previous_name!r} and {name!r} overlap; download it again")
        if entry.nbytes:
            previous_end, previous_name = entry.offset + entry.nbytes, name


class Checkpoint:
    """A checkpoint folder: its config and its tensors by name."""

    def __init__(self, path: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> None:
        self.path = path
        self.config = config
        self.entries = entries
        self.whole: list[tuple[Any, Array]] = []  # what is read whole and used in parts: (what it is, values)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read config.json and every safetensors header.

        Raises:
            CheckpointError: the folder, config.json or weights are missing or malformed.
        """
        root = Path(path)
        if root.exists() and not root.is_dir():
            raise CheckpointError(f"{root} is a file, not a folder; name the folder that it lies in")
        if not root.is_dir():
            raise CheckpointError(
                f"{root}: no such folder; a Hugging Face checkpoint folder (config.json, *.safetensors) was expected"
                + (", or my_package.my_module:build_model of a PyTorch model" if ":" in root.name else "")
            )
        if (root / MANIFEST).is_file():
            raise CheckpointError(
                f"{root} is a bundle already: make an engine of it with moedge build {root} --profile cpu, or name the "
                "checkpoint that it was made from"
            )
        if not (root / "config.json").is_file():
            held = sorted(entry.name for entry in root.iterdir())[:5]
            raise CheckpointError(
                f"{root} has no config.json (it holds: {', '.join(held) or 'nothing'}); "
                "name a Hugging Face checkpoint folder"
            )
        config = read_json(root / "config.json", CheckpointError)
        entries: dict[str, TensorEntry] = {}
        for shard in _find_shards(root):
            for name, entry in read_header(shard).items():
                if name in entries:
                    raise CheckpointError(f"tensor {name!r} is in both {entries[name].shard.name} and {shard.name}")
                entries[name] = entry
        return cls(root, config, entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(
        self, name: str, start: int = 0, stop: int | None = None, view: tuple[int, ...] | None = None
    ) -> Array:
        """Rows `start` to `stop` of a tensor's first axis, in its own dtype; a fresh array, nothing else is read.

        `view`: another shape of the same number of elements, whose rows are meant.
        """
        entry = self.entries[name]
        shape = entry.shape if view is None else view
        rows = shape[0] if shape else 1
        stop = rows if stop is None or not shape else min(stop, rows)
        row_bytes = entry.nbytes // rows if rows else 0
        wanted = (stop - start) * row_bytes
        with entry.shard.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + start * row_bytes)
            data = _read_exactly(stream, wanted, entry.shard)
        return np.frombuffer(data, dtype=entry.dtype).reshape((stop - start, *shape[1:]) if shape else ())

    def fingerprint(self) -> str:
        """SHA-256 over the config and each tensor's name, dtype, shape and place: cheap to make."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name}:{entry.dtype}:{entry.shape}:{entry.shard.name}:{entry.offset}".encode())
        return digest.hexdigest()


def _read_exactly(stream: Any, wanted: int, path: Path) -> bytearray:
    data = bytearray(wanted)
    view = memoryview(data)
    done = 0
    while done < wanted:
        count = stream.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{path}: ended {wanted - done} bytes early; download it again")
        done += count
    return data


def _find_shards(root: Path) -> list[Path]:
    if (root / INDEX).is_file():
        index = read_json(root / INDEX, CheckpointError)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise CheckpointError(f"{root / INDEX}: weight_map is missing or malformed; download it again")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{root / INDEX}: shard {outside[0]!r} is not a file name; download it again")
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{root}: {len(missing)} of {len(names)} shards named by {INDEX} are missing, first {missing[0]}; "
                "download the checkpoint again"
            )
        return [root / name for name in names]
    if (root / SINGLE).is_file():
        return [root / SINGLE]
    other = sorted(entry.name for entry in root.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".gguf"))
    also = f" (found {', '.join(other[:3])}: convert to safetensors first)" if other else ""
    raise CheckpointError(f"{root} has neither {SINGLE} nor {INDEX}{also}")
