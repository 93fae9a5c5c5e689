"""Checkpoint + recipe + recordings -> an engine bundle: plan, calibrate, compress, export, compile, verify, write.

Every build is compared with full precision on observations it was not calibrated on; one that strays further than its
recipe accepts leaves nothing behind.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from vla_edge.compress.calibrate import CalibrationData, CalibrationError
from vla_edge.compress.piecewise import give_back
from vla_edge.compress.pipeline import Compressed
from vla_edge.compress.recipe import Recipe, load_recipe
from vla_edge.engine.backends import AUTO, BackendError, chosen_backends, gain_by_reduced_range, get_backend, reads, runs_here
from vla_edge.engine.bundle import Bundle, BundleError, load_entries, writing
from vla_edge.engine.busy import OtherPrograms
from vla_edge.engine.compile import STAND_IN, ExportedStage, compile_ahead, compile_stages, export_stages
from vla_edge.engine.diverge import first_divergence, layer_errors
from vla_edge.engine.factor_race import FactorRace
from vla_edge.engine.foreseen import Chunks
from vla_edge.engine.lockstep import InTurn, infer_together
from vla_edge.engine.manifest import TOKENIZER, write_manifest
from vla_edge.engine.piecewise import Piecewise, available_memory, first_inputs, needs_pieces
from vla_edge.engine.runner import Runner
from vla_edge.engine.verify import VerifyError, check, compare
from vla_edge.files import sha256
from vla_edge.types import Observation

Progress = Callable[[float, str], None]
Then = Callable[[Sequence[ExportedStage], Compressed, Callable], None]
"""Of the stages as files, of what they were made of, and of stage -> a context in which it is in memory."""
PROFILE_REPEATS = 20
# packages a build can do without
OPTIONAL = (
    "openvino", "executorch", "ai-edge-litert", "litert-torch", "mlx", "coremltools", "llama-cpp-python", "gguf", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip
# of a recording, for recipes that train; far more than calibration needs
TRAINING_FRAMES = 4000
# Below this, PyTorch's threads wait for each other longer than they work, and far longer on a busy machine.
PARAMETERS_WORTH_THREADS = 50_000_000


def build(
    checkpoint: str | Path,
    recipe: str | Path | Recipe = "int8",
    backend: str = AUTO,
    output: str | Path | None = None,
    calibration: str | Path | CalibrationData | Iterable[Observation] | None = None,
    progress: Progress | None = None,
    force: bool = False,
    traced: MutableMapping[str, object] | None = None,
    demonstrations: Sequence[str | Path] = (),
    compute_capability: str | None = None,
    build_memory_mb: float | None = None,
    then: Then | None = None,
) -> Path:
    """Build a bundle, or find that it is there already.

    Args:
        checkpoint: directory in LeRobot's layout.
        recipe: name of a shipped one, a file, or a `Recipe`.
        backend: name of a runtime, names with commas between them, or "auto" for those that are installed; of several,
            each stage gets the one that runs it fastest here.
        output: directory of the bundle; `default_output` when None.
        calibration: bag, LeRobot dataset, demonstrations, or observations; the directory `calibration` beside the
            checkpoint when None.
        progress: called with the fraction done and the step being done.
        force: build even when the same bundle exists.
        traced: graphs of stages, filled and reused between builds of one checkpoint; tracing takes most of a build.
        demonstrations: directories that recipes with training steps train on; the recording when there are none.
        compute_capability: of the GPU to build for where it is not here, as "8.6" (backend tensorrt_rtx); another
            runtime verifies such an engine, on the same files.
        build_memory_mb: that the build may take; what is free here when None. A policy that does not fit is built piece by
            piece, see `engine.piecewise`, and goes on where it was when it is interrupted.
        then: called once the engine has passed; what it raises leaves no bundle behind.

    Returns:
        The bundle's directory.

    Raises:
        CheckpointError, RecipeError, CalibrationError, DemonstrationError, TrainingError, BagError, ExportError,
            BackendError, VerifyError, BundleError: what is wrong, where and what to do; nothing is left behind.
    """
    from vla_edge.policy.checkpoint import load_checkpoint

    tell = progress or (lambda fraction, step: None)
    tell(0.0, "reading checkpoint and recipe")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    backends = chosen_backends(backend)
    if len(backends) > 1 and not all(runs_here(name) for name in backends):
        raise BackendError(
            f"of {', '.join(backends)} not all can run here, so they cannot be timed; build for one alone"
        )
    loaded = load_checkpoint(checkpoint)
    target = Path(output) if output else default_output(loaded.directory, recipe.name, backend)
    calibration = calibration_source(calibration, loaded.directory)
    key = build_key(loaded.fingerprint, recipe, backends, calibration, demonstrations, compute_capability)
    if not force and key is not None and _is_valid(target, key):
        tell(1.0, "the bundle is there already")
        return target.expanduser().resolve()
    with enough_disk(target), writing(target) as directory:
        work = target.expanduser().resolve().with_name(f".{target.name}.training")
        job = _Build(
            loaded,
            recipe,
            backends,
            compute_capability,
            directory,
            tell,
            {} if traced is None else traced,
            demonstrations,
            work,
            available_memory() if build_memory_mb is None else round(1e6 * build_memory_mb),
            then,
        )
        with torch_threads(loaded.bytes // 4), enough_memory(loaded.directory):
            manifest = job.run(calibration)
        write_manifest(directory, {**manifest, "build_key": key})
        shutil.rmtree(work, ignore_errors=True)
        tell(1.0, "writing the bundle")
    return target.expanduser().resolve()


def default_output(checkpoint: Path, recipe: str, backend: str) -> Path:
    """`bundles/<recipe>-<backend>` beside the checkpoint, or in the user's cache when that cannot be written."""
    beside = checkpoint.parent
    name = f"{recipe}-{backend.replace(',', '+')}"
    if os.access(beside, os.W_OK):
        return beside / "bundles" / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vla_edge" / "bundles" / beside.name / name


def build_key(
    fingerprint: str, recipe: Recipe, backends: Sequence[str], calibration, demonstrations=(), capability=None
) -> str | None:
    """What a bundle is made of: with equal keys, building again gives the same. None for loose observations."""
    if isinstance(calibration, CalibrationData):
        data = calibration.identity
    elif isinstance(calibration, (str, Path)):
        data = _content(Path(calibration))
    else:
        return None
    machine = [platform.machine(), os.cpu_count(), gain_by_reduced_range(backends)]
    shown = [_content(Path(path)) for path in demonstrations] if recipe.trains else []
    parts = [fingerprint, recipe.to_dict(), [*backends, capability], data, shown, versions(), _code(), machine]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of everything that decides what a build gives."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("vla_edge", "torch", "onnx", "onnxscript", "onnxruntime", "numpy", *OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in OPTIONAL:
                found[package] = "source"
    return found


@dataclass(frozen=True)
class _Subject:
    """A policy after its recipe, and what it was before.

    Attributes:
        reference: the policy in full precision, as `compare` asks for it.
        inputs: stage -> what it is run on for measurements. original_stages: before the recipe.
        begin: fraction of the build that is done.
        ready: stage -> a context in which it can be traced.
        in_turn: bytes for what goes between stages where one of them is loaded at a time; 0 where all are.
    """

    compressed: Compressed
    data: CalibrationData
    reference: object
    inputs: Mapping
    original_stages: Sequence
    begin: float
    ready: Callable = nullcontext
    in_turn: int = 0

    def place(self, fraction: float) -> float:
        """Of the whole build, of a `fraction` of one that has come to this point at 0.30."""
        return self.begin + (1 - self.begin) * (fraction - 0.30) / 0.70


@dataclass
class _Build:
    """The steps of one build, in order."""

    checkpoint: object
    recipe: Recipe
    backends: Sequence[str]
    compute_capability: str | None
    directory: Path
    tell: Progress
    traced: MutableMapping[str, object]
    demonstrations: Sequence[str | Path]
    work: Path
    memory: int
    then: Then | None = None

    @property
    def ahead(self) -> bool:
        """Whether the engine is for a device that is not here."""
        return not all(runs_here(name) for name in self.backends)

    @property
    def _tokenizer(self) -> Path | None:
        """The bundle's."""
        return None if self.checkpoint.tokenizer_path is None else self.directory / TOKENIZER

    def run(self, source) -> dict:
        """Everything into `self.directory`; returns the manifest."""
        from vla_edge.compress.plan import grouped_by_stage
        from vla_edge.engine.profile import profile

        checkpoint = self.checkpoint
        pieces = None
        if needs_pieces(checkpoint, self.recipe, self.memory, self.backends):
            pieces = Piecewise(checkpoint, self.recipe, self.memory, self.work, self.backends)
        subject = self._whole(source) if pieces is None else self._in_pieces(pieces, source)
        compressed, data = subject.compressed, subject.data
        spec = replace(
            checkpoint.spec, num_steps=compressed.num_steps, evaluated_steps=compressed.evaluated,
            vision_cache=compressed.vision_cache, **compressed.decoding,
        )  # fmt: skip
        if self._tokenizer is not None:
            shutil.copyfile(checkpoint.tokenizer_path, self._tokenizer)
        stages = compressed.policy.stages()
        # a stage that was trained or made smaller is a graph of its own
        traced = {} if self.recipe.reshapes or self.recipe.trains else self.traced
        with tempfile.TemporaryDirectory(prefix=".exported-", dir=self.directory) as scratch:
            exported = export_stages(
                stages, grouped_by_stage(compressed.layers), Path(scratch), traced, checkpoint.fingerprint,
                lambda i, name: self.tell(subject.place(0.30 + 0.12 * i / len(stages)), f"exporting {name}"),
                subject.ready,
            )  # fmt: skip
            if subject.in_turn:
                give_back()
            entries, engine, result, others = self._compile(exported, subject, spec, Path(scratch))
            if self.then is not None:
                self.then(exported, compressed, subject.ready)
        timed = not self.ahead and not subject.in_turn
        if timed:
            self.tell(subject.place(0.93), "measuring")
        return {
            "name": f"{checkpoint.directory.parent.name or checkpoint.directory.name}-{self.recipe.name}",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": {"name": checkpoint.directory.name, "fingerprint": checkpoint.fingerprint},
            "policy": spec.to_dict(),
            "joint_names": list(spec.joint_names),
            "dt": spec.dt,
            "recipe": self.recipe.to_dict(),
            "stages": {entry.interface.name: entry.to_dict() for entry in entries},
            "factored": {name: layer.to_dict() for name, layer in compressed.factored.items()},
            "cache": {"bytes": cache_bytes(stages), "full_precision_bytes": cache_bytes(subject.original_stages)},
            "calibration": data.to_dict(),
            "verification": {**result.to_dict(), "by": STAND_IN if self.ahead else "the engine itself"},
            # what stands in for the engine's device tells nothing of its speed, and a stage at a time nothing of a chunk's
            "profile": profile(engine, data.held_out, PROFILE_REPEATS) if timed else {},
            "machine": {"architecture": platform.machine(), "processors": os.cpu_count(), "taken_by_others": others},
            "versions": versions(),
        }

    def _whole(self, source) -> _Subject:
        """With the policy in memory."""
        from vla_edge.compress.calibrate import load_calibration
        from vla_edge.compress.pipeline import carry_out
        from vla_edge.policy.checkpoint import load_policy

        checkpoint = self.checkpoint
        policy = load_policy(checkpoint)
        reference = Runner.from_policy(policy, checkpoint)
        self.tell(0.03, "reading observations")
        data = load_calibration(source, checkpoint.spec)
        recording = None
        if self.recipe.trains and not self.demonstrations and isinstance(source, (str, Path)):
            recording = load_calibration(source, checkpoint.spec, frames=TRAINING_FRAMES).observations
        compressed = carry_out(
            self.recipe, policy, checkpoint, data, lambda fraction, step: self.tell(0.05 + 0.25 * fraction, step),
            gain_by_reduced_range(self.backends), self.demonstrations, recording, self.work,
            None if self.ahead else FactorRace(self.backends),
        )  # fmt: skip
        made = self._as_backends_take_it(compressed.policy)
        inputs: dict = {}
        for name, tensors in Runner.from_policy(made, checkpoint).stage_inputs(data.held_out[0]):
            inputs.setdefault(name, tensors)
        return _Subject(replace(compressed, policy=made), data, reference, inputs, policy.stages(), begin=0.30)

    def _as_backends_take_it(self, policy):
        """With one stage that writes all tokens where a backend is to have that.

        Raises:
            BackendError: such a backend, and the policy writes no tokens, or the recipe is about how it writes them.
        """
        takers = [name for name in self.backends if reads(get_backend(name)) != ".onnx"]
        if not takers:
            return policy
        if not getattr(policy, "can_generate", False):
            raise BackendError(
                f"backend {takers[0]} writes the tokens of policies such as OpenVLA, one after the other and with a cache of "
                f"its own, which recipe {self.recipe.name} and this policy do not fit; take kv_cache, fixed_point, "
                "speculate, prefill_blocks and prune_tokens out, or choose another backend"
            )
        made = copy.copy(policy)
        made.generates = True
        return made

    def _in_pieces(self, pieces: Piecewise, source) -> _Subject:
        """With a piece of it in memory."""
        import torch

        from vla_edge.compress.calibrate import load_calibration

        self.tell(0.01, "reading observations")
        data = load_calibration(source, self.checkpoint.spec, **pieces.frames)
        settings = [versions(), _code(), torch.get_num_threads()]
        pieces.run(
            data, gain_by_reduced_range(self.backends), settings,
            lambda fraction, step: self.tell(0.02 + 0.68 * fraction, step),
        )  # fmt: skip
        reference = pieces.foreseen.reference(self.checkpoint.spec)
        before = pieces.source.policy.stages()
        compressed = pieces.compressed()
        inputs = first_inputs(pieces.source, pieces.foreseen)
        return _Subject(compressed, data, reference, inputs, before, 0.70, pieces.ready, pieces.between_stages)

    def _locate(self, name: str, exported, entries, subject: _Subject, scratch: Path) -> tuple[str, float] | None:
        """The layer in which stage `name` diverges first, and by how much; None where it cannot be found."""
        stage = next(stage for stage in exported if stage.interface.name == name)
        module = next(stage.module for stage in subject.compressed.policy.stages() if stage.name == name)
        entry = next(entry for entry in entries if entry.interface.name == name)
        backend, options = (STAND_IN, {}) if self.ahead else (entry.backend, entry.options)
        try:
            errors = layer_errors(
                module, stage.file, stage.traced, stage.interface, backend, options, subject.inputs[name], scratch
            )
        except BackendError:
            return None
        return first_divergence(errors)

    def _compile(self, exported, subject: _Subject, spec, scratch: Path):
        """The fastest engine that passes: entries, its runner, its verification, and the processors that other programs took
        while it was found.

        Ways of running that round more than the files ask for are given up when the engine errs too much with them.
        """

        def tell(index: int, name: str) -> None:
            self.tell(subject.place(0.42 + 0.28 * index / len(exported)), f"compiling {name}")

        for only_exact in (False, True):
            taken = None
            if self.ahead:
                options = {} if self.compute_capability is None else {"compute_capability": self.compute_capability}
                entries, loaded = compile_ahead(exported, self.directory, self.backends[0], options, scratch, tell)
            else:
                others = OtherPrograms()
                entries = compile_stages(
                    exported, self.directory, self.backends, subject.inputs, only_exact, tell, subject.in_turn
                )
                taken = others.processors()
                loaded = None if subject.in_turn else load_entries(entries, self.directory)
            engine = self._engine(entries, loaded, subject, spec)
            result = compare(
                engine,
                subject.reference,
                subject.data.held_out,
                progress=lambda f: self.tell(subject.place(0.70 + 0.22 * f), "comparing with full precision"),
            )
            rounded = any(not entry.options.get("exact", True) for entry in entries)

            def locate(name: str, entries=entries):
                return self._locate(name, exported, entries, subject, scratch)

            try:
                check(result, self.recipe.accept, None if rounded else locate)
            except VerifyError:
                if not rounded:
                    raise
                continue
            return entries, engine, result, taken

    def _engine(self, entries, loaded, subject: _Subject, spec):
        """The engine as a runner; one that does not fit beside the rest, as the chunks that it gives."""
        if not subject.in_turn:
            engine = Runner(spec, self._tokenizer, loaded)
            engine.warm_up()
            return engine
        named, held_out = {entry.interface.name: entry for entry in entries}, subject.data.held_out

        def load(name: str):
            return loaded[name] if loaded else load_entries([named[name]], self.directory)[name]

        turns = InTurn({name: entry.interface for name, entry in named.items()}, load)
        chunks: list = []
        give_back()
        for group in infer_together(
            lambda stages: Runner(spec, self._tokenizer, stages), turns, held_out, 0, subject.in_turn
        ):
            chunks += group
            self.tell(subject.place(0.70 + 0.22 * len(chunks) / len(held_out)), "running the engine")
        return Chunks(spec, held_out, chunks)


def cache_bytes(stages) -> int:
    """Of what is read from an observation once and handed to every flow step or token."""
    names = [stage.name for stage in stages]
    reader = next((place for place, name in enumerate(names) if name in ("prefix", "prefill")), None)
    if reader is None:
        return 0
    # a prompt that is read in blocks is given the cache that it adds to
    given = (spec for spec in stages[reader].inputs if spec.name.startswith("cache_"))
    read = {spec.name for spec in (*given, *stages[reader].outputs)}
    again = {spec for stage in stages[reader + 1 :] for spec in stage.inputs if spec.name in read}
    return sum(spec.zeros().nbytes for spec in again)


@contextmanager
def torch_threads(parameters: int):
    """As many threads as a policy of that size keeps busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if parameters >= PARAMETERS_WORTH_THREADS else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def enough_memory(checkpoint: Path):
    """Makes one named error of the several ways in which memory runs out.

    Raises:
        BackendError: it has.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = re.search("allocate memory|out of memory", str(error), re.IGNORECASE)
        if not isinstance(error, MemoryError) and not told:
            raise
        raise BackendError(
            f"there is not enough memory to build an engine of {checkpoint}; close other programs, or build it on a "
            "computer with more and copy the bundle"
        ) from error


@contextmanager
def enough_disk(target: Path):
    """Makes a named error of a disk that is full.

    Raises:
        BundleError: it is.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise BundleError(
            f"the disk is full, so there is no bundle {target}; free some space or choose another output, and build again: "
            "what was finished of a large policy is still there"
        ) from error


def calibration_source(calibration, checkpoint: Path):
    """What to calibrate on: what was given, or the recording beside the checkpoint. Raises CalibrationError."""
    if calibration is not None:
        return calibration
    beside = checkpoint.parent / "calibration"
    if not beside.exists():
        raise CalibrationError(
            f"there is no recording at {beside} to calibrate and verify on; give one with --calibration (a bag, a "
            "LeRobot dataset or demonstrations)"
        )
    return beside


def _is_valid(target: Path, key: str) -> bool:
    try:
        return Bundle.load(target).manifest.get("build_key") == key
    except BundleError:
        return False


def _code() -> str:
    """SHA-256 over the source that decides what a build gives: with other code it is another build."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for part in ("policy", "compress", "engine", "learn"):
        for file in sorted((package / part).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def _content(path: Path) -> str:
    """SHA-256 over the names and contents of a file or directory; of the name alone when there is none."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + (sha256(file).encode() if file.is_file() else b""))
    return digest.hexdigest()
