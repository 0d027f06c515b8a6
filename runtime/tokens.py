"""Text to tokens and back: the bundle's tokenizer, text that arrives by whole characters, chat templates.

Nothing here needs transformers; what it does around `tokenizer.json` (which classes put a first token in front, what a
chat template sees) is done the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..bundle import read_json
from ..errors import EngineError, UsageError

# Classes whose own rule, not tokenizer.json's post-processor, adds the first and last token -> the rule's default.
_ADDS_BOS = {"Llama": True, "CodeLlama": True, "Gemma": True, "Cohere": True, "GPTNeoX": False}

_REPLACEMENT = "\ufffd"  # what an unfinished character decodes to
_UNFINISHED = 3  # bytes, so tokens, that an unfinished character has at most
_CONTEXT = 6  # tokens of the prompt that decide how the first new token reads (a leading space or none)
_PATIENCE = 64  # tokens after which text that still ends in broken bytes is let go


class Tokenizer:
    """The tokenizer of a bundle.

    Raises:
        EngineError: the bundle has none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise EngineError(
                f"{folder} has no tokenizer.json: give token ids instead of text, "
                "or put the model's tokenizer.json into the checkpoint and export it again"
            )
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise EngineError(f"{path} cannot be read ({error}); export the bundle again") from error
        config_path = folder / "tokenizer_config.json"
        self._config = read_json(config_path, EngineError) if config_path.is_file() else {}
        self._folder = folder
        self._adds = self._special_rule()
        # Of bytes that are put one behind the other a token's are its own; elsewhere its neighbours matter.
        self._by_bytes = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._pieces: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model expects at the ends (a chat template has it already)."""
        if not isinstance(text, str):
            raise UsageError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        if self._adds is None:
            return list(self._backend.encode(text, add_special_tokens=special).ids)
        ids = list(self._backend.encode(text, add_special_tokens=False).ids)
        first, last = self._adds if special else ([], [])
        return [*first, *ids, *last]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out unless `skip_special` is False."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def piece(self, token: int) -> str:
        """The text of a token that is the same wherever it stands; "" where that cannot be said."""
        found = self._pieces.get(token)
        if found is None:
            text = self.decode([token]) if self._by_bytes else ""
            found = self._pieces[token] = "" if _REPLACEMENT in text else text
        return found

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for `messages` ({"role", "content"}), by the model's chat template; encode with special=False.

        Raises:
            EngineError: the model has no chat template, or the template refuses the messages.
        """
        source = self._chat_template()
        try:
            template = _environment().from_string(source)
            seen = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special_texts()}
            return str(template.render({"messages": list(messages), **seen, **variables}))
        except Exception as error:  # templates are programs: what one does not foresee is a bug of its own
            raise EngineError(f"the chat template of {self._folder} refuses these messages: {error}") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chats, and says how its prompts look."""
        return self._find_chat_template() is not None

    def _chat_template(self) -> str:
        template = self._find_chat_template()
        if template is None:
            raise EngineError(f"{self._folder} has no chat template (chat_template.jinja): generate without chat")
        return template

    def _find_chat_template(self) -> str | None:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several by name: the one called default
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template if isinstance(template, str) else None

    def _special_texts(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        texts = {name: _content(self._config.get(name)) for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    def _special_rule(self) -> tuple[list[int], list[int]] | None:
        """Tokens to put before and after a text; None where tokenizer.json's post-processor knows."""
        family = str(self._config.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer")
        if family not in _ADDS_BOS:
            return None
        wanted = (
            ("bos_token", self._config.get("add_bos_token", _ADDS_BOS[family])),
            ("eos_token", self._config.get("add_eos_token", False)),
        )
        ends: list[list[int]] = []
        for name, add in wanted:
            text = _content(self._config.get(name))
            token = self.token_id(text) if add and text is not None else None
            ends.append([] if token is None else [token])
        return ends[0], ends[1]


class StreamDecoder:
    """Tokens in, one at a time; text out, never half a character. The pieces join to what `decode` gives for all.

    `context` are the tokens before the first: what a token reads as depends on its predecessor. `whole` says that they
    end with a whole character, as tokens of a text do; ids from elsewhere may end inside one, which is then completed.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, whole: bool = True) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])
        for _ in range(_UNFINISHED if len(context) > _CONTEXT else 0):  # the cut may have gone through a character
            if tokenizer.decode(self._ids).startswith(_REPLACEMENT):
                del self._ids[0]
        self._read = len(self._ids)  # tokens whose text has been given out
        for back in range(0 if whole else min(_UNFINISHED, self._read) + 1):
            if not tokenizer.decode(self._ids[: self._read - back]).endswith(_REPLACEMENT):
                self._read -= back
                break

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if self._read == len(self._ids):
            piece = self._tokenizer.piece(token)
            if piece:
                self._ids, self._read = [token], 1
                return piece
        self._ids.append(token)
        return self._take(patient=len(self._ids) - self._read < _PATIENCE)

    def finish(self) -> str:
        """What is left: an unfinished character reads as U+FFFD."""
        return self._take(patient=False)

    def _take(self, *, patient: bool) -> str:
        known = self._tokenizer.decode(self._ids[: self._read])
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(known) or (patient and text.endswith(_REPLACEMENT)):
            return ""
        # The tokens just given out become the context of the next.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(known) :]


class StopMatcher:
    """Holds back text that may turn out to be the beginning of a stop text.

    Raises:
        UsageError: an empty stop text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise UsageError(f"stop must be a list of texts, not the text {stops!r}")
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError("a stop text must not be empty")
        self._stops = list(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be given out now, and whether a stop text has come (it and what follows are dropped)."""
        if not self._stops:
            return piece, False
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            text, self._held = self._held[: min(places)], ""
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def finish(self) -> str:
        """What was held back and is no stop text after all."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with (and goes on after)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _content(token: Any) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _environment() -> Any:
    """jinja2's sandbox with what chat templates are written against (as transformers gives them)."""
    import json

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_extension()]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _generation_extension() -> Any:
    """`{% generation %}`: marks the assistant's words for training; here its body is just text."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    return Generation
