"""What stands before the server's routes: API keys, and bodies of bounded size that come in bounded time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .openai_answers import error_document

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYS_VARIABLE = "MOEDGE_API_KEYS"
ANONYMOUS = "anonymous"


class Keys:
    """Who may ask: names and keys, compared in constant time. Without any everybody may."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._digests = {name: hashlib.sha256(key.encode()).digest() for name, key in keys.items()}

    def __len__(self) -> int:
        return len(self._digests)

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Keys of a file, else of the environment's MOEDGE_API_KEYS: `name:key` or `key`, one on each line.

        Raises:
            UsageError: the file cannot be read or has no keys, or a name stands twice.
        """
        if path is None:
            text = os.environ.get(KEYS_VARIABLE, "")
            source = KEYS_VARIABLE
        else:
            source = str(path)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"the API keys in {path} cannot be read: {error}") from None
        keys: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, colon, key = line.partition(":")
            name, key = (name.strip(), key) if colon else (f"key-{number}", line)
            if not key.strip() or name in keys:
                wrong = "has no key" if not key.strip() else "has a name that was there already"
                raise UsageError(f"line {number} of {source} {wrong}; write name:key, each name once")
            keys[name] = key.strip()
        if path is not None and not keys:
            raise UsageError(f"{path} has no API keys; write one on each line, as name:key")
        return cls(keys)

    def name_of(self, given: bytes) -> str | None:
        """The name whose key is `given`; None where it is nobody's. Takes as long for every answer."""
        digest, found = hashlib.sha256(given).digest(), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


@dataclass(frozen=True)
class Limits:
    """On bodies: bytes of one, bytes of all that are held at a time, seconds for one to come."""

    body: int
    all_bodies: int
    seconds: float


class Guard:
    """Lets through to `app` what has a key (paths under /v1) and a body within the limits, read whole."""

    def __init__(self, app: App, *, keys: Keys, limits: Limits, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._answered = answered
        self._keys = keys
        self._limits = limits
        self._held = 0  # bytes of all bodies, until their request is taken in or refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; uvicorn, whose scope stays, sends no body
            scope = {**scope, "method": "GET"}

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._answered(scope["path"], message["status"])
            await send(message)

        try:
            await self._guard(scope, receive, counted)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            if not begun:
                document = error_document("the server is closing", "server_error", "closing")
                await refuse(counted, 503, document, {"connection": "close"})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        name: str | None = ANONYMOUS
        if len(self._keys) and scope["path"].startswith("/v1"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            name = self._keys.name_of(key.strip()) if scheme.lower() == b"bearer" else None
        if name is None:
            text = "this server wants an API key: Authorization: Bearer KEY"
            document = error_document(text, "invalid_request_error", "invalid_api_key")
            await refuse(send, 401, document, {"www-authenticate": "Bearer"})
            return
        scope.setdefault("state", {})["key_name"] = name
        body = _Body()
        try:
            error = await self._read(body, headers, receive)
            if error is not None:
                await refuse(send, *error)
            elif body.whole:  # else the client has gone
                scope["state"]["body_bytes"] = body.size
                await self._app(scope, body.replayed(receive), send)
        finally:
            self._held -= body.size

    async def _read(self, body: _Body, headers: dict[bytes, bytes], receive: Receive) -> _Refused | None:
        """Read the body; what to answer where that is not possible."""
        limits, kind = self._limits, "invalid_request_error"
        try:
            await asyncio.wait_for(self._read_parts(body, headers, receive), limits.seconds)
        except asyncio.TimeoutError:
            text = f"the body did not come within {limits.seconds:g} s"
            return 408, error_document(text, kind), {"connection": "close"}
        except _TooLarge:
            return 413, error_document(f"the body is larger than {limits.body} bytes", kind), {"connection": "close"}
        except _TooMany:
            text = "too many large requests at once; try again in a moment"
            document = error_document(text, "server_error", "overloaded")
            return 503, document, {"connection": "close", "retry-after": "1"}
        return None

    async def _read_parts(self, body: _Body, headers: dict[bytes, bytes], receive: Receive) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limits.body:
            raise _TooLarge
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            part = message.get("body", b"")
            if body.size + len(part) > self._limits.body:
                raise _TooLarge
            if self._held + len(part) > self._limits.all_bodies:
                raise _TooMany
            self._held += len(part)
            body.add(part)
            if not message.get("more_body"):
                body.whole = True
                return


_Refused = tuple[int, dict[str, Any], dict[str, str]]  # status, document, headers


class _Body:
    """A request's body. It counts as held until the answer is over: the request keeps it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0
        self.whole = False

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)

    def replayed(self, receive: Receive) -> Receive:
        """The body as one message, then whatever else comes."""

        async def again() -> Message:
            if not self._parts:
                return await receive()
            whole = b"".join(self._parts)
            self._parts.clear()
            return {"type": "http.request", "body": whole, "more_body": False}

        return again


class _TooLarge(Exception):
    pass


class _TooMany(Exception):
    pass


async def refuse(send: Send, status: int, document: dict[str, Any], headers: dict[str, str]) -> None:
    """Answer by an error."""
    body = json.dumps(document).encode()
    fixed = {"content-type": "application/json", "content-length": str(len(body))}
    encoded = [(name.encode(), value.encode()) for name, value in {**fixed, **headers}.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
