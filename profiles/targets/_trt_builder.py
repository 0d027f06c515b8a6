"""The process that builds one TensorRT engine: `python -m ..._trt_builder JOB.json`.

A process of its own because the builder can crash and takes the process with it. Works with any package of TensorRT's
Python API: `tensorrt_rtx` builds for a compute capability that need not be here, `tensorrt` for the GPU at hand. Speaks
JSON lines on stdout: {"what", "done", "total"} as it goes, then {"result": {...}} or {"error": "..."}. The end of stdin
cancels the build, so it also ends with its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

HEADER_BYTES = 64
MALFORMED = 32  # of TensorRT's EngineInvalidityDiagnostics
_MOST_STEPS = 10  # phases of more steps are of nodes and tactics, thousands of them in no time


def main(job_path: str) -> int:
    """Build what the job file says; exit status 0 on success."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)  # libraries that print must not reach the channel
        job = json.loads(Path(job_path).read_text(encoding="utf-8"))
        with Path(job["log"]).open("w", encoding="utf-8", buffering=1) as log:  # a crash loses what is buffered
            try:
                result = _build(job, channel, log)
            except _Failure as failure:
                _say(channel, {"error": str(failure)})
                return 1
        _say(channel, {"result": result})
    return 0


class _Failure(Exception):
    pass


def _say(channel: TextIO, message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def _build(job: dict[str, Any], channel: TextIO, log: TextIO) -> dict[str, Any]:
    trt = importlib.import_module(job["package"])
    began = time.monotonic()
    logger = _make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["model"]):
        faults = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise _Failure(f"{job['package']} {trt.__version__} does not take the network: {faults}")
    config = builder.create_builder_config()
    _configure(trt, config, job)
    _add_profiles(builder, config, network, job["profiles"])
    config.progress_monitor = _make_monitor(trt, channel)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _Failure(logger.last_error or "the builder gave no engine and no reason")
    with Path(job["engine"]).open("wb") as stream:
        stream.write(plan)
    validity = _check_validity(trt, logger, job["engine"])
    return {
        "version": trt.__version__,
        "validity": validity,
        "seconds": round(time.monotonic() - began, 3),
        "peak_bytes": _peak_bytes(),
    }


def _network_flags(trt: Any) -> int:
    """Types are the network's own; from TensorRT 11 on they always are, and the flag is gone."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(trt: Any, config: Any, job: dict[str, Any]) -> None:
    """Settings that the job names; `tf32` off unless it says otherwise, and every kernel in the log."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    settings = job["settings"]
    if not settings["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.get("optimization_level") is not None:
        config.builder_optimization_level = settings["optimization_level"]
    names = ["SM" + "".join(str(digit) for digit in each) for each in job["compute_capabilities"]]
    if names:
        known = [each for each in trt.ComputeCapability.__members__ if each.startswith("SM")]
        for name in names:
            if name not in known:
                raise _Failure(f"{job['package']} {trt.__version__} builds for {', '.join(known)}, not for {name}")
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)


def _add_profiles(builder: Any, config: Any, network: Any, profiles: list[dict[str, list[list[int]]]]) -> None:
    """One optimization profile for each {input: [min, opt, max] shapes}."""
    dynamic = [network.get_input(index).name for index in range(network.num_inputs)]
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name in dynamic:
            if name in shapes:
                profile.set_shape(name, *shapes[name])
        if config.add_optimization_profile(profile) < 0:
            raise _Failure(f"the builder refuses the optimization profile {shapes}")


def _make_logger(trt: Any, log: TextIO) -> Any:
    """Everything goes to the log; the last error is kept. (The base class exists only with the package.)"""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            log.write(f"[{str(severity).rsplit('.', 1)[-1][0]}] {message}\n")
            if severity <= trt.ILogger.ERROR:
                self.last_error = message

    return Logger()


def _make_monitor(trt: Any, channel: TextIO) -> Any:
    """Progress of the coarse phases to the channel; stdin's end cancels."""
    cancelled = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        cancelled.set()

    threading.Thread(target=watch, daemon=True).start()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self.phases.get(phase_name, 0)
            if steps <= _MOST_STEPS:
                _say(channel, {"what": phase_name, "done": step + 1, "total": steps})
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def _check_validity(trt: Any, logger: Any, engine: str) -> dict[str, Any] | None:
    """What TensorRT says of the engine's header; it tells a malformed one without a GPU. None where it cannot tell."""
    runtime = trt.Runtime(logger)
    if not hasattr(runtime, "get_engine_validity"):
        return None
    with Path(engine).open("rb") as stream:
        validity, diagnostics = runtime.get_engine_validity(stream.read(HEADER_BYTES))
    well_formed = not int(diagnostics) & MALFORMED
    return {"well_formed": well_formed, "status": str(validity).rsplit(".", 1)[-1], "diagnostics": int(diagnostics)}


def _peak_bytes() -> int | None:
    """The largest resident memory of this process; None on Windows.

    Linux hands what `getrusage` gives on to the programs that a process starts: here that would be the parent's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
