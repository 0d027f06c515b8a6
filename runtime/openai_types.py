"""What OpenAI's clients send, as far as it is understood here. Imported by the server alone: it needs pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_MOST_TEXTS = 64  # prompts in one request
_INT64 = 2**63

# Fields of several forms, for which pydantic has as many complaints: what to say instead.
FORMS = {
    "prompt": f"must be a text, token ids, or a list of up to {_MOST_TEXTS} of either, none of them empty",
    "stop": "must be a text, or a list of up to 16 texts, none of them empty",
    "content": "must be a text, or a list of parts of type text",
}

_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class _Strict(BaseModel):
    # Unknown fields are let pass: clients send many that mean nothing here. Known ones are not converted.
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Strict):
    """What a stream has beside text."""

    include_usage: bool | None = None


class ResponseFormat(_Strict):
    """The form of the answer: only plain text."""

    type: str


class _Common(_Strict):
    model: str = Field(description="The name that /v1/models lists.")
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy. Default: the model's own, else greedy."
    )
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        None, max_length=1024
    )
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    user: str | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's, but what others have too.
    top_k: int | None = Field(None, ge=0, lt=_INT64)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    timeout: float | None = Field(
        None, gt=0, le=86400, allow_inf_nan=False, description="Seconds after which the text ends with what it has."
    )

    def sampling(self) -> dict[str, Any]:
        """The options of `Engine.generate` that both kinds of request have.

        Raises:
            ValueError: a key of logit_bias is no token id.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {
            **{name: getattr(self, name) for name in names},
            "seed": None if self.seed is None else self.seed % _INT64,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {_token(key): value for key, value in (self.logit_bias or {}).items()},
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop or [],
        }


class CompletionRequest(_Common):
    """The body of /v1/completions."""

    prompt: (
        _Text
        | _Tokens
        | Annotated[list[_Text], Field(min_length=1, max_length=_MOST_TEXTS)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=_MOST_TEXTS)]
    )
    max_tokens: int | None = Field(16, ge=1, lt=_INT64)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, be they one or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Strict):
    """A piece of a message. Pictures and sound are not understood."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": content or ""}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(None, ge=1, lt=_INT64)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    modalities: list[str] | None = None


def unsupported(body: CompletionRequest | ChatRequest) -> str | None:
    """What a request asks for that cannot be done here; silence would be taken for consent."""
    if body.tools or body.functions:
        return "tools are not supported: leave them out"
    if body.response_format is not None and body.response_format.type != "text":
        return "response_format must be text"
    if isinstance(body, ChatRequest):
        return "modalities must be text" if set(body.modalities or ()) - {"text"} else None
    if body.suffix:
        return "suffix is not supported: leave it out"
    if body.best_of is not None and body.best_of != (body.n or 1):
        return "best_of must equal n"
    return "echo and logprobs together are not supported" if body.echo and body.logprobs is not None else None


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 12):
        raise ValueError("the keys of logit_bias must be token ids")
    return int(key)
