"""Custom ops of our own for onnxruntime on the CPU, where they are compiled: experts, linears, attention.

Quantized weights are read as they lie in weights.bin, so that loading maps the file and repacks nothing, and a token's
result does not depend, to the bit, on what else is computed with it. An engine of target `onnxruntime` has each graph
twice, with these ops and with onnxruntime's own; which is loaded is decided here, on the machine that runs it.

The variable MOEDGE_KERNELS chooses: `stock` (onnxruntime's own ops), or an instruction set by its name.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import EngineError
from .compiling import FOLDER, INSTALL, instruction_sets, library_name, sources

DOMAIN = "moedge.cpu"
VARIABLE = "MOEDGE_KERNELS"
STOCK = "stock"
COMPILE = "python -m moedge.runtime.kernels"
IN_PLACE = "moedge.in_place"  # metadata of a graph whose KV caches are inputs that its ops change
STACKED = "moedge.stacked"  # of one with an input for each kind of cache, all layers one behind the other
CUTS_ALIKE = "moedge.cuts_alike"  # of one whose results have the same bits however a prompt is cut into runs


def stack_of(entry: str) -> str:
    """The stack that a layer's cache is in: `scale.key` of `scale.key.3`."""
    return entry.rpartition(".")[0]


def library() -> Path | None:
    """The compiled library; None where there is none for this machine or the environment asks for the stock ops."""
    if os.environ.get(VARIABLE) == STOCK:
        return None
    path = FOLDER / _library_name()
    return path if path.is_file() and _instruction_sets(path) else None


def why_not() -> str | None:
    """Why the stock ops run, with the command that changes it; None where ours do."""
    if os.environ.get(VARIABLE) == STOCK:
        return f"{VARIABLE} is {STOCK!r}; unset it"
    if library() is not None:
        return None
    how = f"with a C++ compiler: {COMPILE}" if sources() else INSTALL
    path = FOLDER / _library_name()
    if not path.is_file():
        return f"the kernels are not compiled; {how}"
    if _instruction_sets(path) is None:
        return f"the kernels' library does not load on this machine; {how}"
    return f"there are kernels for {', '.join(instruction_sets())}, and this processor has none of them"


def instruction_set() -> str | None:
    """The instruction set that the ops use on this machine; None where there is no library.

    Raises:
        EngineError: the environment names one that this machine has not.
    """
    path = library()
    if path is None:
        return None
    known = _instruction_sets(path) or []
    asked = os.environ.get(VARIABLE)
    if asked and asked not in known:
        raise EngineError(f"{VARIABLE} is {asked!r}; on this machine it can be {', '.join([*known, STOCK])}")
    return asked or known[0]


def own_name(graph: str) -> str:
    """The file of an engine's graph with these ops, beside the one with onnxruntime's."""
    return f"{graph.removesuffix('.onnx')}.moedge_cpu.onnx"


def register(settings: Any, session: Mapping[str, Any], graph: str) -> str:
    """Register the ops with onnxruntime's `settings` where an engine has graphs for them; the file to load for `graph`.

    session: engine.json's entry of that name.

    Raises:
        EngineError: the environment names an instruction set that this machine has not.
    """
    path = library()
    if path is None or instruction_set() is None or not session.get("own_kernels"):
        return graph
    try:
        settings.register_custom_ops_library(str(path))
    except Exception:  # onnxruntime's own classes: this version of it has not the interface that the ops were made for
        return graph
    return own_name(graph)


def describe(session: Mapping[str, Any]) -> str | None:
    """What computes an engine's layers here: "moedge.cpu (avx512)", "onnxruntime"; None: another backend.

    Raises:
        EngineError: as `register`.
    """
    if "own_kernels" not in session:
        return None
    name = instruction_set() if session["own_kernels"] else None
    return "onnxruntime" if name is None else f"{DOMAIN} ({name})"


@cache
def _library_name() -> str:
    return library_name()


@cache
def _instruction_sets(path: Path) -> list[str] | None:
    """Those of a library that this processor has, the best first; None where it does not load."""
    try:
        function = ctypes.CDLL(str(path)).moedge_kernels_available
    except OSError:  # made for another kind of machine, or with a newer C library
        return None
    function.restype = ctypes.c_char_p
    return list(function().decode().split())
