"""The head in fewer bits than the embedding; where the checkpoint ties the two, in a copy of its own."""

from __future__ import annotations

import dataclasses

from ..errors import CheckpointError
from .config import MoEConfig
from .options import HEAD, HEAD_CHOICES, SIX_BIT_BLOCK, usual_head
from .weights import Weight

_EMBEDDING, _HEAD = "embed.weight", "head.weight"
_NARROW = ("int6", "int4")


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


def settle_head(head: str, width: int, *, tied: bool, asked: bool) -> str:
    """What a head [vocab, width] can be: where nobody asked, int8 for one that is tied or that int6 cannot be.

    Raises:
        CheckpointError: int6 was asked for, and its blocks do not divide the width.
    """
    if not asked:
        return usual_head(width, tied=tied) if head in _NARROW else head
    if head == "int6" and width % SIX_BIT_BLOCK:
        raise CheckpointError(
            f"head 'int6' takes a hidden size that {SIX_BIT_BLOCK} divides, and this one is {width}; use --head int8 "
            "or int4"
        )
    return head


def untie_head(config: MoEConfig, plan: list[Weight], head: str) -> tuple[MoEConfig, list[Weight]]:
    """Config and plan with a head of its own, made of the embedding's tensor, where an int6 or int4 one was tied to it.

    Rows of the embedding are looked up, and stay int8; the head is read whole for each token. Integers of 8 bits that
    a quantized checkpoint brought are kept, and stay tied.
    """
    table = next((weight for weight in plan if weight.name == _EMBEDDING), None)
    if head not in _NARROW or not config.tie_word_embeddings or table is None:
        return config, plan
    if any(piece.integers is not None and piece.integers.bits > 4 for piece in table.pieces()):
        return config, plan
    own = dataclasses.replace(table, name=_HEAD, role="head", precision="linear")
    return dataclasses.replace(config, tie_word_embeddings=False), [*plan, own]


def copies_embedding(plan: list[Weight]) -> bool:
    """Whether the head is made of the embedding's tensor."""
    made = {weight.name: weight.units for weight in plan}
    return _HEAD in made and made[_HEAD] == made.get(_EMBEDDING)
