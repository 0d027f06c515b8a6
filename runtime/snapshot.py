"""A context on disk: tokens, their cache rows, and the logits after the prompt.

The file: 8 bytes of magic, the header's length (8 bytes, little-endian), the header (JSON), then the arrays one
behind the other, and at the end the sha256 of everything before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import staged_file
from ..errors import EngineError

if TYPE_CHECKING:
    from ..bundle import Bundle
    from .context import Context
    from .preflight import EngineInfo

_MAGIC = b"moedgeC1"
_DIGEST = hashlib.sha256().digest_size


def write_snapshot(bundle: Bundle, info: EngineInfo, context: Context, path: Path) -> int:
    """Write the prompt in `context` to `path`; how many tokens it has."""
    after = context.after_prompt
    if after is None or after[0] > len(context.tokens):
        raise EngineError("there is no prompt in the context to save; generate from one first")
    count, logits = after
    arrays = [*context.session.read_rows(0, count), logits]
    header = {
        "made_by": _identity(bundle, info),
        "tokens": context.tokens[:count],
        "exact": min(context.exact, count),
        "arrays": [{"shape": list(array.shape), "dtype": str(array.dtype)} for array in arrays],
    }
    encoded = json.dumps(header).encode()
    digest = hashlib.sha256()
    with staged_file(path) as staged, staged.open("wb") as stream:
        for part in (_MAGIC, len(encoded).to_bytes(8, "little"), encoded, *(array.tobytes() for array in arrays)):
            digest.update(part)
            stream.write(part)
        stream.write(digest.digest())
    return count


def read_snapshot(bundle: Bundle, info: EngineInfo, context: Context, path: Path) -> int:
    """Put what `path` holds into `context`; how many tokens."""
    try:
        with path.open("rb") as stream:
            content = stream.read(len(_MAGIC))
            if content == _MAGIC:  # whatever else it is may be larger than the memory
                content += stream.read()
    except (FileNotFoundError, IsADirectoryError):
        raise EngineError(f"there is no snapshot at {path}; write one: engine.save_snapshot(...)") from None
    except OSError as error:
        text = f"{path} cannot be read ({error.strerror}); write another: engine.save_snapshot(...)"
        raise EngineError(text) from None
    header, place = _checked_header(content, path)
    if header.get("made_by") != _identity(bundle, info):
        made_by = header.get("made_by")
        model, profile = (made_by.get(name) if isinstance(made_by, dict) else None for name in ("model", "profile"))
        raise EngineError(
            f"{path} was saved with another bundle or engine ({model}, engine '{profile}'); "
            f"save one with {bundle.path}: engine.save_snapshot(...)"
        )
    try:
        tokens, exact = _checked_tokens(header, info)
        arrays = _read_arrays(header, content[place:-_DIGEST])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineError(f"{path} is no snapshot ({error}); write it again: engine.save_snapshot(...)") from None
    if len(tokens) > context.session.capacity:
        raise EngineError(
            f"{path} has {len(tokens)} tokens and the context has room for {context.session.capacity}; "
            "load the engine with a larger max_seq_len"
        )
    empty = context.session.read_rows(0, 0)
    expected = [(*part.shape[:-2], len(tokens), part.shape[-1], part.dtype) for part in empty]
    if [(*part.shape, part.dtype) for part in arrays] != [*expected, (info.vocab_size, np.dtype(np.float32))]:
        raise EngineError(f"{path} holds another cache than this engine's; write it again: engine.save_snapshot(...)")
    context.restore(tokens, arrays[:-1], exact, (len(tokens), arrays[-1].copy()))
    return len(tokens)


def _checked_tokens(header: dict[str, Any], info: EngineInfo) -> tuple[list[int], int]:
    """The tokens, and how many of them were computed as whole chunks. The checksum says that a file is whole, not that
    it was written here."""
    tokens, exact = header["tokens"], header["exact"]
    good = all(type(token) is int and 0 <= token < info.vocab_size for token in tokens)
    if not tokens or not good or type(exact) is not int or not 0 <= exact <= len(tokens):
        raise ValueError("tokens out of range")
    return list(tokens), exact


def _read_arrays(header: dict[str, Any], content: bytes) -> list[NDArray[Any]]:
    arrays: list[NDArray[Any]] = []
    place = 0
    for entry in header["arrays"]:
        kind, shape = np.dtype(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        count = math.prod(shape)
        if kind.hasobject or min(shape, default=0) < 0 or place + count * kind.itemsize > len(content):
            raise ValueError("an array is larger than the file")
        arrays.append(np.frombuffer(content, kind, count, place).reshape(shape))
        place += arrays[-1].nbytes
    return arrays


def _checked_header(content: bytes, path: Path) -> tuple[dict[str, Any], int]:
    """The header of a whole and undamaged file, and where its arrays begin."""
    if not content.startswith(_MAGIC):
        raise EngineError(f"{path} is no snapshot of this version of moedge; write one: engine.save_snapshot(...)")
    if len(content) < 16 + _DIGEST or hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        raise EngineError(f"{path} is damaged (its checksum is wrong); write it again: engine.save_snapshot(...)")
    length = int.from_bytes(content[8:16], "little")
    try:
        header = json.loads(content[16 : 16 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise EngineError(f"{path} is no snapshot (it has no header); write it again: engine.save_snapshot(...)")
    return header, 16 + length


def _identity(bundle: Bundle, info: EngineInfo) -> dict[str, Any]:
    """What computed the rows: they mean nothing to other weights, and little to another graph."""
    return {
        "model": str(bundle.manifest["model"]["name"]),
        "profile": info.profile,
        "made_from": dict(info.made_from),
        "files": {name: entry["sha256"] for name, entry in info.files.items()},
        "backend": f"{info.backend} {info.backend_version}",
    }
