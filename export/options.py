"""What an export can be asked for; imports nothing, so that `--help` costs nothing."""

from __future__ import annotations

WEIGHTS_CHOICES = ("fp32", "fp16", "int8", "int4")
GROUP_SIZES = (128, 64, 32, 16)  # what QMoE and MatMulNBits take, largest first
BY_CHANNEL = 0  # the group size that means one scale for each output channel
ALGORITHMS = ("rtn", "hqq", "gptq")


def names_builder(source: str) -> bool:
    """Whether a source is the name of a user's function, `my_package.my_module:build_model`, and no folder."""
    module, colon, attribute = source.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))
