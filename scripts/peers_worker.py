"""One engine in a process of its own, told what to run on stdin, a JSON line each; answers on stdout likewise.

    python peers_worker.py moedge BUNDLE THREADS CONTEXT
    python peers_worker.py moedge-lanes BUNDLE THREADS CONTEXT     several sequences a step
    python peers_worker.py llama.cpp FILE.gguf THREADS CONTEXT
    python peers_worker.py genai ENGINE_FOLDER THREADS CONTEXT     onnxruntime-genai over the engine's folder

{"run": "prefill", "tokens": n}             a prompt of n random tokens from nothing: {"seconds": s}
{"run": "decode", "tokens": n}              n more, one at a time, each the most likely: {"seconds": [s, ...]}
{"run": "fill", "tokens": n}                the long context, once
{"run": "decode_long", "tokens": n}         n tokens behind it; it is then what it was
{"run": "decode_batch", "tokens": n}        n steps of moedge-lanes' sequences together, each behind a prompt of its own
The first answer tells how loading went. llama.cpp runs without mmap, its caches in half precision, its default.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_SEED = 0


class Peer(Protocol):
    """Two sequences: `long` chooses the one with the long context."""

    vocab: int

    def feed(self, tokens: NDArray[np.int64], long: bool) -> int:
        """Append tokens; the most likely one after them."""

    def cut(self, length: int, long: bool) -> None:
        """Forget all but the first tokens."""

    def about(self) -> dict[str, Any]:
        """Name and version."""


class Moedge:
    """Our engine through its session, as `moedge.load` gives it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import moedge

        # As llama.cpp without mmap: no page is to be read again while the other engine has its turn.
        self._engine = moedge.load(path, "cpu", threads=threads, max_seq_len=context, lock_weights=True)
        self.vocab = self._engine.info.vocab_size
        self._chunk = self._engine.prefill_tokens
        self._sessions = [self._engine.session, self._engine.session.another()]

    def feed(self, tokens: NDArray[np.int64], long: bool) -> int:
        session = self._sessions[long]
        for start in range(0, len(tokens), self._chunk):
            part = tokens[start : start + self._chunk]
            last = start + len(part) == len(tokens)
            logits = session.step(part, np.array([len(part) - 1] if last else [], np.int64))
        return int(logits.argmax())

    def cut(self, length: int, long: bool) -> None:
        self._sessions[long].truncate(length)

    def about(self) -> dict[str, Any]:
        import moedge
        from moedge.runtime import kernels

        found = kernels.describe(self._engine.info.session)
        return {"name": "moedge", "version": moedge.__version__, "kernels": found}


class LlamaCpp:
    """llama.cpp through the ctypes of llama-cpp-python: one model, a context for each sequence."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_mmap, options.n_gpu_layers = False, 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if self._model is None:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts = [self._open(threads, min(context, 1024)), self._open(threads, context)]

    def _open(self, threads: int, context: int) -> Any:
        options = self._lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, 512, 512
        options.n_threads = options.n_threads_batch = threads
        found = self._lib.llama_init_from_model(self._model, options)
        if found is None:
            raise SystemExit("llama.cpp cannot open a context")
        return found

    def feed(self, tokens: NDArray[np.int64], long: bool) -> int:
        context = self._contexts[long]
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512].astype(np.int32)
            array = (self._lib.llama_token * len(part))(*part)
            if self._lib.llama_decode(context, self._lib.llama_batch_get_one(array, len(part))):
                raise SystemExit("llama_decode failed")
        logits = self._lib.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def cut(self, length: int, long: bool) -> None:
        memory = self._lib.llama_get_memory(self._contexts[long])
        if not self._lib.llama_memory_seq_rm(memory, 0, length, -1):
            raise SystemExit("llama.cpp cannot cut its cache")

    def about(self) -> dict[str, Any]:
        system = self._lib.llama_print_system_info().decode()
        return {"name": "llama.cpp", "version": f"llama-cpp-python {self._lib.__version__}", "system": system}


class Genai:
    """onnxruntime-genai over an engine's folder, which is a model folder of its; one generator for each sequence."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import onnxruntime_genai as og

        self._lib, self._context = og, context
        config = og.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self.vocab = int(json.loads((Path(path) / "genai_config.json").read_text())["model"]["vocab_size"])
        self._generators = {False: self._open()}

    def _open(self) -> Any:
        parameters = self._lib.GeneratorParams(self._model)
        # As long as there is room: random weights may choose the end-of-text token.
        parameters.set_search_options(max_length=self._context, min_length=self._context, do_sample=False)
        return self._lib.Generator(self._model, parameters)

    def feed(self, tokens: NDArray[np.int64], long: bool) -> int:
        if long not in self._generators:
            self._generators[long] = self._open()
        generator = self._generators[long]
        if len(tokens) == 1 and generator.token_count():  # the token that it chose itself is in the text already
            generator.generate_next_token()
        else:
            generator.append_tokens(tokens.astype(np.int32))
            generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    def cut(self, length: int, long: bool) -> None:
        if long in self._generators:
            self._generators[long].rewind_to(length)

    def about(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"name": "onnxruntime-genai", "version": f"onnxruntime-genai {version('onnxruntime-genai')}"}


class MoedgeLanes:
    """Our engine with LANES sequences a step."""

    LANES = 8

    def __init__(self, path: str, threads: int, context: int) -> None:
        import moedge

        options = {"lanes": self.LANES, "max_seq_len": context, "lock_weights": True}
        self._engine = moedge.load(path, "cpu", threads=threads, **options)  # type: ignore[arg-type]
        self.vocab = self._engine.info.vocab_size
        own = self._engine.begin()
        self._sessions = [own, *(own.another() for _ in range(self.LANES - 1))]

    def fill(self, prompts: NDArray[np.int64]) -> None:
        for session, prompt in zip(self._sessions, prompts, strict=True):
            session.truncate(0)
            self._engine.prefill(prompt, session)

    def steps(self, count: int, tokens: NDArray[np.int64]) -> list[float]:
        """Seconds of each step; each sequence goes on with its own most likely token, and is then what it was."""
        length, seconds = self._sessions[0].length, []
        for _ in range(count):
            began = time.perf_counter()
            logits = self._sessions[0].step_together(self._sessions[1:], tokens)
            tokens = np.array([int(row.argmax()) for row in logits], np.int64)
            seconds.append(time.perf_counter() - began)
        for session in self._sessions:
            session.truncate(length)
        return seconds

    def about(self) -> dict[str, Any]:
        return {"name": "moedge", "lanes": self.LANES}


PEERS = {"moedge": Moedge, "llama.cpp": LlamaCpp, "genai": Genai}


def serve(peer: Peer, load_s: float) -> None:
    random = np.random.default_rng(_SEED)
    filled, token = 0, 0
    answer({"load_s": load_s, **peer.about(), **memory()})
    for line in sys.stdin:
        order = json.loads(line)
        count = order["tokens"]
        if order["run"] == "prefill":
            peer.cut(0, False)
            prompt = random.integers(0, peer.vocab, count)
            began = time.perf_counter()
            token = peer.feed(prompt, False)
            answer({"seconds": time.perf_counter() - began})
        elif order["run"] == "fill":
            filled = count
            token = peer.feed(random.integers(0, peer.vocab, count), True)
            answer(memory())
        else:
            long = order["run"] == "decode_long"
            seconds = []
            for _ in range(count):
                began = time.perf_counter()
                token = peer.feed(np.array([token], np.int64), long)
                seconds.append(time.perf_counter() - began)
            if long:
                peer.cut(filled, True)
            answer({"seconds": seconds})


def serve_lanes(peer: MoedgeLanes, load_s: float) -> None:
    random = np.random.default_rng(_SEED)
    answer({"load_s": load_s, **peer.about(), **memory()})
    for line in sys.stdin:
        order = json.loads(line)
        if order["run"] == "fill":
            peer.fill(random.integers(0, peer.vocab, (peer.LANES, order["tokens"])))
            answer(memory())
        else:
            answer({"seconds": peer.steps(order["tokens"], random.integers(0, peer.vocab, peer.LANES))})


def memory() -> dict[str, int]:
    """Resident bytes: all, each page once (Linux's Pss), and those that no other process could share.

    A file's page that a process has mapped twice, to lock it and to read it, is one page, and two in VmRSS.
    """
    status, pages = Path("/proc/self/status"), Path("/proc/self/smaps_rollup")
    if not pages.exists():
        return {}
    lines = [*status.read_text().splitlines(), *pages.read_text().splitlines()[1:]]
    found = dict(line.split(":", 1) for line in lines)
    return {"resident_bytes": _bytes(found["Pss"]), "private_bytes": _bytes(found["RssAnon"])}


def _bytes(kilobytes: str) -> int:
    return int(kilobytes.split()[0]) * 1024


def answer(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def main() -> None:
    kind, path, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    began = time.perf_counter()
    if kind == "moedge-lanes":
        lanes = MoedgeLanes(path, threads, context)
        serve_lanes(lanes, time.perf_counter() - began)
    else:
        peer = PEERS[kind](path, threads, context)
        serve(peer, time.perf_counter() - began)


if __name__ == "__main__":
    main()
