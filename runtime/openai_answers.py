"""What OpenAI's clients expect to get: the documents of answers and of the pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .scheduler import Job
from .tokens import Tokenizer
from .writing import TokenLogprob

_LEAST = -9999.0  # what OpenAI gives for a probability of 0; JSON has no infinity
_encode = json.JSONEncoder().encode
# Finish reasons of jobs that OpenAI has no word for: the text is shorter than it could have been.
_FINISH = {"deadline": "length", "cancelled": "length"}


@dataclass
class Answer:
    """The jobs of one request, `n` for each prompt, and how they are told."""

    chat: bool
    model: str
    jobs: list[Job]
    prompt_tokens: int  # of all prompts together, each once
    tokenizer: Tokenizer
    echo: list[str] = field(default_factory=list)  # what stands before each text
    tells_usage: bool = False  # in a stream: its pieces have `usage`, null but in one more at the end
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of the tokens that a stream has told of
    _frames: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def usage(self) -> dict[str, Any]:
        """Counts of tokens: of the prompts, of the texts, and how many of the prompts' were not computed again."""
        made = sum(len(job.writer.tokens) for job in self.jobs)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": min(job.reused_tokens for job in self.jobs)},
        }

    def whole(self, texts: Sequence[str]) -> dict[str, Any]:
        """The answer in one document."""
        choices = []
        for place, (job, text) in enumerate(zip(self.jobs, texts, strict=True)):
            choice = self._choice(place, job, 0, len(job.writer.tokens))
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = (self.echo[place] if self.echo else "") + text
            choices.append({**choice, "finish_reason": finish_reason(job)})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._document(kind, choices), "usage": self.usage()}

    def piece(self, place: int, text: str, sent: int, tokens: int, done: bool) -> dict[str, Any]:
        """A piece of a stream: what came of one text since `sent` tokens."""
        job = self.jobs[place]
        choice = self._choice(place, job, sent, tokens)
        if self.chat:
            choice["delta"] = {"content": text} if text or not done else {}
        else:
            choice["text"] = text
        choice["finish_reason"] = finish_reason(job) if done else None
        return self._piece([choice])

    def event(self, place: int, text: str, sent: int, tokens: int, done: bool) -> bytes:
        """`piece` as an event. Of most pieces only the text differs: the rest is written out once for each job."""
        if done or not text or self.jobs[place].request.logprobs is not None:
            return sse(self.piece(place, text, sent, tokens, done))
        if place not in self._frames:
            mark = uuid.uuid4().hex
            before, _, after = sse(self.piece(place, mark, sent, tokens, False)).partition(f'"{mark}"'.encode())
            self._frames[place] = before, after
        before, after = self._frames[place]
        return before + _encode(text).encode() + after

    def opening(self, place: int) -> dict[str, Any] | None:
        """What a stream begins with for each text: the role in a chat, the echo of a prompt."""
        if self.chat:
            choice = {"index": place, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
            return self._piece([{**choice, "finish_reason": None}])
        if self.echo:
            choice = {"index": place, "text": self.echo[place], "logprobs": None, "finish_reason": None}
            return self._piece([choice])
        return None

    def closing(self) -> dict[str, Any]:
        """The last piece for who asked for usage: it has no choices."""
        return {**self._piece([]), "usage": self.usage()}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        document = self._document("chat.completion.chunk" if self.chat else "text_completion", choices)
        return {**document, "usage": None} if self.tells_usage else document

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, place: int, job: Job, first: int, last: int) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if job.request.logprobs is not None:
            found = job.writer.logprobs[first:last]
            logprobs = self._chat_logprobs(found) if self.chat else self._text_logprobs(found, place, first)
        return {"index": place, "logprobs": logprobs}

    def _chat_logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(one.token, one.logprob), "top_logprobs": [self._entry(*entry) for entry in one.top]}
                for one in found
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {
            "token": text,
            "logprob": max(logprob, _LEAST),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }

    def _text_logprobs(self, found: Sequence[TokenLogprob], place: int, first: int) -> dict[str, Any]:
        texts = [self._text(one.token) for one in found]
        offsets, offset = [], self._offsets.get(place, 0) if first else 0
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[place] = offset
        return {
            "tokens": texts,
            "token_logprobs": [max(one.logprob, _LEAST) for one in found],
            "top_logprobs": [{self._text(token): max(value, _LEAST) for token, value in one.top} for one in found],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


def finish_reason(job: Job) -> str | None:
    """A job's finish reason in OpenAI's words."""
    reason = job.writer.finish_reason
    return _FINISH.get(reason, reason) if reason is not None else None


def error_document(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def sse(document: dict[str, Any] | str) -> bytes:
    """One server-sent event. ASCII throughout: text may hold half a surrogate pair."""
    data = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
    return f"data: {data}\n\n".encode()
