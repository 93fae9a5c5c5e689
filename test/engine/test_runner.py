"""The runner's chunk is the policy's: Euler's rule over the stages, the same every time, and without torch."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from tiny import JOINTS, make_observations, tiny_policy, tiny_spec

from vla_edge.engine.runner import Runner, RunnerError
from vla_edge.policy.noise import noise_for
from vla_edge.policy.preprocess import ObservationError
from vla_edge.policy.tokenize import InstructionError
from vla_edge.types import JointState, Observation


@pytest.fixture(scope="module")
def engine(bundle):
    return Runner.from_bundle(bundle)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Runner.from_checkpoint(checkpoint)


@pytest.fixture
def observation():
    return make_observations(1, seed=5)[0]


def by_hand(observation: Observation, num_steps: int, tokenizer, noise: np.ndarray) -> np.ndarray:
    """(T, J) rad: the policy's own modules in float64, the flow integrated as the paper writes it."""
    import torch

    from vla_edge.policy.preprocess import Preprocessor
    from vla_edge.policy.tokenize import InstructionTokenizer

    policy, spec = tiny_policy(), tiny_spec()
    tensors = Preprocessor(spec, InstructionTokenizer(tokenizer, spec.tokenizer_max_length, spec.prompt))(observation)
    t = {name: torch.from_numpy(value) for name, value in tensors.items()}
    x = torch.from_numpy(noise)
    with torch.no_grad():
        cache = policy.prefix(policy.vision(t["image.head"])[0], t["lang_tokens"], t["lang_mask"], t["state"])
        for step in range(num_steps):
            condition = policy.time(torch.tensor([1 - step / num_steps]))[0]
            x = x - policy.denoise(x, condition, *cache)[0] / num_steps
    offsets = x[0, :, :3].double().numpy() * np.array([0.5, 0.4, 0.3]) + np.array([0.1, -0.2, 0.0])
    return offsets + observation.joints.position


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_the_reference_follows_the_flow(checkpoint, observation, num_steps):
    noise = noise_for(7, observation.stamp_ns, (1, 8, 8))
    runner = Runner.from_checkpoint(checkpoint, num_steps)
    found = runner.infer(observation, noise=noise).chunk
    tokenizer = checkpoint / "backbone" / "tokenizer.json"
    np.testing.assert_allclose(found.positions, by_hand(observation, num_steps, tokenizer, noise), atol=1e-5)
    assert (found.stamp_ns, found.joint_names, found.dt) == (observation.stamp_ns, JOINTS, 0.05)


def test_steps_that_do_not_ask_the_network_go_on_as_the_last_two_tell(checkpoint, observation):
    noise = noise_for(7, observation.stamp_ns, (1, 8, 8))
    runner = Runner.from_checkpoint(checkpoint, 10)
    every = runner.infer(observation, noise=noise).chunk.positions
    runner.set_num_steps(10, (0, 2, 5, 9))
    assert runner.num_steps == 4
    found = runner.infer(observation, noise=noise).chunk.positions

    (inputs,) = (dict(tensors) for name, tensors in list(runner.stage_inputs(observation))[:4] if name == "denoise")
    velocities, x = {}, noise.copy()
    for step in range(10):
        condition = runner.stages["time"].run({"time": np.array([1 - step / 10], np.float32)})["time_condition"]
        if step in (0, 2, 5, 9):
            told = {**inputs, "x": x, "time_condition": condition}
            velocities[step] = runner.stages["denoise"].run(told)["velocity"]
            last = step
        before = [s for s in velocities if s < last]
        slope = (velocities[last] - velocities[before[-1]]) / (last - before[-1]) if before else 0.0
        x = x - (velocities[last] + (step - last) * slope) / 10
    scale, offset = np.array([0.5, 0.4, 0.3]), np.array([0.1, -0.2, 0.0])
    by_hand = x[0, :, :3].astype(np.float64) * scale + offset + observation.joints.position
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert 0 < np.abs(found - every).mean()
    runner.set_num_steps(10)
    np.testing.assert_array_equal(runner.infer(observation, noise=noise).chunk.positions, every)


@pytest.mark.parametrize("asked", [(1, 2), (0, 10), (0, 3, 3), (0, 4, 2)])
def test_steps_that_cannot_be_asked_are_an_error(checkpoint, asked):
    with pytest.raises(RunnerError, match="cannot be those that ask"):
        Runner.from_checkpoint(checkpoint).set_num_steps(10, asked)


def test_the_engine_is_close_to_the_reference(engine, reference, observation):
    ours, theirs = (runner.infer(observation, seed=3).chunk.positions for runner in (engine, reference))
    motion = theirs - observation.joints.position
    assert 0 < np.abs(ours - theirs).mean() < 0.03 * motion.std()


def test_the_same_seed_and_stamp_give_the_same_chunk(engine, bundle, observation):
    first = engine.infer(observation, seed=3).chunk.positions
    engine.infer(make_observations(3, seed=9)[2], seed=8)
    again = engine.infer(observation, seed=3).chunk.positions
    other = Runner.from_bundle(bundle).infer(observation, seed=3).chunk.positions
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, other)
    assert not np.array_equal(first, engine.infer(observation, seed=4).chunk.positions)


def test_given_noise_takes_the_place_of_the_seed(engine, observation):
    noise = noise_for(3, observation.stamp_ns, engine.noise_shape)
    np.testing.assert_array_equal(
        engine.infer(observation, seed=99, noise=noise).chunk.positions,
        engine.infer(observation, seed=3).chunk.positions,
    )


def test_joints_are_matched_by_name(engine, observation):
    shuffled = JointState(0, JOINTS[::-1], observation.joints.position[::-1])
    other = Observation(observation.stamp_ns, observation.images, shuffled, observation.instruction)
    np.testing.assert_array_equal(
        engine.infer(other, seed=1).chunk.positions, engine.infer(observation, seed=1).chunk.positions
    )


def test_the_number_of_steps_is_a_choice(bundle, observation):
    one, many = Runner.from_bundle(bundle, num_steps=1), Runner.from_bundle(bundle)
    assert (one.num_steps, many.num_steps) == (1, 3)
    first = one.infer(observation).chunk.positions
    assert not np.array_equal(first, many.infer(observation).chunk.positions)
    many.set_num_steps(1)
    np.testing.assert_array_equal(first, many.infer(observation).chunk.positions)
    with pytest.raises(RunnerError, match="num_steps is 101, allowed is 1 to 100"):
        many.set_num_steps(101)
    with pytest.raises(RunnerError, match="num_steps is -1"):
        Runner.from_bundle(bundle, num_steps=-1)


def test_the_timing_adds_up(engine, observation):
    timing = engine.infer(observation).timing
    assert set(timing.stages) == {"vision", "prefix", "denoise"}
    parts = timing.preprocess + sum(timing.stages.values()) + timing.postprocess
    assert parts == pytest.approx(timing.total, abs=1e-3) and timing.total > 0


def test_warming_up_leaves_no_trace(bundle, observation):
    cold, warm = Runner.from_bundle(bundle), Runner.from_bundle(bundle)
    assert warm.warm_up() is None
    np.testing.assert_array_equal(cold.infer(observation).chunk.positions, warm.infer(observation).chunk.positions)


def test_an_observation_that_cannot_be_shown_is_refused_and_the_next_is_not(engine, observation):
    wrong = Observation(0, {"head": np.zeros((10, 10, 3), np.uint8)}, observation.joints, observation.instruction)
    broken = Observation(0, observation.images, JointState(0, JOINTS, [0, np.nan, 0]), observation.instruction)
    for bad in (wrong, broken):
        with pytest.raises(ObservationError):
            engine.infer(bad)
    engine.infer(observation)


@pytest.mark.parametrize("text", ["", "red " * 50, "抓住红色方块"])
def test_instructions_are_checked_without_an_inference(engine, text):
    with pytest.raises(InstructionError):
        engine.check_instruction(text)
    engine.check_instruction("touch the red cube")


def test_actions_that_are_not_finite_never_leave_the_runner(engine, observation):
    with pytest.raises(RunnerError, match="not finite"):
        engine.infer(observation, noise=np.full(engine.noise_shape, np.nan, np.float32))
    assert np.isfinite(engine.infer(observation).chunk.positions).all()


def test_threads_take_turns(engine, observation):
    expected = {seed: engine.infer(observation, seed=seed).chunk.positions for seed in range(4)}
    wrong = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not np.array_equal(engine.infer(observation, seed=seed).chunk.positions, expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_cameras_share_one_vision_stage(bundle):
    """Each camera's tokens land in their own part of the prefix's input."""
    from dataclasses import replace

    from vla_edge.engine.backends import StageInterface
    from vla_edge.policy.stages import TensorSpec

    class Recorder:
        def __init__(self, inputs, outputs, body):
            self.interface, self._body = StageInterface("stage", inputs, outputs), body

        def bind(self, inputs, outputs):
            return lambda: self._body(inputs, outputs)

        def run(self, inputs):
            return {spec.name: spec.zeros() for spec in self.interface.outputs}

    seen = {}
    image, tokens = TensorSpec("image", (1, 3, 32, 32)), TensorSpec("image_tokens", (1, 4, 2))
    both = TensorSpec("image_tokens", (1, 8, 2))
    rest = (
        TensorSpec("lang_tokens", (1, 12), "int64"),
        TensorSpec("lang_mask", (1, 12), "bool"),
        TensorSpec("state", (1, 8)),
    )
    x, velocity = TensorSpec("x", (1, 8, 8)), TensorSpec("velocity", (1, 8, 8))
    stages = {
        "vision": Recorder((image,), (tokens,), lambda i, o: np.copyto(o["image_tokens"], i["image"].mean())),
        "prefix": Recorder((both, *rest), (), lambda i, o: seen.update(tokens=i["image_tokens"].copy())),
        "time": Recorder((TensorSpec("time", (1,)),), (TensorSpec("time_condition", (1, 4)),), None),
        "denoise": Recorder((x,), (velocity,), lambda i, o: None),
    }
    spec = tiny_spec()
    second = replace(spec.cameras[0], name="wrist")
    runner = Runner(replace(spec, cameras=(spec.cameras[0], second)), bundle / "tokenizer.json", stages)
    black, white = (np.full((32, 48, 3), value, np.uint8) for value in (0, 255))
    joints = JointState(0, JOINTS, np.zeros(3))
    runner.infer(Observation(0, {"head": black, "wrist": white}, joints, "touch the red cube"))
    np.testing.assert_array_equal(seen["tokens"][0, :, 0], [-1] * 4 + [1] * 4)


def test_an_engine_without_a_stage_is_refused(bundle):
    with pytest.raises(RunnerError, match="stages are none, but a policy has vision, prefix, time, denoise"):
        Runner(tiny_spec(), bundle / "tokenizer.json", {})


def test_a_bundle_runs_without_torch_and_onnx(bundle):
    program = f"""
import sys
class Forbidden:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "rclpy"):
            raise ImportError(name + " must not be needed on the robot")
sys.meta_path.insert(0, Forbidden())
from vla_edge.engine.runner import Runner
runner = Runner.from_bundle({str(bundle)!r})
runner.warm_up()
print(runner.description()["precision"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "int8"


def test_it_tells_what_it_is(engine, reference):
    ours, theirs = engine.description(), reference.description()
    assert (ours["precision"], ours["backend"], ours["num_steps"]) == ("int8", "onnxruntime", 3)
    assert (theirs["precision"], theirs["backend"]) == ("float32", "torch")
    assert ours["bytes"] > 0 and theirs["bytes"] > 0


def test_the_stages_inputs_are_those_of_the_inference(reference, observation):
    from vla_edge.policy.preprocess import Postprocessor

    inputs = list(reference.stage_inputs(observation, seed=3))
    assert [name for name, _ in inputs] == ["vision", "prefix", "time", "denoise", "time", "denoise"]
    last = inputs[-1][1]
    (velocity,) = reference.stages["denoise"].run(last).values()
    actions = last["x"] - velocity / np.float32(reference.num_steps)
    np.testing.assert_allclose(
        Postprocessor(reference.spec)(actions, observation.joints),
        reference.infer(observation, seed=3).chunk.positions,
        atol=1e-5,
    )
