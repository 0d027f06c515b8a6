"""A server for tests: in a thread of this process, on a free port of the loopback, gone with the test."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from moedge.runtime.engine import Engine
from moedge.runtime.server import Server, Service, Settings

NAME = "tiny"
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


class Serving:
    """Where it listens, and what serves there."""

    def __init__(self, port: int, service: Service, server: uvicorn.Server) -> None:
        self.port = port
        self.uvicorn = server
        self.service = service
        self.url = f"http://127.0.0.1:{port}"

        # One for all tests: making a client reads every certificate authority there is.
        self.http = httpx.Client(base_url=self.url, timeout=20, verify=False)

    def client(self, **options: Any) -> Any:
        """The official client."""
        import openai

        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def settle(self) -> None:
        """Wait until no text runs or waits; a slot that is stuck fails the test."""
        scheduler = self.service.scheduler
        for _ in range(500):
            if not scheduler.running + scheduler.waiting and not self.service._serving:
                return
            time.sleep(0.01)
        raise AssertionError(f"stuck: {scheduler.running} run, {scheduler.waiting} wait, {self.service._serving}")


@contextlib.contextmanager
def serving(engine: Engine, *, send_buffer: int | None = None, **settings: Any) -> Iterator[Serving]:
    """Serve `engine` while the context lasts. `send_buffer`: bytes that the kernel keeps for a slow reader."""
    server = Server(engine, Settings(**{"name": NAME, "drain": 5.0, **settings}))
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.002)
        here = Serving(listener.getsockname()[1], server.service, server)
        try:
            yield here
        finally:
            here.http.close()
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive(), "the server does not end"
