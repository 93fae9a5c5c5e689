"""Meta-World (Yu et al., 2019, arXiv:1910.10897; `metaworld` 3.1.1): tasks of a Sawyer arm with judges and experts of
their own, as a world that chunks of absolute targets can move.

Its four actions are no joints: three displacements of the hand's target and an effort of the gripper, each from -1 to
1, one every 12.5 ms. Chunks hold absolute targets at absolute times, so what they stand for here is, all in m: where
the hand's target is to be (x, y, z in Meta-World's frame), and how far apart the fingers are to be. `step` makes the
environment's own action of them; nothing of the environment, its limits or its judge is changed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from vla_edge.sim.tasks import TaskError
from vla_edge.types import JointState, VlaEdgeError

JOINTS = ("hand_x", "hand_y", "hand_z", "gripper")
STEP_NS = 12_500_000
"""World time of one step of the environment: five physics steps of 2.5 ms."""
STRIDE_M = 0.01
"""How far an action of 1 moves the hand's target in one step."""
OPENING_M = 0.1
"""m between the fingers that Meta-World calls fully open; it is commanded by an effort of -1, closed by 1."""
TIME_LIMIT_STEPS = 500
"""As in the benchmark: 6.25 s."""
CAMERA = "corner"
PICTURE = 128
"""px, width and height of what the policy is shown."""

TASKS = {
    "reach": ("move the hand to the red marker", "reach for the red marker", "bring the gripper to the red marker"),
    "push": ("push the puck to the green marker", "slide the puck to the green marker",
             "move the puck to the green marker"),
    "pick-place": ("lift the puck to the blue marker", "pick the puck up and hold it at the blue marker",
                   "carry the puck to the blue marker"),
    "door-open": ("open the door", "pull the door open", "swing the door open"),
    "drawer-open": ("open the drawer", "pull the drawer open", "pull out the drawer"),
    "drawer-close": ("close the drawer", "push the drawer shut", "shut the drawer"),
    "button-press-topdown": ("press the button", "push the button down", "press the red button from above"),
    "peg-insert-side": ("insert the peg into the hole", "put the peg in the hole", "push the peg into the hole"),
    "window-open": ("open the window", "slide the window open", "push the window open"),
    "window-close": ("close the window", "slide the window shut", "push the window shut"),
}  # fmt: skip
"""The tasks of MT10, each with the wordings of its instruction (Meta-World itself has none)."""
GROUPS = {"three": ("button-press-topdown", "drawer-open", "window-close"), "mt10": tuple(TASKS)}
TIERS = (*GROUPS, *TASKS)
"""What episodes are drawn from: a group of tasks, or one task."""

# it fixes a MuJoCo that is older than the tabletop's, and does not start with that one
_INSTALL = "pip install metaworld==3.1.1 packaging, in an environment of its own since it needs mujoco 3.3.0"


class MetaWorldError(VlaEdgeError):
    """Meta-World is not installed, or was asked for what it cannot do."""


@dataclass(frozen=True)
class MetaWorldEpisode:
    """What was drawn from a seed: a task of the tier, and one of its wordings."""

    task: str
    instruction: str


@dataclass(frozen=True)
class Snapshot:
    """A state to go back to within an episode."""

    physics: np.ndarray
    seen: np.ndarray
    steps: int
    success: bool


class MetaWorld:
    """The tasks, one environment for each that was asked for; a task's goal is drawn from the episode's seed.

    Raises:
        MetaWorldError: Meta-World is not installed.
    """

    joint_names = JOINTS

    def __init__(self):
        self._makers, self._experts = library()
        self._environments: dict[str, object] = {}
        self._renderers: dict[str, object] = {}
        self._env = self._expert = None
        self.episode: MetaWorldEpisode | None = None
        self.steps, self.success = 0, False

    def reset(self, seed: int, tier: str = "three") -> MetaWorldEpisode:
        """A fresh episode.

        Raises:
            TaskError: no such tier.
        """
        if tier not in TIERS:
            raise TaskError(f"Meta-World has no tier {tier!r} here; it is one of {', '.join(TIERS)}")
        tasks = GROUPS.get(tier, (tier,))
        # a task's episode of a seed is the same whichever tier it is drawn from
        task = tasks[np.random.default_rng([int(seed), 1]).integers(len(tasks))]
        rng = np.random.default_rng([int(seed), list(TASKS).index(task)])
        self._env, self._expert = self._environment(task), self._experts[f"{task}-v3"]()
        self._env.seed(int(rng.integers(2**31)))
        self._seen, _ = self._env.reset()
        self.steps, self.success = 0, False
        self.episode = MetaWorldEpisode(task, str(rng.choice(TASKS[task])))
        return self.episode

    def step(self, target: np.ndarray) -> None:
        """One step of the environment with the action that comes nearest to a target.

        Args:
            target: (4,) m: of the hand and between the fingers.

        Raises:
            MetaWorldError: it is not finite, or the episode's time is up.
        """
        if not np.isfinite(target).all():
            raise MetaWorldError("a target holds a value that is not finite")
        if self.steps >= TIME_LIMIT_STEPS:
            raise MetaWorldError(f"an episode of Meta-World has {TIME_LIMIT_STEPS} steps; begin another")
        stride = (target[:3] - self._env.data.mocap_pos[0]) / STRIDE_M
        action = np.clip([*stride, 1 - 2 * target[3] / OPENING_M], -1.0, 1.0).astype(np.float32)
        self._seen, *_, told = self._env.step(action)
        self.steps += 1
        self.success = self.success or bool(told["success"])

    @property
    def time_ns(self) -> int:
        """World time since the reset."""
        return self.steps * STEP_NS

    @property
    def finished(self) -> bool:
        """Done as the environment judges it, at any one step, or out of time."""
        return self.success or self.steps >= TIME_LIMIT_STEPS

    def joint_state(self, stamp_ns: int | None = None) -> JointState:
        """Where the hand is and how far apart its fingers are, m; stamped with world time when left out."""
        position = [*self._seen[:3], OPENING_M * self._seen[3]]
        return JointState(self.time_ns if stamp_ns is None else stamp_ns, JOINTS, position)

    def expert_target(self) -> np.ndarray:
        """(4,) m: what Meta-World's scripted expert, who sees the state and not the picture, would do in this step."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its gain saturates is its design
            action = np.clip(self._expert.get_action(self._seen), -1.0, 1.0)
        env = self._env
        hand = np.clip(env.data.mocap_pos[0] + STRIDE_M * action[:3], env.mocap_low, env.mocap_high)
        return np.array([*hand, OPENING_M * (1 - action[3]) / 2])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest target, (4,) m each."""
        return np.array([*self._env.mocap_low, 0.0]), np.array([*self._env.mocap_high, OPENING_M])

    def render(self, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of now, by Meta-World's camera `corner`, turned upright: it hangs upside down.

        Raises:
            RenderError: nothing can be drawn here.
        """
        from vla_edge.sim.render import SceneRenderer

        task = self.episode.task
        if task not in self._renderers:
            self._renderers[task] = SceneRenderer(self._env.model, {CAMERA: None})
        picture = self._renderers[task].render(self._env.data, height, width, CAMERA)
        return np.ascontiguousarray(picture[::-1, ::-1])

    def object_pixel(self, height: int, width: int) -> np.ndarray:
        """(2,) x and y in pixels of the task's object in a picture of that size."""
        camera, view = self._env.data.camera(CAMERA), self._env.model.camera(CAMERA)
        x, y, z = camera.xmat.reshape(3, 3).T @ (self._seen[4:7] - camera.xpos)
        focal = height / 2 / np.tan(np.deg2rad(view.fovy[0]) / 2)
        return np.array([width / 2 + focal * x / z, height / 2 - focal * y / z])

    def snapshot(self) -> Snapshot:
        """The state of now."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self._env.model, kind))
        mujoco.mj_getState(self._env.model, self._env.data, physics, kind)
        return Snapshot(physics, self._seen.copy(), self.steps, self.success)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a state of the running episode."""
        import mujoco

        kind, env = mujoco.mjtState.mjSTATE_INTEGRATION, self._env
        mujoco.mj_setState(env.model, env.data, snapshot.physics, kind)
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_setState(env.model, env.data, snapshot.physics, kind)  # with the solver's start as it was
        self._seen, self.steps, self.success = snapshot.seen.copy(), snapshot.steps, snapshot.success
        env.curr_path_length, env._prev_obs = snapshot.steps, snapshot.seen[:18].copy()

    def close(self) -> None:
        """Frees the drawing contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _environment(self, task: str):
        if task not in self._environments:
            env = self._makers[f"{task}-v3"]()
            # The goal, which the expert needs, is in what is observed; and it is drawn anew, from the seed. The space
            # of observations was cached while it was not, and would make zeros of it.
            env._partially_observable = env._freeze_rand_vec = False
            env.__dict__.pop("sawyer_observation_space", None)
            env.seeded_rand_vec = env._set_task_called = True
            env.model.vis.quality.offsamples = 0
            self._environments[task] = env
        return self._environments[task]


def vocabulary() -> tuple[str, ...]:
    """Every word of every instruction, sorted."""
    return tuple(sorted({word for wordings in TASKS.values() for text in wordings for word in text.split()}))


def library() -> tuple[dict, dict]:
    """Task -> class of its environment, and of its expert. Raises MetaWorldError where it is not installed."""
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ImportError as error:
        raise MetaWorldError(f"Meta-World cannot be imported here ({error}); {_INSTALL}") from None
    return ALL_V3_ENVIRONMENTS, ENV_POLICY_MAP


