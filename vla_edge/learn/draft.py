"""A policy that writes tokens, and demonstrations -> a draft of its tokens (`policy.openvla_draft`), in its checkpoint.

The policy stays as it is. What it writes for each frame, and the states that told each token, are found once; the draft
learns from these alone, so that a step costs what the draft costs. It is to propose what the policy would choose, so the
policy's own tokens are shown, not those of the demonstrations.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_edge.files import write_whole
from vla_edge.learn.fit import Fit, FitConfig
from vla_edge.learn.frames import Frames
from vla_edge.policy.bins import bins_of
from vla_edge.policy.draft_shapes import BLOCK, HEAD_DIM, HIDDEN, LAYERS, MEDUSA, WIDTH, DraftConfig
from vla_edge.policy.openvla_draft import make_draft
from vla_edge.types import VlaEdgeError

KINDS = (BLOCK, MEDUSA)
FAR = 0.8  # of the weight of a token, that of the next: what comes after a wrong one is of no use (Medusa's choice)
HELD_OUT = 10  # one frame of so many judges the draft, and none of its episode trains it
SEEN_AT_ONCE = 16
_SAVE_EVERY = 100


class DraftError(VlaEdgeError):
    """A draft that cannot be made as asked."""


@dataclass(frozen=True)
class Draft:
    """What was made.

    Attributes:
        file: of the draft. parameters: numbers that were trained.
        frames: it was trained on. compared: that judged it, of other episodes.
        passes, plain_passes: over tokens of a chunk, with the draft and one by one; means over the latter.
        tokens_per_pass: accepted ones and the policy's own.
    """

    file: Path
    parameters: int
    frames: int
    compared: int
    passes: float
    plain_passes: int
    tokens_per_pass: float


@dataclass(frozen=True)
class Told:
    """What a policy writes for N frames.

    Attributes:
        tokens: (N, T) int64, of the 256. states: (N, T, width) what told each, as its head saw it.
    """

    tokens: Tensor
    states: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def told_by(policy, frames: Frames, progress: Callable[[float], None] = lambda fraction: None) -> Told:
    """What `policy` writes by greedy decoding for `frames`, whose actions, where known, are the first guess: the fixed point
    of one pass over all tokens, many frames together (Santilli et al., 2023, arXiv:2305.10427)."""
    c, tokens, states = policy.config, [], []
    for begin in range(0, len(frames), SEEN_AT_ONCE):
        part = frames.take(np.arange(begin, min(begin + SEEN_AT_ONCE, len(frames))))
        seen = part.seen_by(policy)
        shape = (len(part), c.chunk_size, c.action_dim)
        shown = np.zeros(shape) if part.actions is None else part.actions[..., : c.action_dim].numpy()
        guess, settled = torch.from_numpy(bins_of(shown)), False
        while not settled:
            said = policy.say(seen, part.tokens, part.mask, part.state, tokens=guess, states=True)
            chosen = said.output.argmax(-1)
            settled, guess = bool((chosen == guess).all()), chosen
        tokens.append(guess.flatten(1))
        states.append(said.states)
        progress((begin + len(part)) / len(frames))
    return Told(torch.cat(tokens), torch.cat(states))


class DraftFit(Fit):
    """A draft, on what its policy wrote. Of each frame a newest token is drawn; all after it are to be proposed."""

    def __init__(self, config: FitConfig, draft: nn.Module, told: Told, out: Path):
        self.told = told
        outer = ("fuse", "head") if draft.config.kind == BLOCK else (f".{draft.config.layers}",)
        super().__init__(config, draft, out, outer)

    def losses(self, rng: np.random.Generator, generator: torch.Generator) -> dict[str, Tensor]:
        told, places = self.told, self.told.tokens.shape[1]
        index = torch.from_numpy(rng.integers(len(told), size=self.config.batch))
        step = torch.randint(places - 1, (len(index),), generator=generator)
        tokens = told.tokens[index]
        scores = self.module(*_asked(self.module, told.states[index, step], step, tokens))[0]
        ahead = torch.arange(1, scores.shape[1] + 1)
        wanted = step[:, None] + ahead
        weight = FAR ** (ahead - 1.0) * (wanted < places)
        labels = tokens.gather(1, wanted.clamp(max=places - 1)).flatten()
        found = F.cross_entropy(scores.flatten(0, 1), labels, reduction="none")
        return {"proposals": (found * weight.flatten()).sum() / weight.sum()}


def _asked(draft: nn.Module, feature: Tensor, step: Tensor, known: Tensor) -> list[Tensor]:
    everything = {"feature": feature, "step": step, "known": known}
    return [everything[name] for name in draft.INPUTS]


@torch.no_grad()
def passes_of(draft: nn.Module, told: Told) -> np.ndarray:
    """(N,) passes that each chunk takes with the draft, as `engine.token_loop` decodes it."""
    tokens, places = told.tokens, told.tokens.shape[1]
    accepted = []  # after each place, how many proposals stand
    for place in range(places - 1):
        step = torch.full((len(told),), place)
        proposed = draft(*_asked(draft, told.states[:, place], step, tokens))[0].argmax(-1)
        room = min(draft.tokens, places - 2 - place)
        right = proposed[:, :room] == tokens[:, place + 1 : place + 1 + room]
        accepted.append(right.int().cumprod(1).sum(1))
    counts = np.zeros(len(told), int)
    for index in range(len(told)):
        known = 1
        while known < places:
            known += 1 + int(accepted[known - 1][index])
            counts[index] += 1
    return counts


def train_draft(
    checkpoint: str | Path,
    demonstrations: Sequence[str | Path],
    kind: str = BLOCK,
    width: int = WIDTH,
    layers: int = LAYERS,
    steps: int = 2000,
    batch: int = 64,
    rate: float = 1e-3,
    frames: int = 4000,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> Draft:
    """Train a draft and put it beside the weights of `checkpoint`, or go on where that was interrupted.

    Args:
        demonstrations: directories of `make demonstrations`.
        kind: "block", or "medusa" for heads as the Medusa project has them.
        width: of a block. layers: of a block, or of each head before its last.
        steps, batch, rate, seed: of training. frames: at most, spread evenly.
        force: in the place of a draft that is there.

    Raises:
        DraftError: what cannot be had, before any work. CheckpointError, DemonstrationError, TrainingError.
    """
    from vla_edge.engine.build import torch_threads
    from vla_edge.learn.frames import from_demonstrations
    from vla_edge.policy.checkpoint import load_checkpoint, load_policy

    tell = progress or (lambda fraction, what: None)
    file = _file(checkpoint, kind, force)
    if kind == BLOCK and (width < HEAD_DIM or width % HEAD_DIM):
        raise DraftError(f"width is {width}, allowed are multiples of {HEAD_DIM}")
    if min(steps, batch, layers, frames) < 1 or not 0 < rate <= 1:
        raise DraftError(
            f"training is {steps} steps of {batch} of {frames} frames at a rate of {rate:g}, and there are {layers} layers; "
            "all must be above 0"
        )
    if not demonstrations:
        raise DraftError("there are no demonstrations to train on; give directories of them")
    tell(0.0, "reading policy and demonstrations")
    loaded = load_checkpoint(checkpoint)
    if loaded.family.name != "openvla":
        raise DraftError(f"the checkpoint is {loaded.family.title}, which writes no tokens; a draft is of policies that do")
    policy = load_policy(loaded)
    if not policy.can_revise:
        raise DraftError("the policy writes less than three tokens, or gives its actions at once; there is nothing to draft")
    policy.one_by_one_()
    shown = from_demonstrations(demonstrations, loaded.spec, loaded.tokenizer_path)
    shown = shown.take(np.unique(np.linspace(0, len(shown) - 1, frames).astype(int)))
    c = policy.config
    sizes = {"width": width, "hidden": HIDDEN * width} if kind == BLOCK else {}
    config = DraftConfig(kind, c.width, c.tokens, layers, policy.most_drafted, **sizes)
    fitting = FitConfig(steps=steps, batch=batch, rate=rate, seed=seed, warmup=min(20, steps), average=0.99)
    asked = [loaded.fingerprint, asdict(config), asdict(fitting), len(shown)]
    # not within it: its fingerprint tells runs apart
    work = loaded.directory.with_name(f".{loaded.directory.name}.{kind}-draft")
    run = work / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    torch.manual_seed(seed)
    with torch_threads(loaded.bytes // 4):
        told = told_by(policy, shown, lambda f: tell(0.02 + 0.48 * f, "seeing what the policy writes"))
        cut = len(told) - max(1, len(told) // HELD_OUT)
        draft = first_draft(config, policy)
        draft.propose_(config.most_tokens)
        fit = DraftFit(fitting, draft, Told(told.tokens[:cut], told.states[:cut]), run)
        fit.train(_SAVE_EVERY, lambda step, losses: tell(0.5 + 0.48 * step / steps, f"training ({losses['proposals']:.3f})"))
        made = fit.average.eval()
        made.propose_(make_draft(config).tokens)  # as many as are proposed where nobody says how many
        passes = passes_of(made, Told(told.tokens[cut:], told.states[cut:]))
    write_draft(file, made)
    shutil.rmtree(work, ignore_errors=True)
    tell(1.0, "writing the draft")
    decoded, mean = c.tokens - 1, float(passes.mean())
    count = sum(parameter.numel() for parameter in made.parameters())
    return Draft(file, count, cut, len(passes), mean, decoded, decoded / mean)


def first_draft(config: DraftConfig, policy) -> nn.Module:
    """What training begins with; Medusa's heads begin as the policy's own."""
    draft = make_draft(config)
    if config.kind == MEDUSA:
        for head in draft.heads:
            head[-1].weight.data = policy.prefill.head.weight.detach().clone()
            for layer in head[:-1]:
                nn.init.zeros_(layer.linear.weight)
    return draft


def write_draft(file: Path, draft: nn.Module) -> None:
    """As `openvla_checkpoint` reads it, whole or not at all."""
    from safetensors.torch import save

    prefix = "heads." if draft.config.kind == MEDUSA else ""
    tensors = {name.removeprefix(prefix): value.contiguous() for name, value in draft.state_dict().items()}
    write_whole(file, save(tensors, metadata={"format": "pt"}))


def _file(checkpoint: str | Path, kind: str, force: bool) -> Path:
    """Where the draft goes.

    Raises:
        DraftError: there is no such kind, or a draft is there already.
    """
    from vla_edge.policy.openvla_checkpoint import DRAFT
    from vla_edge.policy.openvla_checkpoint import MEDUSA as HEADS

    if kind not in KINDS:
        raise DraftError(f"there is no draft of kind {kind!r}; allowed is {' or '.join(KINDS)}")
    file = Path(checkpoint).expanduser().resolve() / f"{DRAFT if kind == BLOCK else HEADS}.safetensors"
    if file.exists() and not force:
        raise DraftError(f"{file} is there already; remove it, or train anew with --force")
    return file
