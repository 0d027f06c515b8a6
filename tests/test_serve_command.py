"""`moedge serve` as a command: its start, its end, what it says; and the page about it, whose commands are run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fake_engine
import httpx
import pytest
from click.testing import CliRunner
from serving import NAME, STREAM, serving

openai = pytest.importorskip("openai")

from moedge.errors import BundleError, DependencyError  # noqa: E402
from moedge.runtime.engine import load  # noqa: E402
from moedge.runtime.serve_commands import STREAM_INTERVAL, serve_command  # noqa: E402

ENDLESS = {"max_tokens": 60, "logit_bias": {str(fake_engine.EOS): -100}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("command") / "bundle")
    with load(bundle, prefill_chunk=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, slots=3) as server:
        yield server


def alone(engine, prompt, **options):
    return "".join(engine.generate(prompt, **options))


def start(bundle, *options):
    command = [sys.executable, "-m", "moedge", "serve", str(bundle), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    line = process.stderr.readline()
    return process, line


def test_the_command_ends_cleanly_at_sigterm_and_lets_texts_end(engine):
    process, line = start(engine.bundle.path, "--slots", "2", "--name", NAME)
    try:
        assert line.startswith(f"{NAME} on http://127.0.0.1:") and line.endswith("/v1 (cpu, 2 slots)\n"), line
        with openai.OpenAI(base_url=line.split()[2], api_key="none", max_retries=0, timeout=30) as client:
            stream = iter(client.completions.create(model=NAME, prompt="a", **STREAM, **ENDLESS))
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
            assert pieces[-1].usage.completion_tokens == 60 and pieces[-2].choices[0].finish_reason == "length"
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        rest = process.communicate()[1]
    assert "Traceback" not in rest


def test_the_command_after_kill_9_starts_clean(engine, tmp_path):
    """Killed while a stream runs; the next start takes the same port, and finds nothing in its way."""
    before = sorted(path.name for path in Path(engine.bundle.path).rglob("*"))
    audit = tmp_path / "audit"
    process, line = start(engine.bundle.path, "--audit", str(audit))
    address = line.split(" on ")[1].split()[0]
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30) as client:
        model = client.models.list().data[0].id
        stream = client.completions.create(model=model, prompt="a", stream=True, n=8, **ENDLESS)
        next(iter(stream))
        process.kill()
        process.communicate()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
    process, line = start(engine.bundle.path, "--port", address.split(":")[2].split("/")[0], "--audit", str(audit))
    try:
        assert line.split(" on ")[1].split()[0] == address
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=30) as client:
            assert client.completions.create(model=model, prompt="a", max_tokens=3).usage.completion_tokens == 3
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
        process.communicate()
    assert sorted(path.name for path in Path(engine.bundle.path).rglob("*")) == before
    assert [json.loads(text)["completion_tokens"] for text in audit.read_text().splitlines()][-1] == 3


def test_pieces_do_not_wait_for_acknowledgements():
    """Nagle's algorithm is off on accepted connections: asyncio turns it off for sockets that say they are TCP."""
    import asyncio
    import socket

    from moedge.runtime.serve_commands import _listen

    async def accepted_nodelay():
        loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        class Peer(asyncio.Protocol):
            def connection_made(self, transport):
                connection = transport.get_extra_info("socket")
                found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        with _listen("127.0.0.1", 0) as listener:
            server = await loop.create_server(Peer, sock=listener)
            with socket.create_connection(listener.getsockname()):
                nodelay = await asyncio.wait_for(found, 5)
            server.close()
        return nodelay

    assert asyncio.run(accepted_nodelay())


def test_the_command_says_what_is_wrong(engine):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process, line = start(engine.bundle.path, "--port", port)
        process.communicate()
        assert process.returncode == 1
        assert line == (
            f"error: cannot listen on 127.0.0.1 port {port} (Address already in use); "
            "choose another: --port 0 takes any that is free\n"
        )


@pytest.mark.parametrize("option", ["--timeout", "--drain", "--stream-interval"])
def test_times_are_finite(option):
    for value in ("nan", "inf"):
        result = CliRunner().invoke(serve_command, ["bundle", option, value])
        assert result.exit_code == 2 and ("is not a finite number" in result.output or "in the range" in result.output)


def test_the_interval_between_writes_is_said_once(engine):
    (option,) = [option for option in serve_command.params if option.name == "stream_interval"]
    assert option.default == 1000 * STREAM_INTERVAL and f"within {1000 * STREAM_INTERVAL:g} ms" in PAGE
    with serving(engine) as server:
        assert server.service.mailbox.interval == STREAM_INTERVAL


def test_a_wrong_path_is_told_before_a_missing_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(BundleError, match="nothing: no such folder; make a bundle with: moedge export"):
        CliRunner().invoke(serve_command, [str(tmp_path / "nothing")], catch_exceptions=False)
    bundle = fake_engine.write_bundle(tmp_path / "bundle")
    with pytest.raises(DependencyError, match=r"fastapi is not installed \(needed to serve\); install it: pip install"):
        CliRunner().invoke(serve_command, [str(bundle)], catch_exceptions=False)


def test_the_server_is_not_imported_before_it_is_needed():
    code = (
        "import sys; from moedge.runtime import serve_commands, scheduler, aio;"
        "assert not {'fastapi', 'uvicorn', 'pydantic', 'prometheus_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The page about it

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's second block is for curl")
def test_the_pages_commands_run(engine, tmp_path):
    """The first two blocks, as a newcomer types them: nothing has to be there but a bundle."""
    (_, serve), ask = blocks("sh")[0].strip().splitlines(), blocks("sh")[1]
    assert serve == "moedge serve bundle/"
    (tmp_path / "bundle").symlink_to(engine.bundle.path)
    command = [sys.executable, "-m", *serve.split(), "--port", "0"]  # the page's port may be taken here
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stderr.readline().split(" on ")[1].split("/v1")[0]
        first, *rest = ask.replace("http://127.0.0.1:8000", address).splitlines()
        models = subprocess.run(["bash", "-c", first], capture_output=True, text=True, check=True).stdout
        script = "\n".join(rest).replace("NAME", json.loads(models)["data"][0]["id"])
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["text"] == alone(engine, "def read(self", max_new_tokens=20)
        as_form = script.replace("-H 'Content-Type: application/json'", "")
        done = subprocess.run(["bash", "-c", as_form], capture_output=True, text=True, check=True)
        assert "send JSON, with Content-Type: application/json" in done.stdout
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
        process.communicate()


def test_the_pages_programs_run(server, engine):
    completion, chat = (program.replace("http://127.0.0.1:8000", server.url) for program in blocks("python"))
    for program, text in (
        (completion, alone(engine, "def read(self", max_new_tokens=20)),
        (chat, alone(engine, "<user>What does this do?<assistant>") + "\n"),
    ):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == text


def test_what_the_page_says_of_the_sample_is_so():
    from moedge.runtime.tokens import Tokenizer

    assert not Tokenizer(Path(__file__).parent.parent / "sample").has_chat_template
    assert "this model has no chat template: ask\n/v1/completions" in PAGE


def test_the_pages_options_exist():
    from moedge.runtime.serve_commands import serve_command

    there = {option for parameter in serve_command.params for option in parameter.opts}
    own = re.sub(r"`(?:moedge build|scripts/)[^`]*`|with `--seconds 1800`", "", PAGE)
    assert set(re.findall(r"--[a-z][a-z-]+", own)) <= there
