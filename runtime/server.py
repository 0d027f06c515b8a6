"""`moedge serve`: an OpenAI-compatible HTTP server over one engine. Imported only where it runs: it needs fastapi.

Everything that computes happens in the scheduler's thread; the event loop only takes requests in and hands text on.
Prompts and texts are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import EngineError, MoedgeError
from .engine import Engine
from .mailbox import Mailbox
from .openai_answers import Answer, error_document
from .openai_types import FORMS, ChatRequest, CompletionRequest, unsupported
from .requests import ContextFull, TextRequest, make_request
from .scheduler import Busy, Scheduler
from .serve_commands import SLOTS, STREAM_INTERVAL
from .server_audit import AuditLog
from .server_guard import Guard, Keys, Limits
from .server_metrics import Metrics
from .server_patience import patient_protocol
from .server_runs import ClientGone, Refusal, Run, unless_gone
from .server_streams import EventStream

_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/readyz", "/metrics", "/openapi.json"}
_GONE = 499  # nginx's word for a client that closed the connection; nobody reads it
_LAST_WRITES = 5  # seconds, at the end, for clients to take what is there
_SMALL_BODY = 32 << 10  # bytes whose tokens are made quickly enough to hold up the event loop


@dataclass(frozen=True)
class Settings:
    """How a server behaves; sizes in bytes, times in seconds."""

    name: str  # the model's, to clients
    slots: int = SLOTS
    queue: int = 64
    max_body: int = 4 << 20
    body_seconds: float = 30.0
    all_bodies: int = 64 << 20  # of all requests that are being read or taken in
    header_seconds: float = 10.0
    write_seconds: float = 30.0  # for a client to take 32 KiB, or what there is
    stream_interval: float = STREAM_INTERVAL
    connections: int = 900
    max_prompt_tokens: int | None = None  # None: what the context has room for
    max_new_tokens: int | None = None  # None: likewise; more is cut to it
    max_texts: int = 8  # in one request: prompts times n
    per_key: int | None = None  # requests of one key at a time
    timeout: float = 600.0
    drain: float = 30.0
    keys: Keys = field(default_factory=lambda: Keys({}))
    audit: Path | None = None


class Service:
    """What the routes share: the scheduler, the limits, who is being served."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        engine.tokenizer  # noqa: B018  (a bundle without one is refused at once, not with the first request)
        self.mailbox = Mailbox(settings.stream_interval)
        self.scheduler = Scheduler(engine, slots=settings.slots, queue=settings.queue, told=self.mailbox.ring)
        self.metrics.watch(self.scheduler)
        self.created = int(time.time())
        self._audit = AuditLog(settings.audit, engine.bundle) if settings.audit is not None else None
        self._serving: Counter[str] = Counter()

    def warm_up(self) -> None:
        """Make a short text before the first client's, which would wait for modules that are imported when they are
        needed, and for memory that is touched for the first time."""
        if self.engine.tokenizer.has_chat_template:
            with contextlib.suppress(MoedgeError):  # a template that refuses so short a chat
                self.engine.tokenizer.chat([{"role": "user", "content": "a"}])
        over = threading.Event()
        request = make_request(self.engine, [0], max_new_tokens=2, temperature=1.0, seed=0, logprobs=0)
        self.scheduler.submit([request], lambda _, update: over.set() if update.done else None)
        over.wait()
        self.scheduler.observer = self.metrics  # which have clients' texts alone

    async def close(self) -> None:
        """Let the texts end, for as long as the settings say; then cancel them."""
        await asyncio.to_thread(self.scheduler.close, self.settings.drain)

    @contextlib.contextmanager
    def place_for(self, key: str) -> Iterator[None]:
        """A place among those that `key` may take at a time."""
        most = self.settings.per_key
        if most is not None and self._serving[key] >= most:
            raise Refusal(429, f"this key has {most} requests running, which is all it may", "rate_limit_exceeded", 1)
        self._serving[key] += 1
        try:
            yield
        finally:
            self._serving[key] -= 1
            if not self._serving[key]:
                del self._serving[key]

    def run(self, requests: list[TextRequest], seconds: float | None, *, whole: bool) -> Run:
        """Let texts run, for as long as the client and the settings allow; `whole`: read when they are over."""
        most = min(self.settings.timeout, math.inf if seconds is None else seconds)
        return Run(self.scheduler, self.mailbox, requests, most, self.failure, whole=whole)

    def audit(self, key: str, path: str, answer: Answer) -> None:
        """Write down who asked for how much, if that is wanted."""
        if self._audit is not None:
            self._audit.write(key, path, answer)

    def public(self, error: Exception) -> str:
        """An error's text for clients, whom the bundle's place on disk does not concern."""
        return str(error).replace(str(self.engine.bundle.path), self.settings.name)

    def failure(self, error: Exception) -> Refusal:
        """What to tell of a text that failed: the engine's own words, but none of a bug's."""
        if isinstance(error, EngineError):
            return Refusal(503, self.public(error), "engine_error")
        if isinstance(error, MemoryError):
            return Refusal(503, "not enough memory for this text; try again later", "out_of_memory")
        return Refusal(500, "the server made a mistake", "internal_error")

    def requests_of(self, body: CompletionRequest | ChatRequest) -> tuple[list[TextRequest], list[str], int]:
        """The texts that a request asks for, what is echoed before each, and how many tokens its prompts have."""
        wrong = unsupported(body)
        if wrong is not None:
            raise Refusal(400, wrong, "unsupported")
        try:
            options, count = body.sampling(), body.n or 1
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        prompts: list[str | list[int]]
        if isinstance(body, ChatRequest):
            if not self.engine.tokenizer.has_chat_template:
                raise Refusal(400, "this model has no chat template: ask /v1/completions", "no_chat_template")
            text = self.engine.tokenizer.chat([message.to_template() for message in body.messages])
            prompts, limit = [self.engine.tokenizer.encode(text, special=False)], body.max_completion_tokens
            limit = limit or body.max_tokens
            options["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        else:
            prompts, limit = body.prompts(), body.max_tokens
            options["logprobs"] = body.logprobs
        most = min(self.settings.max_texts, self.settings.slots + self.settings.queue)  # more would never be taken
        if len(prompts) * count > most:
            raise Refusal(400, f"prompts times n is more than {most}", "too_many_texts")
        made: list[TextRequest] = []
        echo: list[str] = []
        total = 0
        for prompt in prompts:
            try:
                request = self._limited(make_request(self.engine, prompt, **options), limit)
            except ContextFull:
                room = self.engine.session.capacity
                text = f"the prompt is too long: there is room for {room} tokens"
                raise Refusal(400, text, "context_length_exceeded") from None
            if isinstance(body, ChatRequest):
                request = replace(request, whole_prompt=True)
            total += len(request.prompt)
            made += _seeded(request, count)
            if isinstance(body, CompletionRequest) and body.echo:
                echo += [prompt if isinstance(prompt, str) else self.engine.detokenize(prompt)] * count
        return made, echo, total

    def _limited(self, request: TextRequest, limit: int | None) -> TextRequest:
        """The request with as many new tokens as were asked for, may be had, and have room."""
        most, tokens = self.settings.max_prompt_tokens, len(request.prompt)
        if most is not None and tokens > most:
            raise Refusal(400, f"the prompt has {tokens} tokens; this server takes {most}", "context_length_exceeded")
        room = self.engine.session.capacity - tokens + 1
        limits = [value for value in (limit, self.settings.max_new_tokens, room) if value is not None]
        return replace(request, max_new_tokens=min(limits))


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The server's ASGI application; it runs a scheduler over `engine` from its start to its end."""
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await asyncio.to_thread(service.warm_up)
            yield
        finally:
            await service.close()

    app = FastAPI(title="moedge", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    _add_errors(app, service)
    _add_texts(app, service)
    _add_models(app, service)
    _add_health(app, service)

    def described() -> dict[str, Any]:
        """The server's OpenAPI: FastAPI's, and the one name that a model may have."""
        document = FastAPI.openapi(app)
        for kind in (ChatRequest, CompletionRequest):
            document["components"]["schemas"][kind.__name__]["properties"]["model"]["enum"] = [settings.name]
        return document

    app.openapi = described  # type: ignore[method-assign]

    def answered(path: str, status: int) -> None:
        service.metrics.answered(path if path in _PATHS else "other", status)

    limits = Limits(settings.max_body, settings.all_bodies, settings.body_seconds)
    app.add_middleware(Guard, keys=settings.keys, limits=limits, answered=answered)
    return app


class Server(uvicorn.Server):
    """uvicorn's, which tells the texts at SIGTERM how long they have; it waits for them and for their clients."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        app = create_app(engine, settings)
        super().__init__(_config(app, settings))
        self.service: Service = app.state.service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.scheduler.end_within(self.service.settings.drain)
        await super().shutdown(sockets)


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs the application: with limits on slow connections, and nothing logged but faults."""
    return uvicorn.Config(
        app,
        http=patient_protocol(settings.header_seconds, settings.write_seconds, settings.connections),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain) + _LAST_WRITES,
    )


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be understood or served."},
    401: {"description": "No valid API key."},
    404: {"description": "No such model."},
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is too large."},
    429: {"description": "Too many are waiting; Retry-After says when to come again."},
    503: {"description": "The engine could not serve this text, or the server is closing."},
    504: {"description": "The time was over before the first token."},
}


def _add_texts(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, body: CompletionRequest | ChatRequest) -> Response:
        _check_model(service, body.model)
        key = request.state.key_name
        places = contextlib.ExitStack()
        places.enter_context(service.place_for(key))
        try:
            small = request.state.body_bytes <= _SMALL_BODY
            made = service.requests_of(body) if small else await asyncio.to_thread(service.requests_of, body)
            run, (_, echo, total) = service.run(made[0], body.timeout, whole=not body.stream), made
        except BaseException:
            places.close()
            raise
        chat = isinstance(body, ChatRequest)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        found = Answer(chat, service.settings.name, run.jobs, total, service.engine.tokenizer, echo, usage)
        places.callback(service.audit, key, request.url.path, found)
        places.callback(run.cancel)
        try:
            if not body.stream:
                return JSONResponse(found.whole(await unless_gone(request.receive, run.rest())))
            first = await unless_gone(request.receive, run.next())
            return EventStream(run, found, first, places.pop_all())
        finally:
            places.close()

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(request: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        """The next message of a chat."""
        return await answer(request, body)

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        """Text that goes on from prompts."""
        return await answer(request, body)


def _add_models(app: FastAPI, service: Service) -> None:
    entry = {"id": service.settings.name, "object": "model", "created": service.created, "owned_by": "moedge"}

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}", responses={401: _ERRORS[401], 404: _ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        _check_model(service, name)
        return entry


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: _ERRORS[503]})
    async def readyz() -> Response:
        """Texts are taken."""
        ready = service.scheduler.open
        return JSONResponse({"status": "ready" if ready else "closing"}, 200 if ready else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, service: Service) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return _error(error.status, str(error), error.code, headers)

    async def busy(_: Request, error: Exception) -> Response:
        assert isinstance(error, Busy)
        return _error(429, str(error), "rate_limit_exceeded", {"retry-after": str(error.retry_after)})

    async def wrong(_: Request, error: Exception) -> Response:
        return _error(400, service.public(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kind = request.headers.get("content-type", "")
        if not kind.startswith("application/json"):
            was = f"is {kind!r}" if kind else "is missing"
            return _error(400, f"the header Content-Type {was}; send JSON, with Content-Type: application/json")
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
        path, text = [str(part) for part in first["loc"] if part != "body"], str(first["msg"])
        for at, part in enumerate(path[:-1]):
            if part in FORMS:
                path, text = path[: at + 1], FORMS[part]
                break
        place = ".".join(path)
        return _error(400, f"{place}: {text}" if place else text, param=place or None)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = str(error.detail)
        if error.status_code == 404:
            text = f"there is nothing at {request.url.path}; see /openapi.json"
        return _error(error.status_code, text, headers=dict(error.headers or {}))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=_GONE)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(Busy, busy)
    app.add_exception_handler(MoedgeError, wrong)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, gone)


def _error(
    status: int,
    message: str,
    code: str | None = None,
    headers: dict[str, str] | None = None,
    *,
    param: str | None = None,
) -> Response:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    # json.dumps writes ASCII: a message may quote half a surrogate pair, which UTF-8 has no form for.
    content = json.dumps(error_document(message, kind, code, param))
    return Response(content, status, headers, "application/json")


def _check_model(service: Service, name: str) -> None:
    if name != service.settings.name:
        raise Refusal(404, f"there is no such model; this server has {service.settings.name!r}", "model_not_found")


def _seeded(request: TextRequest, count: int) -> list[TextRequest]:
    """`count` texts of one prompt (the same array, so that it is computed once), each with its own seed."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * count
    samplings = [replace(request.sampling, seed=seed + place) for place in range(count)]
    return [replace(request, sampling=sampling) for sampling in samplings]
