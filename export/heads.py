"""The head in fewer bits than the embedding; where the checkpoint ties the two, in a copy of its own."""

from __future__ import annotations

import dataclasses

from ..errors import CheckpointError
from .config import MoEConfig
from .options import HEAD, HEAD_CHOICES
from .weights import Weight

_EMBEDDING, _HEAD = "embed.weight", "head.weight"


def choose_head(weights: str, head: str | None) -> str:
    """How the head is stored: as asked or the default where weights are int4, else as they are.

    Raises:
        CheckpointError: it is not known, or is for other weights.
    """
    if head is None:
        return HEAD if weights == "int4" else weights
    if head not in HEAD_CHOICES:
        raise CheckpointError(f"head {head!r} is not known; known: {', '.join(HEAD_CHOICES)}")
    if weights != "int4" and head != weights:
        raise CheckpointError(
            f"head {head!r} is for weights int4, and these are {weights}; leave --head out, or use --weights int4"
        )
    return head


def untie_head(config: MoEConfig, plan: list[Weight], head: str) -> tuple[MoEConfig, list[Weight]]:
    """Config and plan with a head of its own, made of the embedding's tensor, where an int4 one was tied to it.

    Rows of the embedding are looked up, and stay int8; the head is read whole for each token. Integers of 8 bits that
    a quantized checkpoint brought are kept, and stay tied.
    """
    table = next((weight for weight in plan if weight.name == _EMBEDDING), None)
    if head != "int4" or not config.tie_word_embeddings or table is None:
        return config, plan
    if any(piece.integers is not None and piece.integers.bits > 4 for piece in table.pieces()):
        return config, plan
    own = dataclasses.replace(table, name=_HEAD, role="head", precision="linear")
    return dataclasses.replace(config, tie_word_embeddings=False), [*plan, own]


def copies_embedding(plan: list[Weight]) -> bool:
    """Whether the head is made of the embedding's tensor."""
    made = {weight.name: weight.units for weight in plan}
    return _HEAD in made and made[_HEAD] == made.get(_EMBEDDING)
