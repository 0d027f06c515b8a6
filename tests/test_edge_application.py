"""docs/edge-application.md: the application that stands there, run as a program and a part at a time."""

from __future__ import annotations

import io
import json
import queue
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import fake_engine
import pytest

from moedge.runtime.engine import load

PAGE = (Path(__file__).parent.parent / "docs" / "edge-application.md").read_text(encoding="utf-8")
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = fake_engine.write_bundle(tmp_path_factory.mktemp("edge") / "bundle")
    return folder


@pytest.fixture
def application():
    module = types.ModuleType("answer_lines")
    exec(compile(PROGRAM, "docs/edge-application.md", "exec"), module.__dict__)
    return module


def answers_to(application, engine, texts, budget):
    lines = queue.Queue()
    for text in texts:
        lines.put((time.monotonic(), text))
    lines.put(None)
    found = []
    application.serve(engine, lines, found.append, budget)
    return found


def test_the_program_answers_every_line_of_a_pipe(bundle, tmp_path):
    path = tmp_path / "answer_lines.py"
    path.write_text(PROGRAM)
    lines = b"is it warm\n\n\xff\xfe broken\n" + b"x" * 10_000 + b"\nlast without an end"
    command = [sys.executable, str(path), str(bundle), "--budget", "5"]
    done = subprocess.run(command, input=lines, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    asked = ["is it warm", "\ufffd\ufffd broken", "x" * 2000, "last without an end"]
    assert [one["line"] for one in found] == asked
    assert all(1 <= one["tokens"] <= 48 and not one["late"] for one in found)


def test_a_bundle_that_is_wrong_is_said_at_the_start(tmp_path):
    path = tmp_path / "answer_lines.py"
    path.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(path), "nothing"], input=b"a\n", capture_output=True, check=False)
    assert done.returncode == 1 and b"BundleError" in done.stderr and not done.stdout


def test_answers_get_shorter_when_late_and_long_again(application, bundle):
    bias = {fake_engine.EOS: -1e4, ord("\n"): -1e4}
    with load(bundle) as engine:
        step, generate = engine.session.step, engine.generate
        engine.session.step = lambda *given: (time.sleep(0.004), step(*given))[1]
        engine.generate = lambda prompt, **options: generate(prompt, logit_bias=bias, **options)
        burst = answers_to(application, engine, ["question"] * 40, budget=1.5)
        tokens = [one["tokens"] for one in burst]
        assert tokens[0] > tokens[-1] == application.LEAST_TOKENS, tokens
        alone = answers_to(application, engine, ["question"], budget=5)
        assert alone[0]["tokens"] == 48 and not alone[0]["late"]


def test_the_clock_ends_what_the_estimate_got_wrong(application, bundle):
    bias = {fake_engine.EOS: -1e4, ord("\n"): -1e4, 65: 1e4}
    with load(bundle) as engine:
        step, generate = engine.session.step, engine.generate
        engine.session.step = lambda *given: (time.sleep(0.05), step(*given))[1]
        engine.generate = lambda prompt, **options: generate(prompt, logit_bias=bias, **options)
        pace = application.Pace()
        pace.next = 0.001
        _, generation = application.answer(engine, pace, "question", time.monotonic() + 0.5)
        assert generation.finish_reason == "cancelled" and 4 <= len(generation.tokens) < 20
        assert pace.next > 0.01


def test_one_bad_line_does_not_end_it(application, bundle):
    with load(bundle) as engine:
        found = answers_to(application, engine, ["\ud800", "good"], budget=5)
    assert "not valid Unicode" in found[0]["error"] and found[1]["tokens"] >= 1


def test_long_lines_are_cut_and_read_to_their_end(application):
    lines = queue.Queue()
    application.read_lines(io.BytesIO(b"a" * 5000 + b"\nb\n" + b"c" * 2000 + b"\n"), lines)
    read = [lines.get() for _ in range(4)]
    assert [len(item[1]) for item in read[:3]] == [2000, 1, 2000] and read[3] is None
