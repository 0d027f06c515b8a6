"""Backend `onnxruntime_cuda`: onnxruntime with its CUDA provider, the KV cache on the device and never copied.

A cache by rows [capacity, width] is bound twice: the past as a view of its first P rows, the new rows right behind it.
A cache by heads [1, heads, capacity, head size] is one buffer, the kernel's input and its output. Tokens go to the
device and logits and routing come back with each step; nothing else moves.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import MODEL
from ...errors import EngineError, require
from . import Findings, OneLane, Routing, SessionOptions, check_room, check_routing
from ._ort_binding import CPU as HOST
from ._ort_binding import bind_routing, empty_routing, run_bound
from ._ort_open import load_graph, make_settings
from ._sequence import CachedSequence
from .onnxruntime_cpu import version as version  # onnxruntime-gpu is the same module

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import CacheEntry, EngineInfo

CUDA, CPU = "cuda", "cpu"
# TF32 would round the router's float32 products, and with them the choice of experts.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    CUDA: ("CUDAExecutionProvider", _CUDA_OPTIONS),
    CPU: ("CPUExecutionProvider", {}),
}
_INSTALL = "pip uninstall onnxruntime, then: pip install 'moedge[gpu]'"


def loads(info: EngineInfo) -> list[str]:
    """The lowered graph; its weights are the bundle's."""
    return [MODEL]


def check(folder: Path, info: EngineInfo) -> Findings:
    """Nothing beyond checksums can be looked at without running it."""
    unchecked = [f"engine '{info.profile}': that it runs (it needs a GPU and onnxruntime-gpu)"]
    return Findings(unchecked=[] if cannot_run(info) is None else unchecked)


def cannot_run(info: EngineInfo) -> str | None:
    """What is not installed; whether there is a GPU is the preflight's affair."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime-gpu is not installed: pip install 'moedge[gpu]'"
    provider = _PROVIDERS[CUDA][0]
    if provider not in require("onnxruntime").get_available_providers():
        return f"the onnxruntime that is installed has no {provider}: {_INSTALL}"
    return None


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> OnnxruntimeCudaSession:
    """Load the engine onto CUDA device 0; onto the CPU where engine.json names that provider, which no build does.

    Raises:
        EngineError: onnxruntime refuses the graph or has no CUDA, or the cache does not fit the memory.
        DependencyError: onnxruntime is not installed.
    """
    on_cpu = info.session.get("provider") == _PROVIDERS[CPU][0]
    return open_on(CPU if on_cpu else CUDA, bundle, info, options)


def open_on(device: str, bundle: Bundle, info: EngineInfo, options: SessionOptions) -> OnnxruntimeCudaSession:
    """`open_session` on a device of `_PROVIDERS`: the same on the CPU is how it is checked without a GPU."""
    ort = require("onnxruntime", "gpu", f"run engine '{info.profile}'")
    provider, provider_options = _PROVIDERS[device]
    settings, threads = make_settings(ort, bundle, options)
    model = bundle.engine_dir(info.profile) / MODEL
    again = f"moedge build {bundle.path} --profile {info.profile} --backend onnxruntime"
    session = load_graph(ort, model, settings, again, provider, **provider_options)
    if session.get_providers()[0] != provider:  # onnxruntime then runs on the CPU and says so on stderr only
        raise EngineError(
            f"onnxruntime {ort.__version__} did not start its {provider} (its own words are on stderr: most often CUDA "
            f"or cuDNN is missing or of another version); {_INSTALL}"
        )
    return OnnxruntimeCudaSession(session, info, options.max_seq_len or info.max_seq_len, threads, device)


class OnnxruntimeCudaSession(CachedSequence, OneLane):
    """One sequence in an onnxruntime session; see `Session` for what the members do."""

    def __init__(self, session: Any, info: EngineInfo, capacity: int, threads: int, device: str) -> None:
        super().__init__(info, capacity)
        self._session: Any = session
        self._binding: Any = session.io_binding()
        self._info = info
        self._threads = threads
        self._device = device
        _check_interface(session, info)
        self._takes = {value.name for value in session.get_inputs()}
        self._cache: dict[str, Any] = {}  # OrtValue, on the device
        self._rows: list[tuple[str, int, type[Any], int]] = []  # name, width, dtype, address of caches by rows
        for entry in info.cache:
            self._cache[entry.name] = self._allocate(entry)
            if not entry.heads:
                dtype = np.dtype(entry.dtype)
                self._rows.append((entry.name, entry.width, dtype.type, self._cache[entry.name].data_ptr()))
        self._routing = empty_routing(info, 0)

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def routing(self) -> Routing:
        return self._routing

    def step(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        count, past = len(input_ids), self._length
        check_room(self._capacity, past, count)
        logits = np.empty((len(rows), self._info.vocab_size), np.float32) if out is None else out
        assert logits.shape == (len(rows), self._info.vocab_size) and logits.flags.c_contiguous
        feeds = {"input_ids": input_ids, "rows": rows, "length": np.array([past])}
        for name in self._takes & feeds.keys():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], np.int64))
        if self.load is not None:
            for layer, load in zip(self._info.moe_layers, self.load.load, strict=True):
                self._binding.bind_cpu_input(f"load.{layer}", load)
        for name, width, kind, address in self._rows:
            row = width * np.dtype(kind).itemsize
            self._binding.bind_input(f"past.{name}", self._device, 0, kind, (past, width), address)
            self._binding.bind_output(f"new.{name}", self._device, 0, kind, (count, width), address + past * row)
        self._binding.bind_output("logits", *HOST, np.float32, logits.shape, logits.ctypes.data)
        routing = empty_routing(self._info, count)
        bind_routing(self._binding, self._info, routing)
        run_bound(self._session, self._binding)
        check_routing(routing, self._info.moe_layers, past)
        self._routing = routing
        self._advance(routing.experts)
        return logits

    def another(self) -> OnnxruntimeCudaSession:
        return OnnxruntimeCudaSession(self._session, self._info, self._capacity, self._threads, self._device)

    def end_profiling(self) -> Path:
        """The profile (Chrome's trace format) of a session that was opened with `profile_prefix`."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        # The binding holds the session too.
        self._binding = None
        self._session = None
        self._cache.clear()
        self._rows.clear()

    def _allocate(self, entry: CacheEntry) -> Any:
        """Zeros on the device; bound once where it is a cache by heads."""
        ort = require("onnxruntime", "gpu")
        kind = np.dtype(entry.dtype)
        shape = self._rows_shape(entry, self._capacity)
        try:
            buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), self._device, 0)
        except Exception as error:
            raise EngineError(
                f"a cache of {np.prod(shape) * kind.itemsize / 2**20:,.0f} MiB does not fit the device's memory; load "
                "with a smaller max_seq_len"
            ) from error
        if entry.heads:
            place = (self._device, 0, kind.type, shape, buffer.data_ptr())
            self._binding.bind_input(f"past.{entry.name}", *place)
            self._binding.bind_output(f"new.{entry.name}", *place)
        return buffer

    def _read_cache(self, entry: CacheEntry) -> NDArray[Any]:
        values: NDArray[Any] = self._cache[entry.name].numpy()
        return values

    def _write_cache(self, entry: CacheEntry, start: int, rows: NDArray[Any]) -> None:
        """Through the host, a whole buffer at a time: a beginning that is used again saves far more."""
        host = self._read_cache(entry).copy()
        host[..., start : start + rows.shape[-2], :] = rows
        self._cache[entry.name].update_inplace(host)


def _check_interface(session: Any, info: EngineInfo) -> None:
    """Compare what the graph takes and gives with what engine.json says: a mix-up would write past a buffer."""
    kinds = {"tensor(float16)": "float16", "tensor(float)": "float32"}
    has = {value.name: value for value in [*session.get_inputs(), *session.get_outputs()]}
    wanted: dict[str, tuple[int, str | None]] = {"logits": (info.vocab_size, "float32")}
    for entry in info.cache:
        width = entry.width // (entry.heads or 1)
        wanted |= {f"past.{entry.name}": (width, entry.dtype), f"new.{entry.name}": (width, entry.dtype)}
    for layer in info.moe_layers:
        wanted |= {f"{kind}.{layer}": (info.num_experts_per_tok, None) for kind in ("experts", "weights")}
    for name, (width, dtype) in wanted.items():
        found = has.get(name)
        alike = found is not None and found.shape[-1] == width
        if not alike or (dtype is not None and kinds.get(found.type) != dtype):  # type: ignore[union-attr]
            raise EngineError(
                f"engine '{info.profile}' is not what its engine.json says ({name} is missing, or of another width or "
                f"type); build it again: moedge build BUNDLE --profile {info.profile} --backend onnxruntime"
            )
