"""errors.py and progress.py: what a missing dependency says, and what is shown where there is no terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moedge.errors import DependencyError, MoedgeError, require
from moedge.progress import Lines, console_progress


def test_require_gives_the_module() -> None:
    assert require("json", "cpu").__name__ == "json"


def test_require_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules: how Python itself marks a module that must not be imported.
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError) as caught:
        require("onnxruntime", purpose="run a cpu engine")
    assert str(caught.value) == (
        "onnxruntime is not installed (needed to run a cpu engine); install it: "
        "pip install 'moedge[cpu]' (or 'moedge[gpu]' on CUDA)"
    )
    assert isinstance(caught.value, MoedgeError) and isinstance(caught.value, ImportError)


def test_a_broken_module_surfaces_as_itself(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken_dependency.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has") as caught:
        require("broken_dependency", "cpu")
    assert not isinstance(caught.value, MoedgeError)


def lines_of(calls: list[tuple[float, str, int, int]]) -> list[str]:
    """What Lines prints for calls at the given seconds."""
    now = iter(call[0] for call in calls)
    stream = io.StringIO()
    lines = Lines(stream, clock=lambda: next(now))
    for _, what, done, total in calls:
        lines(what, done, total)
    return stream.getvalue().splitlines()


def test_a_short_phase_is_one_line() -> None:
    assert lines_of([(0, "Reading", 0, 10), (0.1, "Reading", 5, 10), (0.2, "Reading", 10, 10)]) == ["Reading"]


def test_a_long_phase_says_how_far_it_is_now_and_then() -> None:
    calls = [(second, "Writing", second, 12) for second in range(13)] + [(13, "Checking", 0, 0)]
    assert lines_of(calls) == ["Writing", "Writing: 41%", "Writing: 83%", "Writing: done in 12.0 s", "Checking"]


def test_a_phase_of_unknown_length_says_how_long_it_has_taken() -> None:
    assert lines_of([(0, "Building", 0, 0), (6, "Building", 3, 0)]) == ["Building", "Building: 6 s"]


def test_phases_side_by_side_have_a_line_each_and_a_name_may_come_again() -> None:
    calls = [(0, "a", 0, 4), (0, "b", 0, 4), (0.1, "a", 2, 4), (0.1, "b", 4, 4), (0.2, "a", 4, 4), (0.3, "b", 0, 2)]
    assert lines_of(calls) == ["a", "b", "b"]


def test_lines_of_several_threads_do_not_run_together() -> None:
    """Each is one write, and a slow stream is waited for."""
    written: list[str] = []

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.001)
            written.append(text)
            return len(text)

    lines = Lines(Slow())
    names = [f"file {number}" for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: [lines(name, part, 3) for part in range(4)], names))
    assert sorted(written) == sorted(f"{name}\n" for name in names)


def test_without_a_terminal_progress_goes_to_stderr_as_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        progress("Reading", 0, 2)
        progress("Reading", 2, 2)
    captured = capsys.readouterr()
    assert captured.err == "Reading\n" and captured.out == ""


def test_on_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console_progress() as progress:
        progress("Reading", 1, 2)
        progress("Reading", 2, 2)
        progress("Building", 0, 0)
    captured = capsys.readouterr()
    assert "Reading" in captured.err and "100%" in captured.err and captured.out == ""


def test_a_lost_interrupt_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), console_progress() as progress:
        progress("counting", 0, 2)
        with contextlib.suppress(KeyboardInterrupt):  # what imports in C do
            signal.raise_signal(signal.SIGINT)
        progress("counting", 1, 2)
    assert signal.getsignal(signal.SIGINT) is before
    with console_progress() as progress:
        progress("counting", 2, 2)
