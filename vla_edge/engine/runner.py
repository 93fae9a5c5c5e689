"""Observation -> action chunk, through the stages of a bundle. No torch is imported to run a bundle.

Every tensor has one buffer for the life of the runner and the stages are bound to these buffers, so nothing is
allocated or copied between stages, and the prefix's keys and values are read in place by every flow step. What depends
on flow time alone is computed once, when the number of steps is chosen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_edge.engine.backends import LoadedStage
from vla_edge.policy.noise import noise_for
from vla_edge.policy.preprocess import Postprocessor, Preprocessor
from vla_edge.policy.spec import PolicySpec
from vla_edge.policy.tokenize import InstructionTokenizer
from vla_edge.types import ActionChunk, InferenceTiming, Observation, VlaEdgeError

STAGES = ("vision", "prefix", "time", "denoise")
MOST_STEPS = 100


class RunnerError(VlaEdgeError):
    """An engine that cannot be run as asked, or that gave a result no robot may be shown."""


@dataclass(frozen=True)
class Inference:
    """A chunk and where its time went."""

    chunk: ActionChunk
    timing: InferenceTiming


class Runner:
    """A flow policy, ready to infer. One inference at a time; calls from several threads wait for each other.

    `stages` gives access to the single stages, for verification.

    Args:
        spec: the policy.
        tokenizer: path of its tokenizer.json.
        stages: vision, prefix, time and denoise.
        about: what `description` tells.
        num_steps: Euler steps; the checkpoint's own when None.

    Raises:
        RunnerError: a stage is missing or the number of steps is out of range.
    """

    def __init__(
        self,
        spec: PolicySpec,
        tokenizer: str | Path,
        stages: Mapping[str, LoadedStage],
        about: Mapping | None = None,
        num_steps: int | None = None,
    ):
        missing = [name for name in STAGES if name not in stages]
        if missing:
            raise RunnerError(f"the engine lacks the stages {', '.join(missing)} of a flow policy; build it again")
        self.spec = spec
        self._about = dict(about or {})
        prompter = InstructionTokenizer(tokenizer, spec.tokenizer_max_length, spec.prompt)
        # of its own, so that checking a message never waits for an inference
        self._checker = InstructionTokenizer(tokenizer, spec.tokenizer_max_length, spec.prompt)
        self._preprocess, self._postprocess = Preprocessor(spec, prompter), Postprocessor(spec)
        self.stages = dict(stages)
        self._lock = threading.Lock()
        self._allocate()
        self.set_num_steps(num_steps or spec.num_steps)

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
            "bytes": checkpoint.weights_path.stat().st_size,
        }
        return cls(checkpoint.spec, checkpoint.tokenizer_path, load_stages(policy), about, num_steps)

    @property
    def num_steps(self) -> int:
        """Euler steps of an inference."""
        return len(self._denoise)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise an inference starts from: (1, chunk_size, max_action_dim)."""
        return self._x.shape

    def set_num_steps(self, num_steps: int) -> None:
        """Choose the number of Euler steps and compute what depends on flow time alone.

        Raises:
            RunnerError: it is not between 1 and 100.
        """
        if not 1 <= num_steps <= MOST_STEPS:
            raise RunnerError(f"num_steps is {num_steps}, allowed is 1 to {MOST_STEPS}")
        with self._lock:
            self._denoise = []
            for step in range(num_steps):
                moment = np.array([1.0 - step / num_steps], np.float32)
                condition = self.stages["time"].run({"time": moment})["time_condition"]
                inputs = self._buffers | {"time_condition": np.ascontiguousarray(condition)}
                self._denoise.append(self.stages["denoise"].bind(inputs, self._buffers))

    def infer(self, observation: Observation, seed: int = 0, noise: np.ndarray | None = None) -> Inference:
        """The chunk for one observation.

        Args:
            seed: with the observation's stamp, decides the starting noise.
            noise: starting noise of `noise_shape`, to be used instead.

        Raises:
            ObservationError, InstructionError: the policy cannot be shown this observation.
            RunnerError: the result is not finite.
        """
        begin = time.perf_counter()
        with self._lock:
            tensors = self._preprocess(observation)
            for camera, buffer in zip(self.spec.cameras, self._images):
                buffer[...] = tensors.pop(f"image.{camera.name}")
            for name, value in tensors.items():
                self._buffers[name][...] = value
            self._x[...] = noise_for(seed, observation.stamp_ns, self._x.shape) if noise is None else noise
            prepared = time.perf_counter()
            times = self._run_stages()
            actions = time.perf_counter()
            positions = self._postprocess(self._x, observation.joints)
        if not np.isfinite(positions).all():
            raise RunnerError(
                "the engine gave actions that are not finite; build it again and look at its verification"
            )
        chunk = ActionChunk(observation.stamp_ns, self.spec.joint_names, positions, self.spec.dt)
        end = time.perf_counter()
        return Inference(chunk, InferenceTiming(prepared - begin, times, end - actions, end - begin))

    def warm_up(self, repeats: int = 2) -> None:
        """Run every stage on zeros, so that the first real inference is as fast as the others; no chunk comes of it."""
        with self._lock:
            for buffer in (*self._images, *self._buffers.values()):
                buffer[...] = 0
            self._buffers["lang_mask"][:, :1] = True
            for _ in range(repeats):
                self._run_stages()

    def check_instruction(self, instruction: str) -> None:
        """Nothing, when the policy can be given `instruction`.

        Raises:
            InstructionError: it is empty, too long, or made of words the policy does not know.
        """
        self._checker(instruction)

    def description(self) -> dict:
        """What this engine is, in plain types: name, backend, precision, bytes, num_steps, and more of a bundle."""
        return {**self._about, "num_steps": self.num_steps}

    def stage_inputs(self, observation: Observation, seed: int = 0) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """The inputs of every stage as they come up in an inference, in order: for looking at stages one by one.

        The first and the last flow step stand for all.
        """
        self.infer(observation, seed)
        with self._lock:
            buffers = {name: buffer.copy() for name, buffer in self._buffers.items()}
            images = [image.copy() for image in self._images]
        image = self.stages["vision"].interface.inputs[0].name
        for picture in images:
            yield "vision", {image: picture}
        yield "prefix", buffers
        x = noise_for(seed, observation.stamp_ns, self.noise_shape)
        for step in range(self.num_steps):
            moment = {"time": np.array([1.0 - step / self.num_steps], np.float32)}
            inputs = buffers | {"x": x} | self.stages["time"].run(moment)
            if step in (0, self.num_steps - 1):
                yield "time", moment
                yield "denoise", inputs
            if step < self.num_steps - 1:
                (velocity,) = self.stages["denoise"].run(inputs).values()
                x = x - velocity / np.float32(self.num_steps)

    def _run_stages(self) -> dict[str, float]:
        """Everything between the input buffers and `self._x`; stage name -> s."""
        begin = time.perf_counter()
        for vision in self._vision:
            vision()
        seen = time.perf_counter()
        self._prefix()
        read = time.perf_counter()
        step = np.float32(1.0 / len(self._denoise))
        for denoise in self._denoise:
            denoise()
            # velocity points at the noise, which is where time 1 is
            self._x -= step * self._velocity
        return {"vision": seen - begin, "prefix": read - seen, "denoise": time.perf_counter() - read}

    def _allocate(self) -> None:
        """One buffer per tensor; each camera's vision stage writes into its part of the prefix's image tokens."""
        stages = {name: self.stages[name].interface for name in STAGES}
        specs = [spec for name in ("prefix", "denoise") for spec in (*stages[name].inputs, *stages[name].outputs)]
        self._buffers = {spec.name: spec.zeros() for spec in specs}
        self._x, self._velocity = self._buffers["x"], self._buffers["velocity"]
        image, tokens = stages["vision"].inputs[0], stages["vision"].outputs[0]
        count = tokens.shape[1]
        self._images, self._vision = [], []
        for index in range(len(self.spec.cameras)):
            part = self._buffers["image_tokens"][:, index * count : (index + 1) * count]
            self._images.append(image.zeros())
            self._vision.append(self.stages["vision"].bind({image.name: self._images[-1]}, {tokens.name: part}))
        self._prefix = self.stages["prefix"].bind(self._buffers, self._buffers)
