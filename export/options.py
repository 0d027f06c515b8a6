"""What an export can be asked for; imports nothing, so that `--help` costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS_CHOICES = ("fp32", "fp16", "int8", "int4")
HEAD_CHOICES = ("int8", "int6", "int4")
HEAD = "int6"  # where weights are int4 and nobody says (docs/quantization.md has what each costs)
SIX_BIT_BLOCK = 64  # codes of 6 bits that are packed together: they must divide a row
GROUP_SIZES = (128, 64, 32, 16)  # what QMoE and MatMulNBits take, largest first
BY_CHANNEL = 0  # the group size that means one scale for each output channel
ALGORITHMS = ("rtn", "hqq", "gptq")


def names_builder(source: str) -> bool:
    """Whether a source is the name of a user's function, `my_package.my_module:build_model`, and no folder."""
    module, colon, attribute = source.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def usual_head(width: int, *, tied: bool) -> str:
    """Of a head [vocab, width] beside int4 weights, where nobody asks: int8 if it is tied or no whole blocks fit."""
    return "int8" if tied or width % SIX_BIT_BLOCK else HEAD


@dataclass(frozen=True)
class LoadAware:
    """How a load-aware gate weighs and bounds (docs/load-balance.md has what each costs and brings).

    `penalty`: what an expert's score loses for each mean load it has had, where scores reach 1; softmax scores, which
    share 1 among all experts, lose a k-th of it. 0 leaves the choice to the capacity. `capacity_factor`: the room of an
    expert in a call, in even shares of the call's choices. `decay`: what a choice counts after one more token.
    """

    penalty: float = 1.0
    capacity_factor: float = 2.0
    decay: float = 0.9995
