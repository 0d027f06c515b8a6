"""The text `distill.py` learns from, its held-out part, and the tokenizer made from the rest."""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
HELD_OUT_SHARE = 0.04
HELD_OUT_FILE_BYTES = 80_000
# Not sources to learn from: installed packages, tests and their data, generated tables.
EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__",
    "ensurepip", "lib-dynload", "turtledemo", "__phello__",
}  # fmt: skip
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "entities.py")
NOTICE = """\
# Text that the sample model was never trained on: files of the Python {version} standard library, whole and unchanged.
# Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved.
# Used under the PSF License Agreement: https://docs.python.org/3/license.html
"""


@dataclass
class Corpus:
    train: list[tuple[str, str]] = field(default_factory=list)  # (path, text)
    held: list[tuple[str, str]] = field(default_factory=list)

    @staticmethod
    def bytes_of(files: Iterable[tuple[str, str]]) -> int:
        return sum(len(text.encode()) for _, text in files)

    def held_text(self) -> str:
        """Whole held-out files up to about 80 KB, in the order of their hash, behind the licence notice."""
        text = NOTICE.format(version=platform.python_version())
        for path, body in self.held:
            if len(body) <= 24_000 and len((text + body).encode()) <= HELD_OUT_FILE_BYTES:
                text += f"\n# ---- {path} ----\n{body}"
        return text

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256("".join(text for _, text in self.train + self.held).encode())
        return {
            "source": f"Python {platform.python_version()} standard library, .py files",
            "licence": "PSF-2.0",
            "excluded_folders": sorted(EXCLUDED_FOLDERS),
            "excluded_prefixes": list(EXCLUDED_PREFIXES),
            "train_files": len(self.train),
            "train_bytes": self.bytes_of(self.train),
            "held_out_files": len(self.held),
            "held_out_bytes": self.bytes_of(self.held),
            "held_out_paths": sorted(path for path, _ in self.held),
            "sha256": digest.hexdigest(),
        }


def library_files(root: Path) -> list[tuple[str, str]]:
    found, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS & set(parts) or any(part.startswith(EXCLUDED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        key = hashlib.sha256(text.encode()).digest()
        if len(text) > 100 and key not in seen:
            seen.add(key)
            found.append(("/".join(parts), text))
    return found


def read_corpus(seed: int) -> Corpus:
    def rank(path: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") / 2**64

    corpus = Corpus()
    for path, text in library_files(Path(sysconfig.get_path("stdlib"))):
        (corpus.held if rank(path) < HELD_OUT_SHARE else corpus.train).append((path, text))
    corpus.held.sort(key=lambda item: rank(item[0]))
    return corpus


def train_tokenizer(files: list[tuple[str, str]], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in files), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode_files(tokenizer: Tokenizer, files: list[tuple[str, str]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """One stream: the end token before every file, and once at the end."""
    end = tokenizer.token_to_id(END)
    stream: list[int] = []
    for encoding in tokenizer.encode_batch([text for _, text in files]):
        stream += [end, *encoding.ids]
    return np.array([*stream, end], dtype=np.int64)
