"""Observation -> action chunk, through the stages of a bundle. No torch is imported to run a bundle.

What is common to all policies is here: pre- and post-processing, checks, times. How the stages become actions is a
loop's (`engine.loop`), chosen by the stages there are and the spec: a flow, noise taken out level by level, tokens one
after the other, or a chunk at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.engine.continuation import Continuation
from vla_edge.engine.diffusion_loop import DiffusionLoop
from vla_edge.engine.flow_loop import FlowLoop
from vla_edge.engine.loop import DirectLoop, Loop, RunnerError
from vla_edge.engine.token_loop import (
    DraftedTokenLoop,
    GenerateLoop,
    RevisedTokenLoop,
    SpeculativeTokenLoop,
    TokenLoop,
)
from vla_edge.engine.vision_cache import VisionCache
from vla_edge.policy.preprocess import Postprocessor, Preprocessor
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.tokenize import InstructionError, InstructionTokenizer
from vla_edge.types import ActionChunk, InferenceTiming, Observation

__all__ = ["Inference", "Runner", "RunnerError"]

LOOPS: tuple[type[Loop], ...] = (
    FlowLoop, DiffusionLoop, TokenLoop, RevisedTokenLoop, DraftedTokenLoop, SpeculativeTokenLoop, GenerateLoop, DirectLoop,
)  # fmt: skip


@dataclass(frozen=True)
class Inference:
    """A chunk and where its time went."""

    chunk: ActionChunk
    timing: InferenceTiming


class Runner:
    """A policy, ready to infer. One inference at a time; calls from several threads wait for each other.

    Attributes:
        stages: the single stages, for verification.
        pictures_seen: of all inferences so far, those that went through the vision stage.

    Args:
        spec: the policy.
        tokenizer: path of its tokenizer.json; None where it reads no instruction.
        stages: those of a flow, a diffusion, a token or a direct policy (`policy.stages`).
        about: what `description` tells.
        num_steps: Euler steps, all of which ask the network; those of `spec` when None.

    Raises:
        RunnerError: a stage is missing or the number of steps is out of range.
    """

    def __init__(
        self,
        spec: PolicySpec,
        tokenizer: str | Path | None,
        stages: Mapping[str, LoadedStage],
        about: Mapping | None = None,
        num_steps: int | None = None,
    ):
        loop = next((loop for loop in LOOPS if set(loop.NAMES) <= stages.keys() and loop.runs(spec)), None)
        if loop is None:
            kinds = "; or ".join(", ".join(kind.NAMES) for kind in LOOPS)
            found = ", ".join(stages) or "none"
            raise RunnerError(f"the engine's stages are {found}, but a policy has {kinds}; build it again")
        self.spec = spec
        self._about = dict(about or {})
        prompter = InstructionTokenizer.of(spec, tokenizer)
        # of its own, so that checking a message never waits for an inference
        self._checker = InstructionTokenizer.of(spec, tokenizer)
        self._preprocess, self._postprocess = Preprocessor(spec, prompter), Postprocessor(spec)
        self.stages = dict(stages)
        self._lock, self.pictures_seen = threading.Lock(), 0
        self._loop = loop(spec, self.stages)
        self._cache = VisionCache(spec.vision_cache, [camera.scale for camera in spec.cameras])
        if num_steps:
            self.set_num_steps(num_steps)
        else:
            self.set_num_steps(spec.num_steps, spec.evaluated_steps)

    @classmethod
    def from_bundle(cls, path: str | Path, num_steps: int | None = None, threads: int | None = None) -> Runner:
        """The engine in bundle directory `path`.

        Args:
            threads: at most this many per stage; as measured at build time when None.

        Raises:
            BundleError, BackendError, RunnerError: the bundle is not valid, or cannot be run here.
        """
        from vla_edge.engine.bundle import Bundle, load_entries

        bundle = Bundle.load(path)
        stages = load_entries(bundle.stages, bundle.directory, threads)
        return cls(bundle.spec, bundle.tokenizer_path, stages, bundle.description(), num_steps)

    @classmethod
    def from_checkpoint(cls, path: str | Path, num_steps: int | None = None) -> Runner:
        """The policy itself, in PyTorch eager at full precision: what every engine is compared with.

        Raises:
            CheckpointError: there is no valid checkpoint at `path`.
        """
        from vla_edge.policy.checkpoint import load_checkpoint, load_policy

        checkpoint = load_checkpoint(path)
        return cls.from_policy(load_policy(checkpoint), checkpoint, num_steps)

    @classmethod
    def from_policy(cls, policy, checkpoint, num_steps: int | None = None) -> Runner:
        """As `from_checkpoint`, for a policy that is loaded already."""
        from vla_edge.engine.backends.torch import load_stages

        about = {
            "name": checkpoint.directory.name,
            "backend": "torch",
            "precision": "float32",
            "bytes": checkpoint.bytes,
        }
        return cls(checkpoint.spec, checkpoint.tokenizer_path, load_stages(policy), about, num_steps)

    @property
    def num_steps(self) -> int:
        """How often an inference asks the network that makes actions."""
        return self._loop.num_steps

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise an inference takes, where it takes any: (1, chunk_size, max_action_dim), or as a loop says."""
        return self._loop.noise_shape

    def set_num_steps(self, num_steps: int, evaluated: Sequence[int] = ()) -> None:
        """Choose the number of Euler steps and compute what depends on flow time alone.

        Args:
            evaluated: steps that ask the network, from 0 on; all of them when empty.

        Raises:
            RunnerError: it is not between 1 and 100, or there is no flow and it is not 1.
        """
        with self._lock:
            self._loop.set_num_steps(num_steps, evaluated)

    def infer(
        self,
        observation: Observation,
        seed: int = 0,
        noise: np.ndarray | None = None,
        continuation: Continuation | None = None,
    ) -> Inference:
        """The chunk for one observation.

        Args:
            seed: with the observation's stamp, decides the starting noise.
            noise: starting noise of `noise_shape`, to be used instead.
            continuation: plan that the chunk is to continue.

        Raises:
            ObservationError, InstructionError: the policy cannot be shown this observation.
            RunnerError: the result is not finite, or the policy was not trained for a prefix like the continuation's.
        """
        begin = time.perf_counter()
        with self._lock:
            self._show(observation, noise, seed)
            if continuation is not None:
                self._loop.continue_(
                    continuation, self._postprocess.inverse(continuation.positions, observation.joints)
                )
            again = self._cache.again(self._loop.images, observation.stamp_ns) if self.spec.vision_cache else ()
            prepared = time.perf_counter()
            try:
                times = self._loop.run(again)
            except BaseException:
                self._cache.forget()
                raise
            self.pictures_seen += len(self._loop.images) - len(again)
            actions = time.perf_counter()
            chunk = self._chunk(observation)
        end = time.perf_counter()
        passes, decoded = self._loop.passes, self._loop.decoded
        return Inference(chunk, InferenceTiming(prepared - begin, times, end - actions, end - begin, passes, decoded))

    def steps(
        self, observation: Observation, seed: int = 0
    ) -> Generator[tuple[str, Callable[[], None]], None, ActionChunk]:
        """An inference call by call: stage and call, each to be made before the next is asked for; returns the chunk.

        Pictures are not taken for seen before. Raises as `infer`.
        """
        with self._lock:
            self._show(observation, None, seed)
            self._cache.forget()
            yield from self._loop.calls()
            return self._chunk(observation)

    @property
    def buffer_bytes(self) -> int:
        """Of the tensors that go between stages."""
        return sum(buffer.nbytes for buffer in (*self._loop.images, *self._loop.buffers.values()))

    def _show(self, observation: Observation, noise: np.ndarray | None, seed: int) -> None:
        """Fill what the first stages read."""
        tensors = self._preprocess(observation)
        pictures = np.stack([tensors.pop(f"image.{camera.name}") for camera in self.spec.cameras], axis=1)
        for picture, buffer in zip(pictures.reshape(-1, *pictures.shape[2:]), self._loop.images):
            buffer[...] = picture
        for name, value in tensors.items():
            if name in self._loop.buffers:  # not every policy reads its state as numbers
                self._loop.buffers[name][...] = value.reshape(self._loop.buffers[name].shape)
        self._loop.start(noise, seed, observation.stamp_ns)

    def _chunk(self, observation: Observation) -> ActionChunk:
        """What the loop has come to."""
        positions = self._postprocess(self._loop.actions, observation.joints)
        if not np.isfinite(positions).all():
            raise RunnerError(
                "the engine gave actions that are not finite; build it again and look at its verification"
            )
        return ActionChunk(observation.stamp_ns, self.spec.joint_names, positions, self.spec.dt)

    def warm_up(self, repeats: int = 2) -> None:
        """Run every stage on zeros, so that the first real inference is as fast as the others; no chunk comes of it."""
        with self._lock:
            for buffer in (*self._loop.images, *self._loop.buffers.values()):
                buffer[...] = 0
            if "lang_mask" in self._loop.buffers:
                self._loop.buffers["lang_mask"][:, :1] = True
            self._cache.forget()
            for _ in range(repeats):
                self._loop.run()

    def check_instruction(self, instruction: str) -> None:
        """Nothing, when the policy can be given `instruction`.

        Raises:
            InstructionError: it is empty, too long, or made of words the policy does not know.
        """
        if not instruction.strip():
            raise InstructionError("the instruction is empty; say what to do in the words the policy was trained on")
        self._checker(instruction)

    def description(self) -> dict:
        """What this engine is, in plain types: name, backend, precision, bytes, num_steps, and more of a bundle."""
        return {**self._about, "num_steps": self.num_steps}

    def stage_inputs(self, observation: Observation, seed: int = 0) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """The inputs of every stage as they come up in an inference, in order: for looking at stages one by one.

        The first and the last step stand for all.
        """
        self.infer(observation, seed)
        with self._lock:
            found = list(self._loop.inputs(seed, observation.stamp_ns))
        yield from found
