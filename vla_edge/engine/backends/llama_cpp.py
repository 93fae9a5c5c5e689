"""llama.cpp, through llama-cpp-python: the language stages of a policy that writes its actions as tokens, as one.

Its file is GGUF (see `gguf_file`), and its keys and values stay in its own memory, so that nothing of them crosses
between the prompt and the tokens. Inputs of quantized weights are rounded to 8 bits, as llama.cpp always does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from importlib.metadata import version as package_version
from pathlib import Path

import llama_cpp
import numpy as np

from vla_edge.engine.backends import BackendError, BuiltStage, StageInterface, contiguous, run_bound, share
from vla_edge.engine.backends.cpu import threads_to_use, threads_worth_trying
from vla_edge.engine.gguf_file import words_of

READS = ".gguf"
# what keys and values are kept in
CACHES = {"float16": llama_cpp.GGML_TYPE_F16, "float32": llama_cpp.GGML_TYPE_F32}


@llama_cpp.llama_log_callback
def _quiet(level, text, data) -> None:
    """Nothing of what it says: failures are told by what its calls return."""


def version() -> str:
    """Of the Python package."""
    return package_version("llama-cpp-python")


def precisions() -> tuple[str, ...]:
    """What weights it multiplies."""
    return ("float32", "float16", "int8 weights", "int4 weights")


def candidates(gguf: str | Path) -> list[dict]:
    """Threads; keys and values in float32, or in float16 as llama.cpp itself has them."""
    ways: list[dict] = [{"cache": "float32"}, {"cache": "float16", "exact": False}]
    return [{"threads": threads, **way} for way in ways for threads in threads_worth_trying()]


def gains_by_reduced_range() -> bool:
    """Never: its sums of products do not saturate."""
    return False


def build(gguf: str | Path, directory: str | Path, stage: StageInterface, options: Mapping | None = None) -> BuiltStage:
    """Put the file, and the words beside it, into `directory`.

    Args:
        options: `threads`, `cache` ("float16", "float32"); those not given as in the first candidate.

    Raises:
        BackendError: the runtime cannot load the file.
    """
    target = Path(directory) / f"{stage.name}{READS}"
    share(gguf, target)
    share(words_of(gguf), words_of(target))
    options = {**candidates(target)[0], **(options or {})}
    load(target, stage, options)
    return BuiltStage(target.name, options)


def load(
    path: str | Path, stage: StageInterface, options: Mapping | None = None, threads: int | None = None
) -> LlamaStage:
    """Ready to run.

    Args:
        threads: at most this many; as built when None.

    Raises:
        BackendError: the runtime refuses the file, or its tensors are not those of `stage`.
    """
    options = dict(options or {})
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    try:
        words = np.load(words_of(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BackendError(f"{words_of(path)}, the words of stage file {path}, cannot be read: {error}") from error
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise BackendError(f"llama.cpp {version()} cannot load stage file {path}; build the bundle again")
    number = threads_to_use(options.get("threads"), threads)
    return LlamaStage(model, words, stage, number, CACHES[options.get("cache", "float32")])


class LlamaStage:
    """One model with its memory, behind the stage contract: prompt in, scores of all tokens out."""

    def __init__(self, model, words: np.ndarray, interface: StageInterface, threads: int, cache: int):
        self.interface, self._words, self._model = interface, words, model
        image, prompt, _ = interface.inputs
        self._tokens, bins = interface.outputs[0].shape[1:]
        self._width = image.shape[2]
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        found = llama_cpp.llama_model_n_embd(model), words.shape[1], llama_cpp.llama_vocab_n_tokens(vocabulary)
        if found != (self._width, self._width, bins):
            llama_cpp.llama_model_free(model)
            raise BackendError(
                f"the file of stage {interface.name!r} is {found[0]} wide with {found[2]} tokens, and its manifest says "
                f"{self._width} and {bins}; build the bundle again"
            )
        length = image.shape[1] + prompt.shape[1]
        self._prompt = np.zeros((length, self._width), np.float32)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = length + self._tokens
        parameters.n_batch = parameters.n_ubatch = length
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = cache
        # its fused attention multiplies in float16 whatever the cache holds
        if cache == CACHES["float32"]:
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            llama_cpp.llama_model_free(model)
            raise BackendError(f"llama.cpp has no memory for the keys and values of stage {interface.name!r}")
        self._batches = llama_cpp.llama_batch_init(length, self._width, 1), llama_cpp.llama_batch_init(1, 0, 1)

    def __del__(self):
        if getattr(self, "_context", None):
            for batch in getattr(self, "_batches", ()):
                llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_bound(self, inputs, [spec.name for spec in self.interface.inputs])

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        image, words, mask = contiguous(inputs, [spec.name for spec in self.interface.inputs])
        (scores,) = contiguous(outputs, [spec.name for spec in self.interface.outputs])
        pictures = image.shape[1]

        def step() -> None:
            count = int(mask.sum())
            # the first word, the pictures, the rest of the words; no padding
            self._prompt[0] = self._words[words[0, 0]]
            self._prompt[1 : 1 + pictures] = image[0]
            self._prompt[1 + pictures : pictures + count] = self._words[words[0, 1:count]]
            self.read(pictures + count, scores[0, 0])
            for index in range(1, self._tokens):
                self.decode(int(scores[0, index - 1].argmax()), pictures + count + index - 1, scores[0, index])

        return step

    def read(self, length: int, scores: np.ndarray) -> None:
        """The prompt of `length` tokens, all at once -> (V,) scores of the first token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = self._batches[0]
        ctypes.memmove(batch.embd, self._prompt.ctypes.data, self._prompt[:length].nbytes)
        for place in range(length):
            _place(batch, place, place, last=place == length - 1)
        self._compute(batch, length, scores)

    def decode(self, token: int, position: int, scores: np.ndarray) -> None:
        """A token at a place behind what was read, instead of any there -> (V,) scores of the next."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, position, -1)
        batch = self._batches[1]
        batch.token[0] = token
        _place(batch, 0, position, last=True)
        self._compute(batch, 1, scores)

    def _compute(self, batch, count: int, scores: np.ndarray) -> None:
        batch.n_tokens = count
        if failed := llama_cpp.llama_decode(self._context, batch):
            raise BackendError(f"stage {self.interface.name!r} cannot run: llama.cpp's code {failed}")
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        scores[...] = np.ctypeslib.as_array(found, scores.shape)


def _place(batch, index: int, position: int, last: bool) -> None:
    batch.pos[index], batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = position, 1, 0, last
