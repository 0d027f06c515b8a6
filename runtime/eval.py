"""`moedge eval`: how well a bundle predicts a text, and how near it comes to a checkpoint or to another bundle.

Every token of the text is scored exactly once, in windows of `context` tokens that advance by `stride`, so that each
has `context - stride` tokens before it where they exist. The text stands behind the model's begin-of-text token (its
end-of-text token where it has none), so its first token is scored too; targets equal to that token spell no byte and
are left out. Bits per byte is all nats over ln 2 over the UTF-8 bytes: it compares models of different tokenizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import MANIFEST, Bundle, Progress, read_json
from ..errors import CheckpointError, EngineError, UsageError, require
from . import machine
from .engine import Engine, load
from .provenance import describe_run
from .trace_load import LoadCounter

SCHEMA = 1
CONTEXT = 512
# Values of logits looked at together: float64 copies of a whole window would be a gigabyte with a large vocabulary.
_VALUES_AT_ONCE = 1 << 22
_LARGEST_TEXT = 256 << 20  # bytes

LogitsOf = Callable[[NDArray[np.int64]], NDArray[np.float32]]  # [S] ids to [S, vocab]
_TEXT_HINT = "give a UTF-8 text file"


@dataclass
class Agreement:
    """What is gathered of the tokens scored: nats of the model and of the reference, and how the two differ."""

    nats: float = 0.0
    scored: int = 0
    reference_nats: float = 0.0
    same_top: int = 0
    divergences: list[NDArray[np.float64]] = field(default_factory=list)

    def to_json(self, name: str, kind: str, size: int) -> dict[str, Any]:
        divergence = np.concatenate(self.divergences)
        p50, p99 = np.percentile(divergence, (50, 99))
        return {
            "name": name,
            "kind": kind,
            **_quality(self.reference_nats, self.scored, size),
            "top1_agreement": self.same_top / self.scored,
            "kl_nats": {
                "mean": float(divergence.mean()),
                "p50": float(p50),
                "p99": float(p99),
                "max": float(divergence.max()),
            },
        }


@dataclass(frozen=True)
class Reference:
    """What a bundle is compared with."""

    name: str
    kind: str  # "bundle" or "checkpoint"
    logits: LogitsOf


def evaluate(
    bundle: str | os.PathLike[str] | Bundle,
    text: str,
    profile: str | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    threads: int | None = None,
    text_name: str = "text",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score `text` with an engine of `bundle`; the document of `moedge eval --json`.

    against: another bundle, or a checkpoint folder (run by transformers in float32).
    context: tokens of a window; default: 512, or the engine's room where that is less. stride: default: half of it.

    Raises:
        UsageError: context or stride out of range, or a text without tokens. EngineError: what `moedge.load` raises, or
        a reference with another vocabulary. DependencyError: a checkpoint without transformers.
    """
    began = time.monotonic()
    with load(bundle, profile, threads=threads) as engine:
        context, stride = _check_window(engine, context, stride)
        stream, unscored = make_stream(engine, text)
        with _open_reference(against, engine, context, threads) as reference:
            found = _score(engine, reference, stream, unscored, context, stride, progress)
        size = len(text.encode())
        result = {
            **describe_run(engine, "eval", SCHEMA),
            "text": text_name,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bytes": size,
            "tokens": len(stream) - 1,
            "scored_tokens": found.scored,
            "context": context,
            "stride": stride,
            "nats": found.nats,
            **_quality(found.nats, found.scored, size),
            "against": None if reference is None else found.to_json(reference.name, reference.kind, size),
            "routing": _routing(engine, stream, context, progress),
            "seconds": 0.0,
        }
    return result | {"seconds": time.monotonic() - began}


def read_text_file(path: Path) -> str:
    """The text in a UTF-8 file, its line ends unchanged.

    Raises:
        UsageError: no such file, not readable, empty, not text, or larger than anybody waits for.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST_TEXT + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; {_TEXT_HINT}") from None
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror}); {_TEXT_HINT}") from None
    if len(raw) > _LARGEST_TEXT:
        raise UsageError(f"{path} is larger than {_LARGEST_TEXT >> 20} MiB; {_TEXT_HINT} of a part of it")
    if not raw:
        raise UsageError(f"{path} is empty; {_TEXT_HINT}")
    if b"\0" in raw:
        raise UsageError(f"{path} is not text (byte {raw.index(0)} is zero); {_TEXT_HINT}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (byte {error.start}); {_TEXT_HINT}, converted if need be") from None


def make_stream(engine: Engine, text: str) -> tuple[NDArray[np.int64], int]:
    """(token ids [1 + tokens] behind the begin-of-text token, that token).

    Raises:
        UsageError: the text has no tokens. EngineError: the model has neither a begin- nor an end-of-text token.
    """
    ids = engine.tokenizer.encode(text, special=False)
    if not ids:
        raise UsageError("the text has no tokens; give a longer one")
    start = start_token(engine)
    return np.array([start, *ids], np.int64), start


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) over a stream of `count` tokens: each but the first is a target exactly once."""
    overlap = context - stride
    for start in range(0, max(1, count - overlap - 1), stride):
        yield start, min(start + context, count - 1), start + (overlap if start else 0)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of probabilities [rows, vocab]."""
    values = np.asarray(logits, np.float64)
    values = values - values.max(-1, keepdims=True)
    result: NDArray[np.float64] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    return result


def _score(
    engine: Engine,
    reference: Reference | None,
    stream: NDArray[np.int64],
    unscored: int,
    context: int,
    stride: int,
    progress: Progress | None,
) -> Agreement:
    found = Agreement()
    for start, stop, first in windows(len(stream), context, stride):
        if progress is not None:
            progress("scoring tokens", first, len(stream) - 1)
        ids = stream[start:stop]
        targets = stream[first + 1 : stop + 1]
        ours = engine.logits(ids)[first - start :]
        theirs = None if reference is None else reference.logits(ids)[first - start :]
        rows = max(1, _VALUES_AT_ONCE // ours.shape[1])
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            keep = targets[part] != unscored
            other = None if theirs is None else theirs[part][keep]
            _add(found, targets[part][keep], ours[part][keep], other)
    if not found.scored:
        raise UsageError("the text has no tokens that can be scored; give a longer one")
    if progress is not None:
        progress("scoring tokens", len(stream) - 1, len(stream) - 1)
    return found


def _add(
    found: Agreement, targets: NDArray[np.int64], logits: NDArray[np.float32], reference: NDArray[np.float32] | None
) -> None:
    places = np.arange(len(targets))
    ours = log_softmax(logits)
    found.nats -= float(ours[places, targets].sum())
    found.scored += len(targets)
    if reference is not None:
        theirs = log_softmax(reference)
        found.reference_nats -= float(theirs[places, targets].sum())
        found.same_top += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        # KL(reference || model); rounding may leave a tiny negative where the two are the same.
        divergence = (np.exp(theirs) * (theirs - ours)).sum(-1)
        found.divergences.append(np.maximum(divergence, 0.0))


def _routing(
    engine: Engine, stream: NDArray[np.int64], context: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """Load figures for each MoE layer, every token routed once."""
    layers = engine.info.moe_layers
    if not layers:
        return []
    counter = LoadCounter(layers, engine.info.num_experts)
    for start in range(0, len(stream) - 1, context):
        if progress is not None:
            progress("following the routes", start, len(stream) - 1)
        counter.add(engine.routing(stream[start : min(start + context, len(stream) - 1)]))
    if progress is not None:
        progress("following the routes", len(stream) - 1, len(stream) - 1)
    return [load_of.to_json() for load_of in counter.loads()]


def _quality(nats: float, scored: int, size: int) -> dict[str, Any]:
    per_token = nats / scored
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(per_token) if per_token < 700 else None,
    }


def start_token(engine: Engine) -> int:
    """The token that stands before a text: begin-of-text, else end-of-text.

    Raises:
        EngineError: the model has neither.
    """
    names = ("config.json", "generation_config.json")
    documents = [read_json(path) for name in names if (path := engine.bundle.file(name)).is_file()]
    for document in documents:
        if isinstance(document.get("bos_token_id"), int):
            return int(document["bos_token_id"])
    ends = sorted(engine.eos_token_ids)
    if not ends:
        raise EngineError(
            f"{engine.bundle.path}/config.json has neither bos_token_id nor eos_token_id: nothing stands before the "
            "text's first token; put one into the checkpoint's config.json and export it again"
        )
    return ends[0]


def _check_window(engine: Engine, context: int | None, stride: int | None) -> tuple[int, int]:
    room = engine.session.capacity
    if context is None:
        context = min(CONTEXT, room)
    if not 1 <= context <= room:
        raise UsageError(f"context is {context}; engine '{engine.profile}' has room for 1 to {room} tokens")
    if stride is None:
        stride = max(1, context // 2)
    if not 1 <= stride <= context:
        raise UsageError(f"stride is {stride}; it must be from 1 to the context ({context})")
    return context, stride


@contextlib.contextmanager
def _open_reference(
    path: str | os.PathLike[str] | None, engine: Engine, context: int, threads: int | None
) -> Iterator[Reference | None]:
    if path is None:
        yield None
        return
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        reference = _checkpoint_reference(folder, threads)
        _check_vocabulary(engine, folder, int(reference.logits(np.zeros(1, np.int64)).shape[-1]))
        yield reference
        return
    with load(folder, threads=threads) as other:
        _check_vocabulary(engine, folder, other.info.vocab_size)
        room = other.session.capacity
        if room < context:
            raise EngineError(
                f"{folder}: engine '{other.profile}' has room for {room} tokens, the context is {context}; use "
                f"--context {room}, or build it for more: moedge build {folder} --profile {other.profile} "
                f"--max-seq-len {context}"
            )
        yield Reference(str(other.bundle.manifest["model"]["name"]), "bundle", other.logits)


def _check_vocabulary(engine: Engine, folder: Path, vocabulary: int) -> None:
    if vocabulary != engine.info.vocab_size:
        raise EngineError(
            f"{folder} has {vocabulary} tokens and {engine.bundle.path} {engine.info.vocab_size}: they are not of one "
            "model, and only bits per byte compares them; evaluate each by itself"
        )


def _checkpoint_reference(folder: Path, threads: int | None) -> Reference:
    """The checkpoint under transformers, float32 on the CPU.

    Raises:
        CheckpointError: transformers cannot load it. DependencyError: torch or transformers is not installed.
    """
    purpose = "run a checkpoint as the reference"
    torch = require("torch", "eval", purpose)
    transformers = require("transformers", "eval", purpose)
    torch.set_num_threads(threads or machine.default_threads())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        ).eval()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and safetensors' own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} cannot load it ({first}); compare with a bundle of it"
        ) from error

    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            values: NDArray[np.float32] = model(torch.from_numpy(ids.copy())[None]).logits[0].float().numpy()
        return values

    return Reference(folder.name, "checkpoint", logits)
