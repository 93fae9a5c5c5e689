"""A checkpoint and a target -> the engine that reaches it, and the page of what was tried: `target.pursue`, for real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from vla_edge.compress.calibrate import load_calibration
from vla_edge.compress.recipe import RecipeError
from vla_edge.engine.alone import most_memory
from vla_edge.engine.backends import AUTO, BackendError, chosen_backends, runs_here
from vla_edge.engine.build import Progress, build, build_key, calibration_source, default_output
from vla_edge.engine.bundle import Bundle, writing
from vla_edge.engine.export import ExportError
from vla_edge.engine.kernels import kernels_of
from vla_edge.engine.manifest import MANIFEST, write_manifest
from vla_edge.engine.profile import profile_bundle
from vla_edge.engine.roofline import measure_roofline
from vla_edge.engine.target import MOST_ATTEMPTS, Attempt, Draft, Outcome, Target, pursue

REPEATS = 60


def build_to(
    checkpoint: str | Path,
    target: Target,
    backend: str = AUTO,
    output: str | Path | None = None,
    calibration=None,
    demonstrations: Sequence[str | Path] = (),
    progress: Progress | None = None,
    most: int = MOST_ATTEMPTS,
) -> tuple[Outcome, Path | None]:
    """The outcome, and the bundle that reaches the target; None when none does.

    Beside the bundle lies a page of everything that was tried, and the same as JSON (`report_path`). What was built and
    measured is kept until the target is reached, so an interrupted search goes on.

    Args:
        checkpoint, backend, calibration, demonstrations, progress: as of `build`; with demonstrations the policy
            learns to do with fewer flow steps, instead of simply taking them.
        output: directory of the bundle; beside the checkpoint when None.
        most: engines to build.

    Raises:
        What `build` raises for a checkpoint, recording or backend that is wrong. An engine that cannot be built is an
        attempt that failed.
    """
    from vla_edge.evaluate.target_report import write_target_report
    from vla_edge.policy.checkpoint import load_checkpoint

    tell = progress or (lambda fraction, step: None)
    tell(0.0, "reading checkpoint and recording")
    backends = chosen_backends(backend)
    if not all(runs_here(name) for name in backends):
        raise BackendError(
            f"backend {backend} does not run here, and a target is measured; vla-edge plan --target-hz predicts"
        )
    loaded = load_checkpoint(checkpoint)
    output = Path(output).expanduser() if output else default_output(loaded.directory, "target", backend)
    output = output.resolve()
    data = load_calibration(calibration_source(calibration, loaded.directory), loaded.spec)
    work = output.with_name(f".{output.name}.attempts")
    work.mkdir(parents=True, exist_ok=True)
    records, traced, number = _Records(work / "attempts.json"), {}, 0
    tell(0.0, "measuring this computer")
    roofline = measure_roofline()

    def built(draft: Draft) -> Path:
        return build(
            loaded.directory, draft.recipe(bool(demonstrations)), backend, work / draft.name, data,
            lambda fraction, step: tell((number + 0.8 * fraction) / most, f"{draft.name}: {step}"),
            traced=traced, demonstrations=demonstrations,
        )  # fmt: skip

    def attempt(draft: Draft, because: str) -> Attempt:
        nonlocal number
        key = build_key(loaded.fingerprint, draft.recipe(bool(demonstrations)), backends, data, demonstrations)
        found = records.get(key)
        if found is None:
            try:
                bundle = Bundle.load(built(draft))
                tell((number + 0.8) / most, f"{draft.name}: measuring")
                seen, memory = profile_bundle(bundle, data.held_out, REPEATS, roofline=roofline), most_memory(bundle)
            except (BackendError, ExportError, RecipeError) as error:
                found = Attempt(draft, because, failure=str(error))
            else:
                total, error = seen.parts["total"], bundle.manifest["verification"]["action_error_rel"]
                found = Attempt(
                    draft, because, total["p50"], total["p95"], error, memory, bundle.bytes, seen.bottleneck
                )
            records.put(key, found)
        number += 1
        return found

    def drop(loser: Attempt) -> None:
        shutil.rmtree(work / loser.draft.name, ignore_errors=True)

    outcome = pursue(target, max(1, loaded.spec.num_steps), attempt, drop, most)
    engine = work / outcome.best.draft.name if outcome.best else None
    kernels = kernels_of(Bundle.load(engine)) if engine and engine.is_dir() else {}
    write_target_report(outcome, report_path(output), output.name, kernels)
    if not outcome.reached:
        return outcome, None
    best = built(outcome.best.draft)  # there already, unless the attempt was recorded before and its engine dropped
    manifest = dict(Bundle.load(best).manifest)
    manifest["recipe"] = {**manifest["recipe"], "accept": {"action_error_rel": target.action_error_rel}}
    with writing(output) as directory:
        shutil.copytree(best, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        write_manifest(directory, {k: v for k, v in manifest.items() if k not in ("schema", "files", "digest")})
    shutil.rmtree(work, ignore_errors=True)
    return outcome, output


def report_path(output: Path) -> Path:
    """The page of the search for `output`."""
    return output.with_name(f"{output.name}.html")


class _Records:
    """Attempts by what they were made of, on disk."""

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def get(self, key: str) -> Attempt | None:
        return Attempt.from_dict(self._found[key]) if key in self._found else None

    def put(self, key: str, attempt: Attempt) -> None:
        from vla_edge.evaluate.page import write_json

        self._found[key] = attempt.to_dict()
        write_json(self._path, self._found)
