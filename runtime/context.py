"""One sequence's cache together with the tokens in it: prompts in chunks, and what an earlier prompt already paid for.

A token's cache row may depend, in its last bits, on how the prompt was cut into chunks. So chunks always end at
multiples of their size, and by default only rows of whole chunks are used again: an answer is then the same, bit for
bit, whatever was computed before it. `reuse="all"` uses every row that fits, also those of generated tokens. Where a
session computes the same bits for any cut, several chunks go through it at once, which is faster.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sessions import Session

REUSE = ("exact", "all", "off")


@dataclass
class _Chunk:
    rows: list[NDArray[Any]]
    bytes: int


class PrefixStore:
    """Cache rows of prompts' beginnings, chunk by chunk; at most `limit` bytes, least recently used goes first.

    A chunk is known by the digest of all tokens up to its end, so prompts that begin alike share its rows. Thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._chunks

    def find(self, digests: Sequence[bytes]) -> list[list[NDArray[Any]]]:
        """The rows of as many of a prompt's chunks as are here, from its first."""
        with self._lock:
            found = []
            for digest in digests:
                if digest not in self._chunks:
                    break
                found.append(self._chunks[digest].rows)
            self._touch(digests[: len(found)])
            return found

    def put(self, digests: Sequence[bytes], rows: list[NDArray[Any]]) -> None:
        """Keep the rows of the last of a prompt's chunks so far; what was least recently used makes room.

        A chunk is of no use without those before it: they never make room for it, and where one is gone it is not kept.
        """
        *before, digest = digests
        size = sum(part.nbytes for part in rows)
        with self._lock:
            if size > self.limit or digest in self._chunks or (before and before[-1] not in self._chunks):
                return
            self._touch(before)
            while self.bytes + size > self.limit:
                if len(self._chunks) == len(before):
                    return
                _, oldest = self._chunks.popitem(last=False)
                self.bytes -= oldest.bytes
            self._chunks[digest] = _Chunk(rows, size)
            self.bytes += size
            self._touch(before)

    def _touch(self, digests: Sequence[bytes]) -> None:
        """These are used; the first last, so that a chunk never goes before one that needs it."""
        for digest in reversed(digests):
            self._chunks.move_to_end(digest)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._chunks.clear()
            self.bytes = 0


class Context:
    """A session and the tokens in it. Not thread-safe."""

    def __init__(
        self, session: Session, chunk: int, store: PrefixStore | None, reuse: str = "exact", at_once: int = 1
    ) -> None:
        """`at_once`: chunks that may be computed together: more than one where the session's cuts are alike."""
        self.session = session
        self._at_once = at_once
        self.tokens: list[int] = []
        self.exact = 0  # tokens, from the first, that were computed as whole chunks
        self._chunk = chunk
        self._store = store if reuse != "off" else None
        self._reuse = reuse
        self._prompt: NDArray[np.int64] = np.empty(0, np.int64)
        self._digests: list[bytes] = []
        self._after: tuple[int, NDArray[np.float32]] | None = None  # logits after the first so many tokens
        self._token = np.zeros(1, np.int64)  # of a step

    @property
    def after_prompt(self) -> tuple[int, NDArray[np.float32]] | None:
        """How many tokens the last prompt had, and the logits [vocab] after it; None where that is not known."""
        return self._after

    def clear(self) -> None:
        """Forget all tokens."""
        self.tokens, self.exact, self._after = [], 0, None
        self.session.truncate(0)

    def start(self, prompt: NDArray[np.int64], *, again: bool = False) -> int:
        """Begin a prompt; `advance` computes it. Returns how many of its tokens need no computing.

        again: it is the last one once more: nothing is computed, whatever `reuse` says.
        """
        if self.session.length != len(self.tokens):  # somebody stepped the session itself
            self.clear()
        self._prompt = prompt
        self._digests = _digests(prompt, self._chunk) if self._store is not None else []
        kept = self._common(prompt) if again or self._reuse != "off" else 0
        if self._after is not None and kept >= self._after[0] == len(prompt):
            self._truncate(len(prompt))
            return len(prompt)
        self._after = None
        kept = min(kept, len(prompt) - 1)  # the last token is computed in any case: its logits are what is wanted
        if self._reuse == "exact":
            kept = min(kept, self.exact) // self._chunk * self._chunk
        self._truncate(kept)
        return kept + self._take_stored(kept)

    def advance(self, *, in_turn: bool = False) -> NDArray[np.float32] | None:
        """Compute the prompt's next chunk, or next few: None while there are more, then the logits [vocab] after its
        last token. `in_turn`: one chunk, since others wait.

        Raises:
            EngineError: memory is short; the context then has what it had, and `advance` may be called again.
        """
        start = len(self.tokens)
        if start == len(self._prompt):
            assert self._after is not None
            return self._after[1]
        chunks = 1 if in_turn else self._at_once
        end = min(len(self._prompt), (start // self._chunk + chunks) * self._chunk)
        part = self._prompt[start:end]
        last = end == len(self._prompt)
        logits = self.session.step(part, np.array([len(part) - 1] if last else [], np.int64))
        self.tokens += part.tolist()
        for first in range(start, end - self._chunk + 1, self._chunk):
            if self.exact != first:
                break
            self.exact = first + self._chunk
            so_far = self._digests[: self.exact // self._chunk]
            if self._store is not None and so_far[-1] not in self._store:
                self._store.put(so_far, self.session.read_rows(first, self.exact))
        if not last:
            return None
        self._after = (end, logits.reshape(-1).copy())
        return self._after[1]

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; the logits [vocab] after it, valid until the next step."""
        self._token[0] = token
        logits: NDArray[np.float32] = self.session.step(self._token, _FIRST)[0]
        self.tokens.append(token)
        return logits

    def adopt(self, other: Context) -> None:
        """Take on another context's prompt, computed, by a copy of its rows.

        Raises:
            ValueError: that one's prompt is not computed.
        """
        if other.after_prompt is None:
            raise ValueError("the other context's prompt is not computed")
        count = other.after_prompt[0]
        rows = other.session.read_rows(0, count)
        self.restore(other.tokens[:count], rows, min(other.exact, count), other.after_prompt)

    def restore(
        self, tokens: list[int], rows: Sequence[NDArray[Any]], exact: int, after: tuple[int, NDArray[np.float32]] | None
    ) -> None:
        """Take on tokens whose cache rows come from elsewhere."""
        self.clear()
        self.session.append_rows(rows)
        self.tokens, self.exact, self._after = tokens, exact, after

    def _common(self, prompt: NDArray[np.int64]) -> int:
        """How many tokens the context and `prompt` begin with in common."""
        count = min(len(prompt), len(self.tokens))
        differ = np.flatnonzero(np.array(self.tokens[:count], np.int64) != prompt[:count])
        return int(differ[0]) if len(differ) else count

    def _truncate(self, count: int) -> None:
        self.session.truncate(count)
        del self.tokens[count:]
        self.exact = min(self.exact, count)

    def _take_stored(self, kept: int) -> int:
        """Put stored chunks behind what is here; how many tokens that was."""
        if self._store is None or self.exact != kept or kept % self._chunk:
            return 0
        first = kept // self._chunk
        found = self._store.find(self._digests[: (len(self._prompt) - 1) // self._chunk])
        for rows in found[first:]:
            self.session.append_rows(rows)
        end = max(kept, len(found) * self._chunk)
        self.tokens += self._prompt[kept:end].tolist()
        self.exact = end
        return end - kept


def step_together(work: Sequence[tuple[Context, int]]) -> NDArray[np.float32]:
    """Append a token to each context, in one run; the logits [contexts, vocab], valid until the next step of any.

    The contexts are of one engine, and no more than its `lanes`.

    Raises:
        EngineError: one of them has no room, or memory is short; nothing has changed then.
    """
    first, *others = [context.session for context, _ in work]
    logits = first.step_together(others, np.array([token for _, token in work], np.int64))
    for context, token in work:
        context.tokens.append(token)
    return logits


def _digests(prompt: NDArray[np.int64], chunk: int) -> list[bytes]:
    """For each whole chunk the digest of all tokens up to its end."""
    running = hashlib.blake2b(digest_size=16)
    found = []
    for end in range(chunk, len(prompt) + 1, chunk):
        running.update(prompt[end - chunk : end].tobytes())
        found.append(running.digest())
    return found


_FIRST = np.zeros(1, dtype=np.int64)  # the row of the only token
