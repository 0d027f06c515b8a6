"""Running `_trt_builder` in a process of its own: progress, cancelling, and what is said when it fails."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...bundle import Progress
from ...errors import BuildError
from ...export import memory
from ...runtime import machine

PLAN = "engine.plan"
LOG = "build.log"
_COSTLY_PHASE = "Computing profile costs"  # where TensorRT spends its time: some steps for each optimization profile
_CANCEL_SECONDS = 5.0


@dataclass(frozen=True)
class BuildJob:
    """What `_trt_builder` is to build; `profiles`: {input: [min, opt, max] shapes} for each optimization profile.

    One engine for all `compute_capabilities`; for the GPU at hand where there are none.
    """

    package: str
    model: Path
    folder: Path
    compute_capabilities: tuple[tuple[int, int], ...]
    profiles: list[dict[str, list[list[int]]]]
    settings: dict[str, Any]
    failed_log: Path
    plan_name: str = PLAN
    log_name: str = LOG

    @property
    def log(self) -> Path:
        return self.folder / self.log_name

    def to_json(self) -> dict[str, Any]:
        return {
            "package": self.package,
            "model": str(self.model.absolute()),
            "engine": str((self.folder / self.plan_name).absolute()),
            "log": str(self.log.absolute()),
            "compute_capabilities": [list(each) for each in self.compute_capabilities],
            "profiles": self.profiles,
            "settings": self.settings,
        }


def run_builder(job: BuildJob, title: str, progress: Progress | None) -> dict[str, Any]:
    """Build the plan and its log in the job's folder.

    Returns version, validity (well_formed, status, diagnostics; or None), seconds, peak_bytes of the builder and
    caller_bytes, what this process held when it began.

    Raises:
        BuildError: the builder refused, crashed, or made no engine; the log is kept as `failed_log`.
    """
    with tempfile.TemporaryDirectory(prefix="moedge-build-") as scratch:
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job.to_json()), encoding="utf-8")
        with (Path(scratch) / "stderr").open("w+b") as errors:
            machine.release_memory()
            beside = memory.resident_bytes()
            process = _start(path, errors)
            last = _follow(process, title, progress)
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
    result = last.get("result")
    if process.returncode == 0 and result is not None:
        if result["validity"] is not None and not result["validity"]["well_formed"]:
            raise _failure(job, "TensorRT calls its own engine malformed")
        answer: dict[str, Any] = result | {"caller_bytes": beside}
        return answer
    raise _failure(job, last.get("error") or _describe_end(process.returncode, job, said))


def builder_command(job_path: Path) -> list[str]:
    return [sys.executable, "-m", f"{__package__}._trt_builder", str(job_path)]


def _start(job_path: Path, errors: IO[bytes]) -> subprocess.Popen[str]:
    # The child finds this package where the parent did, installed or not.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    return subprocess.Popen(
        builder_command(job_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        cwd=job_path.parent,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then cancels the build
    )


def _follow(process: subprocess.Popen[str], title: str, progress: Progress | None) -> dict[str, Any]:
    """The child's last message, its progress passed on; cancels the build when interrupted."""
    assert process.stdout is not None and process.stdin is not None
    messages: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read_lines, args=(process.stdout, messages), daemon=True)
    reader.start()
    last: dict[str, Any] = {}
    steps = (0, 0)
    try:
        while True:
            if progress is not None:
                progress(title, *steps)
            try:
                line = messages.get(timeout=1.0)
            except queue.Empty:
                continue  # a long step: say again that it goes on
            if line is None:
                break
            last = _parse(line) or last
            if last.get("what") == _COSTLY_PHASE:
                steps = (steps[0] + 1, max(last["total"], steps[0] + 1))
        process.wait()
    except BaseException:
        process.stdin.close()
        _end(process)
        raise
    finally:
        process.stdin.close()
        reader.join()
        process.stdout.close()
    return last


def _read_lines(stream: IO[str], messages: queue.Queue[str | None]) -> None:
    for line in stream:
        messages.put(line)
    messages.put(None)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None  # cut off by a crash
    return message if isinstance(message, dict) else None


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a cancelled build a moment, then end it."""
    try:
        process.wait(_CANCEL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _describe_end(returncode: int, job: BuildJob, said: str) -> str:
    """Why a builder ended without a word: a crash (its last words are in its log) or a fault of its own."""
    if returncode < 0:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        error = _last_error(job.log)
        return f"the builder crashed ({name})" + (f" after: {error}" if error else "")
    return said.splitlines()[-1] if said else f"the builder ended with status {returncode}"


def _last_error(log: Path) -> str | None:
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", errors="replace") as stream:
        found = None
        for line in stream:
            if line.startswith(("[E] ", "[I] [E]", "[INTERNAL_ERROR]")):
                found = line.strip()
        return found


def _failure(job: BuildJob, reason: str) -> BuildError:
    log = job.log
    where = ""
    if log.is_file():
        if log.resolve() != job.failed_log.resolve():
            job.failed_log.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, job.failed_log)
        where = f"; its log: {job.failed_log}"
    reason = " ".join(reason.split())
    return BuildError(f"{job.package} built no engine: {reason}{where}")
