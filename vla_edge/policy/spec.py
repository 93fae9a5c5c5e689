"""What a policy is, as plain data: the part of a checkpoint that a robot needs in order to serve it.

A `PolicySpec` travels in every engine bundle's manifest, so nothing here may need torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum

import numpy as np

STATE = "observation.state"
ACTION = "action"


class NormalizationMode(str, Enum):
    """How a feature is scaled for the network (LeRobot's `normalization_mapping` values)."""

    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"
    MIN_MAX = "MIN_MAX"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


_BOUNDS = {
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


@dataclass(frozen=True)
class Normalization:
    """Scaling of one feature, in LeRobot's conventions.

    Attributes:
        mode: which statistics are used.
        statistics: name ("mean", "std", "min", "max", "q01", ...) -> (D,) values, SI units; or (T, D), for each point of a
            chunk.
        eps: keeps constant dimensions finite.
        clip: normalized values are held within [-1, 1].
        fixed: a dimension whose bounds are equal is 0 to the network and that bound to the robot, whatever comes (GR00T).
        held: what the network gives is held within [-1, 1].
    """

    mode: NormalizationMode
    statistics: Mapping[str, tuple] = field(default_factory=dict)
    eps: float = 1e-8
    clip: bool = False
    fixed: bool = False
    held: bool = False

    def __post_init__(self):
        needed = {NormalizationMode.IDENTITY: (), NormalizationMode.MEAN_STD: ("mean", "std")}
        if self.fixed and self.mode not in _BOUNDS:
            raise ValueError(f"normalization {self.mode.value} has no bounds that could be equal")
        missing = set(needed.get(self.mode) or _BOUNDS.get(self.mode, ())) - set(self.statistics)
        if missing:
            raise ValueError(f"normalization {self.mode.value} lacks {', '.join(sorted(missing))}")

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(offset, scale), each (D,) or (T, D) float64, such that normalized = (value - offset) / scale.

        float32 would lose the half `eps` that the offset of a constant dimension is above its bounds.
        """
        if self.mode is NormalizationMode.IDENTITY:
            return np.float64(0.0), np.float64(1.0)
        if self.mode is NormalizationMode.MEAN_STD:
            mean, std = (np.asarray(self.statistics[key], np.float64) for key in ("mean", "std"))
            return mean, std + self.eps
        low, high = (np.asarray(self.statistics[key], np.float64) for key in _BOUNDS[self.mode])
        spread = np.where(high == low, self.eps, high - low)
        return low + spread / 2, spread / 2

    def normalize(self, value: np.ndarray) -> np.ndarray:
        """(..., D) SI -> (..., D) float32 as the network sees it."""
        offset, scale = self.affine()
        scaled = (np.asarray(value, np.float32) - offset) / scale  # the value as LeRobot holds it
        if self.fixed:
            scaled = np.where(self._constant(), 0.0, scaled)
        return (np.clip(scaled, -1, 1) if self.clip else scaled).astype(np.float32)

    def unnormalize(self, value: np.ndarray) -> np.ndarray:
        """(..., D) network output -> (..., D) float64 SI."""
        offset, scale = self.affine()
        given = np.asarray(value, np.float64)
        found = (given.clip(-1, 1) if self.held else given) * scale + offset
        return np.where(self._constant(), self.statistics[_BOUNDS[self.mode][0]], found) if self.fixed else found

    def _constant(self) -> np.ndarray:
        """(D,) or (T, D) which dimensions have equal bounds."""
        low, high = (np.asarray(self.statistics[key], np.float64) for key in _BOUNDS[self.mode])
        return low == high


@dataclass(frozen=True)
class CameraSpec:
    """One camera as the policy was trained on it.

    Attributes:
        name: topic namespace of the camera, for example "head".
        key: the checkpoint's feature, for example "observation.images.head".
        source_height, source_width: pixels of the frames the robot must deliver.
        crop: (y, x, height, width) in source pixels, taken before resizing.
        height, width: pixels the network takes.
        fit: "top_left" and "centre" keep the crop's aspect and pad at the top left or around it; "letterbox" is "centre",
            antialiased; "stretch" keeps no aspect, nor do "stretch_torch", the same as torchvision rounds it, and
            "stretch_linear", which is that of fractions of full brightness. "zoom_torch" stretches, takes the middle and
            stretches that again; "zoom_area" scales by areas, takes the middle and scales that again, before it stretches.
        padding: what "top_left" and "centre" pad with, as the network sees it.
        offset, scale: of each channel; the network sees (pixel - offset) / scale of pixels in [0, 1].
        zoom: share of either side that the middle of "zoom_torch" and "zoom_area" has.
    """

    name: str
    key: str
    source_height: int
    source_width: int
    crop: tuple[int, int, int, int]
    height: int
    width: int
    fit: str = "top_left"
    padding: float = -1.0
    offset: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: tuple[float, float, float] = (0.5, 0.5, 0.5)
    zoom: float = 1.0

    @property
    def is_scaled(self) -> bool:
        """Whether the network sees other numbers than [-1, 1]."""
        return {*self.offset, *self.scale} != {0.5}


_SCALING = {"offset", "scale"}
_LISTS = ("joint_names", "state_names", "absolute_names", "evaluated_steps")
_FLAGS = ("clip", "fixed", "held")


def as_tuples(values) -> tuple:
    """Numbers, or rows of numbers, as `Normalization.statistics` has them."""
    return tuple(as_tuples(row) if isinstance(row, list | tuple) else row for row in values)


@dataclass(frozen=True)
class TextSpec:
    """What becomes of an instruction besides the prompt's template.

    Attributes:
        lower: it is written in lower case.
        plain: underscores and line breaks in it become spaces.
        bare: of its characters letters, digits, underscores and white space are kept.
        listed: it stands in brackets and quotation marks, as Python writes a list of it (GR00T).
        state_dims: so many values of the normalized state, each as one of 256 bins of [-1, 1], stand where the template
            says {state}; 0 where it does not.
        last: ids of tokens that end the prompt, added where the text does not end so by itself.
    """

    lower: bool = False
    plain: bool = False
    state_dims: int = 0
    last: tuple[int, ...] = ()
    listed: bool = False
    bare: bool = False


@dataclass(frozen=True)
class DiffusionSpec:
    """How noise is taken out of a diffusion policy's actions (`policy.schedule`), in diffusers' terms.

    Attributes:
        sampler: "DDPM" (Ho et al., 2020, arXiv:2006.11239) or "DDIM" (Song et al., 2021, arXiv:2010.02502).
        train_steps: noise levels it was trained with.
        betas: how they follow each other: "linear", "scaled_linear" or "squaredcos_cap_v2"; from `beta_start` to
            `beta_end`, but for the last.
        prediction: what the network tells: "epsilon", the noise, or "sample", the actions.
        clip: largest magnitude of the normalized actions on the way; None for no limit.
        horizon: rows that are denoised. first: of them, the first of the chunk.
    """

    sampler: str
    train_steps: int
    betas: str
    beta_start: float
    beta_end: float
    prediction: str
    clip: float | None
    horizon: int
    first: int


@dataclass(frozen=True)
class PolicySpec:
    """Everything between the robot's messages and the network's tensors.

    Attributes:
        family: name of the policy's family (`policy.families`).
        joint_names: the J joints, in the checkpoint's order, of both state and action.
        cameras: in the order the network takes them.
        chunk_size: T, points per chunk; a flow may lead more rows to actions, of which these are the first.
        dt: s between points.
        num_steps: steps from noise to actions, as the checkpoint is to be sampled with; 1 where there is no noise.
        max_state_dim, max_action_dim: widths the network pads state and action to.
        tokenizer_max_length: L, tokens of instruction; 0 where the policy reads none.
        prompt: template of the text given to the tokenizer.
        relative_actions: actions are offsets to the measured positions at the observation's stamp, but for those of
            `absolute_names`.
        state, action: normalization of the (J,) state and the (T, J) action.
        trained_prefix: most first rows of a chunk that the policy was trained to be given and to continue; 0 for none.
        text: what else becomes of an instruction.
        state_names: joints of the state, where they are not those of the action.
        evaluated_steps: which of the flow steps ask the network, from 0 on; the others go on as the last two tell. All
            of them when empty.
        vision_cache: change of a picture, 0 to 1, up to which the tokens of the last are used again (`engine.vision_cache`);
            each picture is looked at when 0.
        most_passes: of fixed-point decoding, after which the tokens are taken as they are; as many as it takes when 0.
        draft_chunks: last chunks that speculative decoding proposes tokens of; the last alone when 0. A trained draft, where
            the engine has one, proposes in their place.
        draft_tolerance: bins by which a proposed token may differ from the likeliest one and still stand
            (`engine.token_loop`); 0 for greedy decoding's very chunk.
        observation_steps: S observations that are read, `dt` apart, the newest last.
        diffusion: of diffusion policies; its steps are `num_steps`.
    """

    family: str
    joint_names: tuple[str, ...]
    cameras: tuple[CameraSpec, ...]
    chunk_size: int
    dt: float
    num_steps: int
    max_state_dim: int
    max_action_dim: int
    tokenizer_max_length: int
    prompt: str
    relative_actions: bool
    state: Normalization
    action: Normalization
    trained_prefix: int = 0
    text: TextSpec = TextSpec()
    state_names: tuple[str, ...] = ()
    evaluated_steps: tuple[int, ...] = ()
    vision_cache: float = 0.0
    most_passes: int = 0
    draft_chunks: int = 0
    draft_tolerance: int = 0
    observation_steps: int = 1
    diffusion: DiffusionSpec | None = None
    absolute_names: tuple[str, ...] = ()

    @property
    def reads_instruction(self) -> bool:
        """Whether the policy is told what to do."""
        return self.tokenizer_max_length > 0

    @property
    def lags(self) -> tuple[float, ...]:
        """s before an observation at which those before it were made that the policy reads too, oldest first."""
        return tuple(step * self.dt for step in range(self.observation_steps - 1, 0, -1))

    @property
    def read_names(self) -> tuple[str, ...]:
        """Joints of the state."""
        return self.state_names or self.joint_names

    def chunk_affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(offset, scale) of the action's `Normalization.affine`, each (T, J)."""
        size = (self.chunk_size, len(self.joint_names))
        return tuple(np.broadcast_to(part, size) for part in self.action.affine())

    @property
    def offset_joints(self) -> np.ndarray:
        """(J,) bool, whose actions are offsets to measured positions."""
        return np.array([self.relative_actions and name not in self.absolute_names for name in self.joint_names])

    @property
    def measured_names(self) -> tuple[str, ...]:
        """Joints that an observation has to have: those of the action, and what else the state has."""
        return tuple(dict.fromkeys((*self.joint_names, *self.read_names)))

    def of_joints(self, names: Sequence[str]) -> PolicySpec:
        """As if the policy had these of its joints alone, and were no wider than they are."""
        columns = [self.joint_names.index(name) for name in names]

        def chosen(values: tuple) -> tuple:
            if np.ndim(values) == 2:
                return tuple(map(chosen, values))
            return tuple(values[i] for i in columns) if len(values) == len(self.joint_names) else values  # or a count

        def of(normalization: Normalization) -> Normalization:
            statistics = {key: chosen(values) for key, values in normalization.statistics.items()}
            return replace(normalization, statistics=statistics)

        return replace(
            self, joint_names=tuple(names), max_state_dim=len(columns), max_action_dim=len(columns),
            state=of(self.state), action=of(self.action),
            absolute_names=tuple(name for name in self.absolute_names if name in names),
        )  # fmt: skip

    def to_dict(self) -> dict:
        """Plain JSON and YAML types."""
        plain = asdict(self)
        for key in _LISTS:
            plain[key] = list(getattr(self, key))
        plain["cameras"] = [
            {**asdict(camera), **{key: list(getattr(camera, key)) for key in ("crop", *sorted(_SCALING))}}
            for camera in self.cameras
        ]
        for key in ("state", "action"):
            normalization: Normalization = getattr(self, key)
            plain[key] = {
                "mode": normalization.mode.value,
                "statistics": {
                    name: np.asarray(values, np.float64).tolist() for name, values in normalization.statistics.items()
                },
                "eps": normalization.eps,
                **{flag: getattr(normalization, flag) for flag in _FLAGS},
            }
        plain["text"] = {**asdict(self.text), "last": list(self.text.last)}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping) -> PolicySpec:
        """Inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown or malformed.
        """
        values = dict(plain)
        values["joint_names"] = tuple(values["joint_names"])
        for key in _LISTS:
            values[key] = tuple(values.get(key, ()))
        values["cameras"] = tuple(
            CameraSpec(**{**camera, **{key: tuple(camera[key]) for key in ("crop", *(_SCALING & camera.keys()))}})
            for camera in values["cameras"]
        )
        for key in ("state", "action"):
            entry = values[key]
            values[key] = Normalization(
                NormalizationMode(entry["mode"]),
                {name: as_tuples(numbers) for name, numbers in entry["statistics"].items()},
                entry["eps"],
                **{flag: entry.get(flag, False) for flag in _FLAGS},
            )
        if "text" in values:
            values["text"] = TextSpec(**{**values["text"], "last": tuple(values["text"]["last"])})
        if values.get("diffusion"):
            values["diffusion"] = DiffusionSpec(**values["diffusion"])
        return cls(**values)
