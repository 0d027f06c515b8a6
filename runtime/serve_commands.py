"""`moedge serve`."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle import Bundle
from ..errors import UsageError, require

if TYPE_CHECKING:
    from .server import Settings

_POSITIVE = click.IntRange(1)


class _Span(click.FloatRange):
    """Seconds or the like: a number, where click takes infinity and nan."""

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        found = float(super().convert(value, param, context))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number", param, context)
        return found


SLOTS = 4  # where the engine steps one text at a time
STREAM_INTERVAL = 0.04  # seconds between two writes to a stream, where more than a few run


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", metavar="NAME", help="Engine. [default: the best that runs on this machine]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", help="The model's name to clients. [default: the bundle's]")
@click.option("--slots", type=_POSITIVE, help="Texts that run at once. [default: as many as the engine steps together]")
@click.option("--queue", type=_POSITIVE, default=64, show_default=True, help="Texts that wait; more get 429.")
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys, name:key on each line. [default: MOEDGE_API_KEYS, else none is needed]",
)
@click.option("--per-key", type=_POSITIVE, metavar="N", help="Requests of one key at a time.")
@click.option("--connections", type=_POSITIVE, default=900, show_default=True, help="More are closed at once.")
@click.option("--max-body", type=_POSITIVE, default=4 << 20, show_default=True, metavar="BYTES")
@click.option("--max-prompt-tokens", type=_POSITIVE, metavar="N", help="[default: what the context has room for]")
@click.option("--max-new-tokens", type=_POSITIVE, metavar="N", help="[default: what the context has room for]")
@click.option("--max-texts", type=_POSITIVE, default=8, show_default=True, help="In one request: prompts times n.")
@click.option("--timeout", type=_Span(0, min_open=True), default=600.0, show_default=True, help="Seconds.")
@click.option("--drain", type=_Span(0), default=30.0, show_default=True, help="Seconds for texts to end.")
@click.option(
    "--stream-interval",
    type=_Span(0, 10_000),
    default=1000 * STREAM_INTERVAL,
    show_default=True,
    metavar="MS",
    help="Where more than 4 texts stream, tokens go out so often, together; 0: each as it comes.",
)
@click.option("--audit", type=click.Path(path_type=Path), metavar="FILE", help="Log of who asked for how much.")
@click.option("--threads", type=_POSITIVE, help="Threads that compute. [default: physical cores]")
@click.option("--max-seq-len", type=_POSITIVE, metavar="N", help="Room in each context, below the engine's own.")
@click.option("--prefix-bytes", type=click.IntRange(0), metavar="BYTES", help="Memory for prompts' beginnings.")
@click.option("--lock-weights", is_flag=True, help="Keep the weights in memory, mapped as they are (mlock).")
def serve_command(
    bundle: Path,
    profile: str | None,
    host: str,
    port: int,
    name: str | None,
    slots: int | None,
    api_keys: Path | None,
    threads: int | None,
    max_seq_len: int | None,
    prefix_bytes: int | None,
    lock_weights: bool,
    stream_interval: float,
    **options: Any,
) -> None:
    """OpenAI-compatible HTTP server.

    /v1/chat/completions, /v1/completions and /v1/models; /healthz, /readyz and /metrics. SIGTERM lets texts end.
    """
    opened = Bundle.open(bundle)  # a wrong path is told before an extra that is missing
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, purpose="serve")
    from .engine import PREFIX_BYTES, load
    from .server import Settings
    from .server_guard import Keys

    keys = Keys.read(api_keys)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_exit_at_sigterm())
        listener = stack.enter_context(_listen(host, port))
        engine = stack.enter_context(
            load(
                opened,
                profile,
                threads=threads,
                max_seq_len=max_seq_len,
                lanes=slots or SLOTS,  # an engine of several lanes has them all
                prefix_bytes=PREFIX_BYTES if prefix_bytes is None else prefix_bytes,
                lock_weights=lock_weights,
            )
        )
        slots = slots or (engine.info.max_batch if engine.info.max_batch > 1 else _default_slots(engine))
        model = name or str(engine.bundle.manifest["model"]["name"])
        settings = Settings(name=model, slots=slots, keys=keys, stream_interval=stream_interval / 1000, **options)
        if not keys and not _is_loopback(host):
            click.echo(f"warning: {host} can be reached by others and no API key is needed (--api-keys)", err=True)
        address, actual = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        click.echo(f"{model} on http://{shown}:{actual}/v1 ({engine.profile}, {settings.slots} slots)", err=True)
        _serve(engine, settings, listener)


def _default_slots(engine: Any) -> int:
    """What the engine steps together, as far as half of the memory that is free holds their contexts."""
    from .machine import available_memory_bytes

    lanes, free = int(engine.session.lanes), available_memory_bytes()
    context = max(1, int(engine.session.capacity) * int(engine.info.cache_bytes_per_token))
    return max(SLOTS, lanes if free is None else min(lanes, free // 2 // context))


def _serve(engine: Any, settings: Settings, listener: socket.socket) -> None:
    from .server import Server

    Server(engine, settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already: who connects while the engine loads is served afterwards."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.create_server((host, port), family=family, backlog=1024)
        # asyncio turns Nagle's algorithm off where it sees that a socket is TCP, which create_server does not say; with
        # it on, each stream's pieces wait for the client's delayed acknowledgement, 40 ms.
        return socket.socket(family, made.type, socket.IPPROTO_TCP, fileno=made.detach())
    except socket.gaierror:
        raise UsageError(f"there is no address {host!r} here; use --host 127.0.0.1, or 0.0.0.0 for all") from None
    except OverflowError:
        raise UsageError(f"there is no port {port}") from None
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port} ({os.strerror(error.errno or 0)}); "
            "choose another: --port 0 takes any that is free"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    """SIGTERM is a clean end: exit code 0, also when it comes before the server runs (which handles it itself, and
    sends it once more when it is done)."""

    def leave(*_: object) -> None:
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
