"""A thin wrapper of a `tokenizers` file: ids in and out, the end-of-text id, and a digest of its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from statespan.errors import UserError

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>")


class Tokenizer:
    def __init__(self, path: Path) -> None:
        """Raises UserError where tokenizer.json is missing or cannot be parsed."""
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; a checkpoint folder needs tokenizer.json beside its weights")
        raw = path.read_bytes()
        try:
            self._backend = Backend.from_buffer(raw)
        except Exception as error:
            raise UserError(f"{path} is not a tokenizers file: {error}") from error
        self.digest = hashlib.sha256(raw).hexdigest()
        self.vocab_size = self._backend.get_vocab_size()
        self.eos_id = self._find_eos(path.parent)

    def _find_eos(self, folder: Path) -> int | None:
        settings = folder / "tokenizer_config.json"
        named = json.loads(settings.read_text()).get("eos_token") if settings.is_file() else None
        named = named.get("content") if isinstance(named, dict) else named
        ids = (self._backend.token_to_id(name) for name in ((named,) if named else EOS_NAMES))
        return next((i for i in ids if i is not None), None)

    def encode(self, text: str) -> list[int]:
        """Token ids, no special tokens added."""
        (whole,) = self._backend.encode_batch_fast([text], add_special_tokens=False)  # fast: keeps no offsets
        ids: list[int] = whole.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens. Bytes that are no whole character show as U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id."""
        return self._backend.id_to_token(token_id) or f"<{token_id}>"
