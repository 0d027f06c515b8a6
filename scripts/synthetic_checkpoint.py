"""Write a random checkpoint of any configuration: python scripts/synthetic_checkpoint.py CONFIG OUT

CONFIG is a config.json or the name of a real shape (see --help). The tensors, their names and shapes come from the
family's own plan, so that every family of `moedge export` works. Sharded bf16 safetensors; nothing but one block of
random numbers is held in memory, and the same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import explain_missing  # noqa: F401
import ml_dtypes
import numpy as np

from moedge.errors import MoedgeError
from moedge.export.checkpoint import INDEX, Checkpoint
from moedge.export.families import find_family
from moedge.export.memory import parse_size
from moedge.export.weights import Weight
from moedge.progress import Progress, console_progress

SHAPES = Path(__file__).with_name("real_shapes.json")
# A prime: whatever a row's width, its rows begin at ever other places of the block.
BLOCK = 4_194_301
_SAFETENSORS = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float32): "F32"}


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor, and the distribution of its values: mean and standard deviation."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    mean: float
    deviation: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    config: dict[str, Any], folder: Path, seed: int = 0, shard_bytes: int = 4 << 30, progress: Progress | None = None
) -> int:
    """Write `folder`, which must be empty or new; returns the bytes of the tensors.

    Raises:
        CheckpointError: the configuration is of no known family, or contradicts itself.
        FileExistsError: the folder holds files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    sources = list_sources(config, folder)
    shards = list(_split(sources, shard_bytes))
    total = sum(source.nbytes for source in sources)
    blocks = _Blocks(seed)
    done, weight_map = 0, {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as stream:
            _write_header(stream, shard)
            for source in shard:
                blocks.write(stream, source)
                weight_map[source.name] = name
                done += source.nbytes
                if progress is not None:
                    progress("writing a random checkpoint", done, total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return total


def list_sources(config: dict[str, Any], folder: Path) -> list[Source]:
    """Every tensor that the family's plan reads, once."""
    checkpoint = Checkpoint(folder, config, {})
    family = find_family(checkpoint)
    sources: dict[str, Source] = {}
    for weight in family.plan_weights(family.read_config(checkpoint)):
        for piece in weight.pieces():
            sources.setdefault(piece.source, _make_source(weight, piece.source, piece.shape))
    return list(sources.values())


def _make_source(weight: Weight, name: str, shape: tuple[int, ...]) -> Source:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    if weight.role == "norm":
        return Source(name, shape, bfloat16, 1.0, 0.1)
    if len(shape) == 1:  # DeepSeek-V3 ships its correction biases in fp32
        is_correction = weight.name.endswith("router.bias")
        return Source(name, shape, np.dtype(np.float32) if is_correction else bfloat16, 0.0, 0.02)
    return Source(name, shape, bfloat16, 0.0, (1.5 / shape[-1]) ** 0.5)


class _Blocks:
    """One block of normal numbers, scaled for each distribution in use; a tensor begins at a place of its own."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.normal = np.random.default_rng(seed).standard_normal(BLOCK, np.float32)
        self.scaled: dict[tuple[np.dtype[Any], float, float], bytes] = {}

    def write(self, stream: BinaryIO, source: Source) -> None:
        key = (source.dtype, source.mean, source.deviation)
        if key not in self.scaled:
            values = self.normal * np.float32(source.deviation) + np.float32(source.mean)
            self.scaled[key] = values.astype(source.dtype).tobytes()
        block = memoryview(self.scaled[key])
        start = zlib.crc32(f"{self.seed}:{source.name}".encode()) % BLOCK * source.dtype.itemsize
        left = source.nbytes
        while left:
            part = block[start : start + left]
            stream.write(part)
            left -= len(part)
            start = 0


def _split(sources: list[Source], limit: int) -> Iterator[list[Source]]:
    shard: list[Source] = []
    held = 0
    for source in sources:
        if shard and held + source.nbytes > limit:
            yield shard
            shard, held = [], 0
        shard.append(source)
        held += source.nbytes
    yield shard


def _write_header(stream: BinaryIO, shard: list[Source]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source in shard:
        place = [offset, offset + source.nbytes]
        header[source.name] = {"dtype": _SAFETENSORS[source.dtype], "shape": source.shape, "data_offsets": place}
        offset = place[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(len(raw).to_bytes(8, "little") + raw)


def read_shape(name: str, layers: int | None = None) -> dict[str, Any]:
    """A configuration by the name of its shape or the path of its config.json, `layers` in place of its own count."""
    shapes: dict[str, dict[str, Any]] = json.loads(SHAPES.read_text())
    config = shapes[name] if name in shapes else json.loads(Path(name).read_text())
    return config if layers is None else {**config, "num_hidden_layers": layers}


def main() -> int:
    names = ", ".join(json.loads(SHAPES.read_text()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help=f"a config.json, or one of: {names}")
    parser.add_argument("out", metavar="OUT", type=Path, help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="so many decoder layers instead of the shape's own")
    parser.add_argument("--shard-size", default="4GiB", help="largest file (default: 4GiB)")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        config = read_shape(arguments.config, arguments.layers)
        with console_progress() as progress:
            total = write_checkpoint(config, arguments.out, arguments.seed, parse_size(arguments.shard_size), progress)
    except (MoedgeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    print(f"{arguments.out}: {total / 1e9:.1f} GB in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
