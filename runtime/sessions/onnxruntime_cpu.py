"""Backend `onnxruntime` on the CPU: the lowered graph, over caches that are never copied (_ort_cache.py).

An engine has a graph that steps one sequence, and beside it may have one that steps several (_ort_lanes.py). Both point
into the same weights, and a process loads one of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import MODEL
from ...errors import require
from .. import kernels
from . import Findings, OneLane, Routing, Session, SessionOptions, check_room, check_routing
from ._ort_binding import (
    CPU,
    bind_buffer,
    bind_routing,
    bind_whole,
    check_interface,
    empty_routing,
    is_marked,
    run_bound,
)
from ._ort_cache import SequenceCache, View, aligned_empty
from ._ort_open import load_graph, make_settings

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo

LANES_MODEL = "model.lanes.onnx"


def version() -> str | None:
    """The installed onnxruntime's version."""
    # Not importlib.metadata: onnxruntime-gpu and others bring the same module under other names.
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    return str(require("onnxruntime").__version__)


def loads(info: EngineInfo) -> list[str]:
    """The lowered graph, and that of several lanes where there is one; their weights are the bundle's."""
    return [MODEL, LANES_MODEL] if int(info.session.get("lanes", 1)) > 1 else [MODEL]


def check(folder: Path, info: EngineInfo) -> Findings:
    """Nothing beyond checksums: loading is quick, and says itself what is wrong."""
    return Findings()


def cannot_run(info: EngineInfo) -> str | None:
    """A CPU engine runs wherever onnxruntime is installed; where it is not, loading names the command."""
    return None


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> Session:
    """Load the engine: its graph of several lanes where more than one is asked for and it has one.

    Raises:
        EngineError: onnxruntime refuses the graph, or the cache does not fit the memory.
        DependencyError: onnxruntime is not installed.
    """
    several = options.lanes > 1 and int(info.session.get("lanes", 1)) > 1
    session, threads = open_onnxruntime(bundle, info, options, LANES_MODEL if several else MODEL)
    capacity = options.max_seq_len or info.max_seq_len
    if not is_marked(session, kernels.IN_PLACE):  # also where this onnxruntime takes no ops of ours
        info = info.by_stock_ops()
    if not several:
        return OnnxruntimeCpuSession(session, info, capacity, threads)
    from ._ort_lanes import LaneRunner, LaneSession

    return LaneSession(LaneRunner(session, info, threads), capacity)


def open_onnxruntime(
    bundle: Bundle, info: EngineInfo, options: SessionOptions, graph: str = MODEL
) -> tuple[Any, int]:
    """onnxruntime's session of an engine's graph over the bundle's weights, and its threads; raises as above."""
    ort = require("onnxruntime", purpose=f"run engine '{info.profile}'")
    settings, threads = make_settings(ort, bundle, options)
    # Waking a thread costs it as much as a layer; but between the steps of several texts, one that spins takes a core
    # from the server's other work.
    between = "1" if graph == LANES_MODEL else "0"
    spinning = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": between}
    entries = {**spinning, **info.session.get("config", {})}
    for name, value in entries.items():
        settings.add_session_config_entry(name, str(value))
    model = bundle.engine_dir(info.profile) / kernels.register(settings, info.session, graph)
    session = load_graph(ort, model, settings, f"moedge build {bundle.path} --profile {info.profile}")
    return session, threads


class OnnxruntimeCpuSession(SequenceCache, OneLane):
    """One sequence in an onnxruntime session; see `Session` for what the members do."""

    def __init__(self, session: Any, info: EngineInfo, capacity: int, threads: int) -> None:
        check_interface(session, info, lambda name: name)
        super().__init__(info, capacity)
        self._session: Any = session
        self._binding: Any = session.io_binding()
        self._info = info
        self._vocab = info.vocab_size
        self._threads = threads
        self._past = np.zeros(1, np.int64)  # for graphs that cannot see the length in a cache's shape
        self._in_place = is_marked(session, kernels.IN_PLACE)
        self.cuts_alike = is_marked(session, kernels.CUTS_ALIKE)
        self._place = np.zeros((1, 1), np.int64)
        self._bound_views: list[tuple[str, str, View]] = []
        if self._in_place:
            bind_whole(self._binding, self, is_marked(session, kernels.STACKED), lambda name: name)
        else:
            self._bound_views = [(f"cache.{view.name}", f"new.{view.name}", view) for view in self.views]
            for buffer in self.buffers:
                bind_buffer(self._binding, buffer, buffer.name)
        if self._in_place or self.buffers:
            self._binding.bind_input("length", *CPU, np.int64, (1,), self._past.ctypes.data)
        if self.load is not None:
            for layer, load in zip(info.moe_layers, self.load.load, strict=True):
                self._binding.bind_input(f"load.{layer}", *CPU, np.float32, load.shape, load.ctypes.data)
        self._token = np.zeros(1, dtype=np.int64)
        self._zero_row = np.zeros(1, dtype=np.int64)
        self._logits = aligned_empty((1, self._vocab), np.dtype(np.float32))
        self._bound_tokens = -1  # S of the last step: what depends on it alone is bound again only when it changes
        self._bound_logits: Any = None
        self._routing = empty_routing(info, 0)
        self._route_weights: memoryview | None = None  # those of a single token

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def routing(self) -> Routing:
        return self._routing

    def step(
        self,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        count = len(input_ids)
        past = self._length
        check_room(self._capacity, past, count)
        if count == 1 and len(rows) == 1 and out is None:
            logits = self._bind_one(int(input_ids[0]))
        else:
            logits = self._bind_many(input_ids, rows, out)
        self._past[0] = past
        if count == 1:
            self._place[0, 0] = past
        else:
            self._place[0] = np.arange(past, past + count)
        bind_input, bind_output = self._binding.bind_input, self._binding.bind_output
        for cache, new, view in self._bound_views:
            bind_input(cache, *CPU, view.kind, view.shape(past + count), view.address)
            bind_output(new, *CPU, view.kind, (count, view.width), view.address + past * view.row)
        run_bound(self._session, self._binding)
        check_routing(self._routing, self._info.moe_layers, past, self._route_weights)
        self._length = past + count
        if self.load is not None:
            self.load.append(self._routing.experts)
        return logits

    def another(self) -> OnnxruntimeCpuSession:
        return OnnxruntimeCpuSession(self._session, self._info, self._capacity, self._threads)

    def end_profiling(self) -> Path:
        """The profile (Chrome's trace format) of a session that was opened with `profile_prefix`."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        self._binding = None  # which holds the session too
        self._session = None
        self.free()

    def _bind_one(self, token: int) -> NDArray[np.float32]:
        """Bind one token and its logits to buffers that stay: while decoding this is bound once."""
        self._token[0] = token
        if self._bound_logits is not self._logits:
            self._bind_inputs(self._token, self._zero_row)
            self._bind_logits(self._logits)
        self._bind_routing(1)
        return self._logits

    def _bind_many(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        logits = np.empty((len(rows), self._vocab), np.float32) if out is None else out
        assert logits.shape == (len(rows), self._vocab) and logits.flags.c_contiguous and logits.dtype == np.float32
        self._bind_inputs(np.ascontiguousarray(input_ids, np.int64), np.ascontiguousarray(rows, np.int64))
        self._bind_logits(logits)
        self._bind_routing(len(input_ids))
        return logits

    def _bind_inputs(self, input_ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        if self._place.shape[1] != len(input_ids):
            self._place = np.zeros((1, len(input_ids)), np.int64)
        self._inputs = (input_ids, rows)  # the binding holds their addresses only
        self._binding.bind_input("input_ids", *CPU, np.int64, input_ids.shape, input_ids.ctypes.data)
        self._binding.bind_input("rows", *CPU, np.int64, rows.shape, rows.ctypes.data)
        if self._in_place:
            self._binding.bind_input("places", *CPU, np.int64, self._place.shape, self._place.ctypes.data)

    def _bind_logits(self, logits: NDArray[np.float32]) -> None:
        self._bound_logits = logits
        self._binding.bind_output("logits", *CPU, np.float32, logits.shape, logits.ctypes.data)

    def _bind_routing(self, count: int) -> None:
        if count == self._bound_tokens:
            return
        self._routing = empty_routing(self._info, count)
        self._route_weights = self._routing.weights.reshape(-1).data if count == 1 else None
        bind_routing(self._binding, self._info, self._routing)
        self._bound_tokens = count
