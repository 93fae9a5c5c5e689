"""The files of a checkpoint, read so that whatever is missing or damaged is named: file, entry and remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vla_edge.types import VlaEdgeError


class CheckpointError(VlaEdgeError):
    """A checkpoint that is missing, damaged, incomplete, or asks for what this version does not do."""


class Document(dict):
    """A JSON object that knows its file, so that a missing entry is a sentence instead of a KeyError."""

    def __init__(self, path: Path, entries: dict):
        super().__init__(entries)
        self.path = path

    def __missing__(self, key):
        raise CheckpointError(f"{self.path} has no entry {key!r}; copy the file from where the policy was trained")

    def count(self, key: str) -> int:
        """A whole number of at least one.

        Raises:
            CheckpointError: it is absent or anything else.
        """
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path} says {key} = {value!r}; it must be a whole number of at least 1")
        return value


def in_hub_cache(repository: str, file: str) -> Path | None:
    """A file of a repository that Hugging Face's cache holds already; nothing is looked up on the network."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted((cache / f"models--{repository.replace('/', '--')}").glob(f"snapshots/*/{file}"))
    return found[-1] if found else None


def read_json(path: Path) -> Document:
    """A JSON object, every object inside a `Document` too.

    Raises:
        CheckpointError: there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entries: Document(path, entries))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; copy it from where the policy was trained"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(content, Document):
        raise CheckpointError(f"{path} does not hold a JSON object; copy it again")
    return content


def read_tensors(path: Path, framework: str) -> dict:
    """All tensors of a safetensors file, by name.

    Args:
        framework: "torch" or "numpy".

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    from importlib import import_module

    from safetensors import SafetensorError

    try:
        return import_module(f"safetensors.{framework}").load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; copy it from where the policy was trained"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error


def read_tokenizer(path: Path):
    """A Hugging Face `tokenizers.Tokenizer`.

    Raises:
        CheckpointError: the file is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own for it
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
