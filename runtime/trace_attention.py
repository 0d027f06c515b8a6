"""Attention in a trace, by choice: which earlier tokens each token looked at, in the layers and heads asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, UsageError
from .engine import Engine

MAX_TOKENS = 256  # of a text; a picture of more shows nothing
_MAX_PICTURES = 128

# Layer -> heads, None: all of them.
Choice = Mapping[int, Sequence[int] | None]


@dataclass(frozen=True)
class AttentionMap:
    """One head: `weights` [T, T], a row a token that looks, a column a token that is looked at."""

    layer: int
    head: int
    weights: NDArray[np.float32]

    def to_json(self) -> dict[str, Any]:
        rows = [[round(float(value), 5) for value in row[: index + 1]] for index, row in enumerate(self.weights)]
        return {"layer": self.layer, "head": self.head, "weights": rows}


def parse_choice(texts: Sequence[str]) -> dict[int, list[int] | None]:
    """What `--attention LAYER` and `--attention LAYER:HEAD,HEAD` ask for.

    Raises:
        UsageError: something else.
    """
    found: dict[int, list[int] | None] = {}
    for text in texts:
        layer, colon, heads = text.partition(":")
        words = [layer, *(heads.split(",") if colon else [])]
        if not all(word.strip().isdecimal() for word in words):
            raise UsageError(f"attention {text!r}: give LAYER or LAYER:HEAD,HEAD, such as 3 or 3:0,2")
        numbers = [int(word) for word in words]
        found[numbers[0]] = sorted(set(numbers[1:])) if colon else None
    return found


def check_choice(engine: Engine, choice: Choice) -> None:
    """Raises UsageError where a layer or head is not there, EngineError where the engine cannot be looked into."""
    if engine.info.backend != "onnxruntime":
        raise EngineError(
            f"attention of engine '{engine.profile}' ({engine.info.backend}) cannot be looked at; use --profile cpu"
        )
    config = engine.bundle.config
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    for layer, asked in choice.items():
        if layer >= layers:
            raise UsageError(f"attention of layer {layer}: this model has layers 0 to {layers - 1}")
        if asked is not None and (not asked or max(asked) >= heads):
            raise UsageError(f"attention of layer {layer}, head {max(asked, default='')}: it has 0 to {heads - 1}")
    pictures = sum(heads if asked is None else len(asked) for asked in choice.values())
    if pictures > _MAX_PICTURES:
        raise UsageError(f"{pictures} pictures of attention; at most {_MAX_PICTURES}: name heads, as in 3:0,2")


def read_maps(engine: Engine, ids: Sequence[int], choice: Choice) -> list[AttentionMap]:
    """The heads asked for over the first tokens of a text, up to MAX_TOKENS and the context's room."""
    from .sessions.onnxruntime_attention import read_attention

    tokens = np.array(ids[: min(MAX_TOKENS, engine.session.capacity)], np.int64)
    layers = sorted(choice)
    found = read_attention(engine.bundle, engine.info, tokens, layers, engine.session.threads)
    maps = []
    for layer in layers:
        heads = choice[layer]
        for head in range(len(found[layer])) if heads is None else heads:
            maps.append(AttentionMap(layer, head, found[layer][head]))
    return maps
