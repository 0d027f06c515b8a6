"""Who asked for how much, a line of JSON each; never what."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

from ..bundle import MANIFEST, Bundle, sha256_file
from ..errors import UsageError
from .openai_answers import Answer

log = logging.getLogger(__name__)


class AuditLog:
    """Appends a line for each answer to a file.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, bundle: Bundle) -> None:
        try:
            self._stream = path.open("a", encoding="utf-8", buffering=1)  # by lines
        except OSError as error:
            raise UsageError(f"the audit log {path} cannot be written: {error.strerror}") from None
        self._bundle = sha256_file(bundle.file(MANIFEST))

    def write(self, key: str, path: str, answer: Answer) -> None:
        """Write down an answer, as far as it came."""
        now = datetime.datetime.now(datetime.timezone.utc)
        line = {
            "time": now.isoformat(timespec="milliseconds"),
            "key": key,
            "path": path,
            "model": answer.model,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": sum(len(job.writer.tokens) for job in answer.jobs),
            "finish_reasons": [job.writer.finish_reason or job.stop_reason for job in answer.jobs],
            "bundle_sha256": self._bundle,
        }
        try:
            self._stream.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk is no reason to fail a text that is there
            log.error("the audit log lacks an answer: %s", error.strerror)
