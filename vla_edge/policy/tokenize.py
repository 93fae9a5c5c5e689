"""Instruction -> token ids, by the tokenizer that lies beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.types import VlaEdgeError

MAX_INSTRUCTION_CHARACTERS = 2000


class InstructionError(VlaEdgeError):
    """An instruction that the policy cannot be given."""


class InstructionTokenizer:
    """Fixed-length token ids and mask for one instruction, cached for as long as the instruction stays.

    Args:
        path: a Hugging Face `tokenizer.json`.
        max_length: L tokens; a longer instruction is refused rather than cut, since a cut one may mean the opposite.
        prompt: template with `{instruction}`.
    """

    def __init__(self, path: str | Path, max_length: int, prompt: str = "{instruction}\n"):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self._prompt = prompt
        self._unknown_id = self._find_unknown_id()
        self._cached: tuple[str, np.ndarray, np.ndarray] | None = None

    def __call__(self, instruction: str) -> tuple[np.ndarray, np.ndarray]:
        """((1, L) int64 ids, (1, L) bool mask), right padded.

        Raises:
            InstructionError: empty, too long, or mostly words the policy has never seen.
        """
        if self._cached is None or self._cached[0] != instruction:
            ids = self._encode(instruction)
            tokens = np.zeros((1, self._max_length), np.int64)
            mask = np.zeros((1, self._max_length), bool)
            tokens[0, : len(ids)] = ids
            mask[0, : len(ids)] = True
            self._cached = (instruction, tokens, mask)
        return self._cached[1], self._cached[2]

    def _encode(self, instruction: str) -> list[int]:
        text = instruction.strip()
        if not text:
            raise InstructionError("the instruction is empty; say what to do in the words the policy was trained on")
        if len(text) > MAX_INSTRUCTION_CHARACTERS:
            raise InstructionError(
                f"the instruction has {len(text)} characters, more than {MAX_INSTRUCTION_CHARACTERS}; shorten it"
            )
        ids = self._tokenizer.encode(self._prompt.format(instruction=text)).ids
        if len(ids) > self._max_length:
            raise InstructionError(
                f"the instruction needs {len(ids)} tokens and the policy takes {self._max_length}; shorten it"
            )
        if not ids or ids.count(self._unknown_id) * 2 > len(ids):
            raise InstructionError(
                f"the policy's tokenizer does not know most words of {text[:60]!r}; "
                "use the language and words it was trained on"
            )
        return ids

    def _find_unknown_id(self) -> int | None:
        for token in ("[UNK]", "<unk>"):
            found = self._tokenizer.token_to_id(token)
            if found is not None:
                return found
        return None
