"""Instruction -> token ids, by the tokenizer that lies beside the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vla_edge.policy.spec import PolicySpec, TextSpec
from vla_edge.types import VlaEdgeError

MAX_INSTRUCTION_CHARACTERS = 2000


class InstructionError(VlaEdgeError):
    """An instruction that the policy cannot be given."""


class InstructionTokenizer:
    """Fixed-length token ids and mask for one instruction, cached for as long as the instruction stays.

    Args:
        path: a Hugging Face `tokenizer.json`.
        max_length: L tokens; a longer instruction is refused rather than cut, since a cut one may mean the opposite.
        prompt: template with `{instruction}`, and `{state}` where the policy reads its state so.
        text: what else becomes of an instruction.
    """

    def __init__(
        self, path: str | Path, max_length: int, prompt: str = "{instruction}\n", text: TextSpec = TextSpec()
    ):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self._prompt, self._text = prompt, text
        self._unknown_id = self._find_unknown_id()
        self._cached: tuple[tuple[str, str], np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, spec: PolicySpec, path: str | Path | None) -> InstructionTokenizer | NoWords:
        """That of a policy; one that reads no instruction needs no `path`."""
        return cls(path, spec.tokenizer_max_length, spec.prompt, spec.text) if spec.reads_instruction else NoWords()

    def __call__(self, instruction: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """((1, L) int64 ids, (1, L) bool mask), right padded.

        Args:
            state: (S,) normalized; read by a policy whose prompt says it, which takes zeros for None.

        Raises:
            InstructionError: empty, too long, or mostly words the policy has never seen.
        """
        dims = self._text.state_dims
        bins = " ".join(map(str, state_bins(np.zeros(dims) if state is None else state[:dims])))
        if self._cached is None or self._cached[0] != (instruction, bins):
            ids = self._encode(instruction, bins)
            tokens = np.zeros((1, self._max_length), np.int64)
            mask = np.zeros((1, self._max_length), bool)
            tokens[0, : len(ids)] = ids
            mask[0, : len(ids)] = True
            self._cached = ((instruction, bins), tokens, mask)
        return self._cached[1], self._cached[2]

    def _encode(self, instruction: str, state: str) -> list[int]:
        text = instruction.strip()
        if self._text.plain:
            text = text.replace("_", " ").replace("\n", " ")
        if self._text.lower:
            text = text.lower()
        if self._text.bare:
            text = "".join(one for one in text if one.isalnum() or one.isspace() or one == "_")
        if not text.strip():
            raise InstructionError("the instruction is empty; say what to do in the words the policy was trained on")
        if len(text) > MAX_INSTRUCTION_CHARACTERS:
            raise InstructionError(
                f"the instruction has {len(text)} characters, more than {MAX_INSTRUCTION_CHARACTERS}; shorten it"
            )
        if self._text.listed:
            text = str([text])
        ids = self._tokenizer.encode(self._prompt.format(instruction=text, state=state)).ids
        last = list(self._text.last)
        if ids[len(ids) - len(last) :] != last:
            ids = ids + last
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


class NoWords:
    """In the place of a tokenizer, of policies that read no instruction: whatever is said, there are no tokens of it."""

    def __call__(self, instruction: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """((1, 0) int64, (1, 0) bool)."""
        return np.zeros((1, 0), np.int64), np.zeros((1, 0), bool)


def state_bins(state: np.ndarray) -> np.ndarray:
    """Which of 256 equal bins of [-1, 1] each value falls into; -1 for what lies below (openpi's convention)."""
    return np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
