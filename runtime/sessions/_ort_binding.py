"""What binds arrays to an onnxruntime graph, whichever session it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EngineError
from ..kernels import IN_PLACE, STACKED
from . import Routing
from ._ort_cache import stack_entries

if TYPE_CHECKING:
    from ..preflight import EngineInfo
    from ._ort_cache import Buffer, SequenceCache

CPU = ("cpu", 0)  # onnxruntime's device type and id


def run_bound(session: Any, binding: Any) -> None:
    """Run with what is bound.

    Raises:
        EngineError: memory is short.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:
        text = str(error).lower()
        if not any(word in text for word in ("allocat", "bad_alloc", "out of memory")):
            raise
        raise EngineError(
            "not enough memory for this step; give a shorter prompt, or load with a smaller max_seq_len"
        ) from error


def bind_buffer(binding: Any, buffer: Buffer, name: str) -> None:
    """Bind a cache by heads: the same buffer as past and as present."""
    place = (*CPU, buffer.kind, buffer.shape, buffer.address)
    binding.bind_input(f"past.{name}", *place)
    binding.bind_output(f"new.{name}", *place)


def bind_whole(binding: Any, cache: SequenceCache, stacked: bool, of_lane: Callable[[str], str]) -> None:
    """Bind a sequence's caches to a graph that changes them; `stacked`: one that takes the layers' together."""
    for buffer in cache.stacks if stacked else cache.whole:
        binding.bind_input(of_lane(f"past.{buffer.name}"), *CPU, buffer.kind, buffer.shape, buffer.address)


def is_marked(session: Any, mark: str) -> bool:
    """Whether the graph's metadata says so of it: `IN_PLACE`, `CUTS_ALIKE` and the like."""
    return bool(session.get_modelmeta().custom_metadata_map.get(mark) == "1")


def empty_routing(info: EngineInfo, tokens: int) -> Routing:
    shape = (len(info.moe_layers), tokens, info.num_experts_per_tok)
    return Routing(np.empty(shape, np.int64), np.empty(shape, np.float32))


def bind_routing(binding: Any, info: EngineInfo, routing: Routing) -> None:
    """Bind the outputs that say where tokens went."""
    for index, layer in enumerate(info.moe_layers):
        for name, values in routing._asdict().items():
            part = values[index]
            binding.bind_output(f"{name}.{layer}", *CPU, values.dtype.type, part.shape, part.ctypes.data)


def check_interface(session: Any, info: EngineInfo, of_lane: Callable[[str], str], lanes: int = 1) -> None:
    """Compare what the graph takes and gives with what engine.json says: a mix-up would write past a buffer.

    of_lane: what a tensor of the cache is called in the graph, of so many `lanes`.
    """
    has = {value.name: value for value in [*session.get_inputs(), *session.get_outputs()]}
    routes = [f"{kind}.{layer}" for kind in ("experts", "weights") for layer in info.moe_layers]
    widths = dict.fromkeys(routes, info.num_experts_per_tok) | {"logits": info.vocab_size}
    in_place, stacked = is_marked(session, IN_PLACE), is_marked(session, STACKED)
    stacks = stack_entries(info) if stacked else [(entry.name, [entry]) for entry in info.cache]
    layers = {of_lane(f"past.{name}"): len(entries) for name, entries in stacks}
    ranks = {of_lane(f"past.{name}"): (4 if entries[0].heads else 2) + stacked for name, entries in stacks}
    caches = sum(value.name.startswith(("past.", "cache.")) for value in session.get_inputs())
    for name, (entry, *_) in stacks:
        if in_place:
            widths[of_lane(f"past.{name}")] = entry.width // (entry.heads or 1)
            continue
        for kind in ("past" if entry.heads else "cache", "new"):
            cut = entry.heads or (entry.parts if kind == "cache" else 1)
            widths[of_lane(f"{kind}.{name}")] = entry.width // cut
    for name in ["input_ids", "rows", *widths]:
        shape = has[name].shape if name in has else [None]
        width, rank = shape[-1], ranks.get(name, len(shape))
        strange = len(shape) != rank or (isinstance(width, int) and width != widths.get(name, width))
        strange = strange or (stacked and shape[0] != layers.get(name, shape[0]))
        if name not in has or strange or caches != lanes * len(ranks):
            raise EngineError(
                f"engine '{info.profile}' is not what its engine.json says ({name} is missing or of another width); "
                f"build it again: moedge build BUNDLE --profile {info.profile}"
            )
