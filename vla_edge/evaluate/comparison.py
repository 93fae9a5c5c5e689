"""Several engines of one checkpoint side by side: what each costs in radians, in successes, in bytes and in time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vla_edge.evaluate.closed_loop import run_closed_loop
from vla_edge.evaluate.metrics import PairedTest, mcnemar

FULL_PRECISION = "full precision"
LANGUAGE = "prefix"


@dataclass(frozen=True)
class Contender:
    """One engine.

    Attributes:
        name: of its recipe. bundle: its directory.
        description: what the recipe says of itself.
        bits: per weight of the matrices, scales included. engine_bytes: of the whole bundle; language_bytes: of the
            matrices of the language model alone.
        verification: action error on held-out observations, as its build found it (see `engine.verify`).
        profile_ms: stage -> {"p50", ...} as its build found it.
        successes: seed -> whether the episode succeeded; empty where none was run.
        paired: full precision first, this engine second; None where none was run.
    """

    name: str
    bundle: Path
    description: str
    bits: float
    engine_bytes: int
    language_bytes: int
    verification: Mapping[str, object]
    profile_ms: Mapping[str, Mapping[str, float]]
    successes: Mapping[int, bool]
    paired: PairedTest | None = None

    @property
    def drop_points(self) -> float | None:
        """Percentage points of success that full precision has more."""
        return None if self.paired is None else 0.0 - 100 * self.paired.difference


@dataclass(frozen=True)
class Comparison:
    """Engines against full precision on the same seeds.

    Attributes:
        checkpoint: name. world, tier: of the episodes.
        reference: seed -> success of full precision; empty where no episode was run.
        contenders: in the order they were given.
    """

    checkpoint: str
    tier: str
    reference: Mapping[int, bool]
    contenders: tuple[Contender, ...]
    world: str = "tabletop"


def compare_engines(
    checkpoint: str | Path,
    bundles: Mapping[str, Path],
    seeds: Sequence[int] = (),
    tier: str = "touch",
    workers: int = 1,
    store: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
    world: str = "tabletop",
) -> Comparison:
    """Read every bundle, and let each engine and full precision act on the same seeds.

    Args:
        bundles: name -> directory.
        seeds: of the episodes; none are run when empty.
        store: directory for finished episodes, from which an interrupted comparison goes on while engine, robot and
            controller are the same.
        world: that they act in, see `sim.worlds`.

    Raises:
        BundleError, ClosedLoopError: what is wrong.
    """
    from vla_edge.engine.bundle import Bundle

    checkpoint = Path(checkpoint).resolve()
    opened = {name: Bundle.load(path) for name, path in bundles.items()}
    tell = progress or (lambda fraction, what: None)
    runs = [(FULL_PRECISION, checkpoint, _fingerprint(checkpoint)), *(
        (name, bundle.directory, _content(bundle)) for name, bundle in opened.items()
    )] if seeds else []  # fmt: skip
    found: dict[str, dict[int, bool]] = {}
    for number, (name, policy, digest) in enumerate(runs):
        file = None if store is None else store / f"{digest[:16]}-{_world()[:8]}-{world}-{tier}.jsonl"
        found[name] = episodes(
            policy, seeds, tier, workers, file,
            lambda share, name=name, number=number: tell((number + share) / len(runs), f"{name} acts"), world,
        )  # fmt: skip
    reference = found.get(FULL_PRECISION, {})
    contenders = []
    for name, bundle in opened.items():
        results = found.get(name, {})
        paired = mcnemar([reference[seed] for seed in seeds], [results[seed] for seed in seeds]) if seeds else None
        contenders.append(_contender(name, bundle, results, paired))
    return Comparison(checkpoint.parent.name or checkpoint.name, tier, reference, tuple(contenders), world)


def episodes(
    policy: Path,
    seeds: Sequence[int],
    tier: str,
    workers: int = 1,
    file: Path | None = None,
    progress: Callable[[float], None] | None = None,
    world: str = "tabletop",
) -> dict[int, bool]:
    """Seed -> success. What is in `file` already is not run again; what ends is added to it at once."""
    done: dict[int, bool] = {}
    if file is not None and file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                done[row["seed"]] = row["success"]
            except (ValueError, KeyError):
                pass  # the line that an interrupted run was writing
    left = [seed for seed in seeds if seed not in done]

    def keep(row) -> None:
        done[row.seed] = bool(row.success)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"seed": row.seed, "success": bool(row.success)}) + "\n")
        if progress is not None:
            progress(sum(seed in done for seed in seeds) / len(seeds))

    if left:
        run_closed_loop(policy, left, tier, workers=workers, progress=keep, world=world)
    return {seed: done[seed] for seed in seeds}


def _contender(name: str, bundle, successes: Mapping[int, bool], paired: PairedTest | None) -> Contender:
    stages = {stage.interface.name: stage.layers for stage in bundle.stages}
    size = {stage: sum(row["bytes"] for row in layers.values()) for stage, layers in stages.items()}
    weights = sum(row["shape"][0] * row["shape"][1] for layers in stages.values() for row in layers.values())
    manifest = bundle.manifest
    return Contender(
        name, bundle.directory, manifest["recipe"]["description"], 8 * sum(size.values()) / weights, bundle.bytes,
        size.get(LANGUAGE, 0), manifest["verification"], manifest["profile"], successes, paired,
    )  # fmt: skip


def _content(bundle) -> str:
    """Of what acts: stages, tokenizer and policy; the same for a bundle that was built again to the same files."""
    acts = [bundle.manifest["files"], bundle.manifest["policy"]]
    return hashlib.sha256(json.dumps(acts, sort_keys=True, default=str).encode()).hexdigest()


def _world() -> str:
    """SHA-256 of what an engine acts through: robot, controller, tasks. With others its episodes are others."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    files = [package / "evaluate" / "closed_loop.py", *(package / "evaluate").glob("*_rig.py")]
    for folder in ("control", "observe", "robots", "serve", "sim"):
        files += (package / folder).rglob("*.py")
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _fingerprint(checkpoint: Path) -> str:
    from vla_edge.policy.checkpoint import load_checkpoint

    return load_checkpoint(checkpoint).fingerprint
