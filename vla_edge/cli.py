"""The `vla-edge` command: build an engine, look into it, judge it on a recording or in simulation, time it.

Every command prints for people, or with --json one JSON object on standard output. Errors are one sentence on standard
error and exit code 2; an engine that fails its limits gives exit code 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from vla_edge.progress import Bar
from vla_edge.types import VlaEdgeError

FAILED, WRONG_USE = 1, 2


class UsageError(VlaEdgeError):
    """Arguments that do not go together."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    # an interrupted build must be able to clear away what it has begun
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        result, code, text = options.run(options)
    except VlaEdgeError as error:
        print(f"vla-edge: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("vla-edge: interrupted; nothing half-written is left", file=sys.stderr)
        return 128 + signal.SIGINT
    from vla_edge.evaluate.evaluation import plain

    print(json.dumps(plain(result), indent=2) if options.json else text)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="vla-edge", description=__doc__.split("\n\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return sub

    sub = command("build", _build, "compress a checkpoint, compile it, verify it and write an engine bundle")
    sub.add_argument("checkpoint", type=Path, help="directory in LeRobot's layout")
    sub.add_argument("--recipe", help="name of a shipped recipe, or a YAML file; int8 when left out")
    sub.add_argument("--backend", default="auto", help="runtime to build for; some with commas between: the fastest")
    sub.add_argument(
        "--target-hz", type=float, help="instead of a recipe: build and measure engines until one keeps so many chunks/s"
    )
    sub.add_argument("--max-memory-mb", type=float, help="that a process with the engine may take; as --target-hz")
    sub.add_argument("--max-error", type=float, help="of the motion, that reaching the target may cost; 0.03 when left out")
    sub.add_argument(
        "--compute-capability", help="of the GPU to build for, as 8.6, where it is not here (tensorrt_rtx)"
    )
    sub.add_argument("--output", type=Path, help="directory of the bundle; by default bundles/ beside the checkpoint")
    sub.add_argument(
        "--calibration",
        type=Path,
        help="bag, LeRobot dataset or demonstrations to calibrate and verify on; calibration/ beside the checkpoint",
    )
    sub.add_argument(
        "--demonstrations", type=Path, nargs="+", default=[], help="recordings that recipes with training train on"
    )
    sub.add_argument("--force", action="store_true", help="build even when the same bundle is there already")

    sub = command("merge", _merge, "merge a LoRA, DoRA or QLoRA adapter (peft's) into a checkpoint, giving a new one")
    sub.add_argument("base", type=Path, help="checkpoint the adapter was trained on, in LeRobot's layout")
    sub.add_argument("adapter", type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    sub.add_argument("output", type=Path, help="checkpoint directory to write; must not exist")
    sub.add_argument(
        "--nf4-base", action="store_true", help="round adapted layers to NF4 first, as QLoRA trained the adapter"
    )

    sub = command("distill", _distill, "make a smaller policy that does what a teacher does, giving a checkpoint")
    sub.add_argument("teacher", type=Path, help="checkpoint directory in LeRobot's layout")
    sub.add_argument("output", type=Path, help="checkpoint directory to write; must not exist")
    sub.add_argument("--size", type=float, default=0.5, help="share of the teacher's parameters it may have")
    sub.add_argument("--demonstrations", type=Path, nargs="+", required=True, help="recordings to train on")
    sub.add_argument("--joints", nargs="+", default=[], help="names or patterns of those it moves; else all")
    sub.add_argument("--instructions", nargs="+", default=[], help="patterns of those it follows; else all")
    sub.add_argument("--steps", type=int, default=2500, help="of training")
    sub.add_argument("--batch", type=int, default=32, help="frames of each step")
    sub.add_argument("--rate", type=float, default=1e-3, help="learning rate at its peak")

    sub = command("plan", _plan, "predict time, rates and memory of an engine on a device, before anything is built")
    sub.add_argument("policy", help="checkpoint directory, or a published architecture such as pi0.5 or openvla-7b")
    sub.add_argument("--recipe", default="int8", help="name of a shipped recipe, or a YAML file")
    sub.add_argument("--device", default="local", help="name of a shipped device, a YAML file, or this computer")
    sub.add_argument("--runtime", help="of the device: how well kernels use it; by default what vla-edge builds for it")
    sub.add_argument("--cameras", type=int, help="pictures of an observation")
    sub.add_argument("--flow-steps", type=int, help="steps of a flow policy")
    sub.add_argument("--chunk", type=int, help="actions of a chunk")
    sub.add_argument("--prompt-tokens", type=int, help="tokens of the instruction")
    sub.add_argument("--keep-vision", type=float, help="share of vision tokens the language model sees")
    sub.add_argument("--kv", help="precision of the cache of keys and values: float16, int8 or int4")
    sub.add_argument("--decoding", help="of action tokens: autoregressive, speculative, fixed-point or parallel")
    sub.add_argument("--draft", type=int, help="tokens a speculative draft proposes")
    sub.add_argument("--acceptance", type=float, help="share of proposed tokens that are accepted")
    sub.add_argument("--iterations", type=int, help="passes until a fixed point")
    sub.add_argument("--group-size", type=int, help="of 4-bit weights, instead of the recipe's")
    sub.add_argument("--target-hz", type=float, help="list what reaches this many chunks per second")
    sub.add_argument("--all", action="store_true", help="with --target-hz, list what does not reach it too")
    sub.add_argument("--calibrate", action="store_true", help="measure this computer again")

    sub = command("inspect", _inspect, "check a bundle and tell what is in it")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--layers", action="store_true", help="list what every linear layer got")

    sub = command("evaluate", _evaluate, "run engines on recordings and compare with what the robot did")
    sub.add_argument("bag", type=Path, nargs="?", help="rosbag2 directory or file, ROS 1 bag or LeRobot dataset")
    sub.add_argument("engine", nargs="?", help="bundle, checkpoint for full precision, or policy server (ws://host:port)")
    sub.add_argument("--bag", dest="bags", type=Path, nargs="+", default=[], metavar="BAG", help="further recordings")
    sub.add_argument("--engine", dest="engines", nargs="+", default=[], metavar="ENGINE", help="more")
    sub.add_argument("--reference", type=Path, help="checkpoint to compare with from the same noise")
    sub.add_argument("--accept", type=Path, help="YAML file of limits; the shipped config/accept.yaml by default")
    sub.add_argument("--rate", type=float, default=5.0, help="frames per second of bag; 0 takes every frame")
    sub.add_argument("--max-frames", type=int, help="stop after this many")
    sub.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    sub.add_argument("--delay", type=float, default=0.1, help="s from an observation to its chunk, for the controller")
    sub.add_argument("--samples", type=int, default=0, help="further chunks a frame, for the policy's own disagreement")
    sub.add_argument("--robot", help="limits of the controller: 'g1', a YAML or a URDF file; by the joints otherwise")
    sub.add_argument("--urdf", type=Path, help="of the robot, for distances of its end effectors in mm")
    sub.add_argument("--links", nargs="+", help="the end effectors; the last link of every moved chain otherwise")
    sub.add_argument("--contract", type=Path, help="YAML file naming the bag's topics where they differ")
    sub.add_argument("--report", type=Path, help="HTML file to write, with JSON and Markdown beside it")
    sub.add_argument("--junit", type=Path, help="JUnit XML file to write, a case for every limit")
    sub.add_argument("--workers", type=int, default=1, help="processes, when there are several pairs to evaluate")
    sub.add_argument("--dask", help="address of a running Dask scheduler to evaluate on, instead of --workers")

    sub = command("convert", _convert, "turn a recording into a LeRobot dataset, for fine-tuning")
    sub.add_argument("bag", type=Path, help="rosbag2 directory or file, or ROS 1 bag")
    sub.add_argument("output", type=Path, help="dataset directory to write; must not exist")
    sub.add_argument("--fps", type=float, required=True, help="steps per second; for a policy, 1 over its dt")
    sub.add_argument("--cameras", nargs="+", help="all of the recording's otherwise")
    sub.add_argument("--joints", nargs="+", help="all of the recording's otherwise")
    sub.add_argument("--png", action="store_true", help="keep pictures without loss instead of as video")
    sub.add_argument("--robot-type", default="", help="as LeRobot calls the robot")
    sub.add_argument("--contract", type=Path, help="YAML file naming the bag's topics where they differ")

    sub = command("closed-loop", _closed_loop, "let an engine act in the simulated world and count successes")
    sub.add_argument("engine", type=Path, help="bundle, or a checkpoint for full precision")
    sub.add_argument("--episodes", type=int, default=100)
    sub.add_argument("--first-seed", type=int, default=100_000, help="seeds count up from here, below 1,000,000")
    sub.add_argument("--tier", default="touch", help="difficulty of the episodes")
    sub.add_argument("--shuffled", action="store_true", help="give the instruction of another goal of the scene")
    sub.add_argument("--delay", type=float, default=0.1, help="s from an observation to its chunk")
    sub.add_argument("--rate", type=float, default=5.0, help="observations per second")
    sub.add_argument("--inference", default="asynchronous", help="inference policy, see doc/serving.md")
    sub.add_argument("--workers", type=int, default=1, help="processes")
    sub.add_argument("--stop-at", type=float, help="end once it is certain on which side of this the success rate is")
    sub.add_argument("--against", type=Path, help="another engine on the same seeds; end once --margin is decided")
    sub.add_argument("--margin", type=float, default=0.01, help="of success rate the engine may lose to --against")
    sub.add_argument("--report", type=Path, help="HTML file to write, with a JSON file beside it")

    sub = command("bench", _bench, "time engines against each other on the same observations, in turn")
    sub.add_argument(
        "engines", type=Path, nargs="+", help="bundles, and checkpoints for PyTorch eager; first is the base"
    )
    sub.add_argument(
        "--bag", type=Path, help="recording to take observations from; calibration/ beside the first engine"
    )
    sub.add_argument("--rounds", type=int, default=30)
    sub.add_argument("--threads", type=int, help="at most this many for each stage, and for PyTorch")

    sub = command(
        "compare", _compare, "build several recipes and set them side by side, in radians, successes, MB and ms"
    )
    sub.add_argument("checkpoint", type=Path, help="directory in LeRobot's layout")
    sub.add_argument(
        "--recipes", nargs="+", default=["int8", "int4-gptq", "int4-awq", "int4-rtn"], help="names or files"
    )
    sub.add_argument("--episodes", type=int, default=0, help="of the simulated world for each engine; 0 for none")
    sub.add_argument("--first-seed", type=int, default=300_000, help="seeds count up from here, below 1,000,000")
    sub.add_argument("--tier", default="hard", help="difficulty of the episodes")
    sub.add_argument("--workers", type=int, default=1, help="processes")
    sub.add_argument("--calibration", type=Path, help="recording; calibration/ beside the checkpoint")
    sub.add_argument(
        "--demonstrations", type=Path, nargs="+", default=[], help="recordings that recipes with training train on"
    )
    sub.add_argument("--report", type=Path, default=Path("compare.html"), help="page to write, JSON beside it")

    sub = command("sensitivity", _sensitivity, "find which layers need their bits, and write the recipe of a budget")
    sub.add_argument("checkpoint", type=Path, help="directory in LeRobot's layout")
    budget = sub.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=float, help="most bits per weight on average, scales included")
    budget.add_argument("--error", type=float, help="most action error, as a share of the motion's standard deviation")
    budget.add_argument("--ms", type=float, help="most milliseconds of a chunk on this machine")
    sub.add_argument("--calibration", type=Path, help="recording; calibration/ beside the checkpoint")
    sub.add_argument("--frames", type=int, default=16, help="observations the error is measured on")
    sub.add_argument("--output", type=Path, default=Path("mixed.yaml"), help="recipe to write, its report beside it")

    command("backends", _backends, "list the runtimes, and what each of them really computed on this computer")

    sub = command("profile", _profile, "tell where an engine's time goes, and what holds it back on this computer")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--bag", type=Path, help="recording to take observations from; calibration/ beside the bundle")
    sub.add_argument("--repeats", type=int, default=100, help="inferences")
    sub.add_argument("--threads", type=int, help="at most this many for each stage")
    sub.add_argument("--report", type=Path, help="HTML file to write, with a JSON file beside it")

    sub = command("serve", _serve, "serve an engine to other computers, in the protocol of openpi's clients")
    sub.add_argument("engine", type=Path, help="bundle, or a checkpoint for full precision")
    sub.add_argument("--host", default="127.0.0.1", help="interface to listen on; 0.0.0.0 for all of them")
    sub.add_argument("--port", type=int, default=8000)
    sub.add_argument("--api-key", help="what clients have to present")

    return top


def _build(options):
    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle

    if options.target_hz is not None or options.max_memory_mb is not None:
        return _build_to(options)
    if options.max_error is not None:
        raise UsageError("--max-error belongs to --target-hz or --max-memory-mb; a recipe says itself what it accepts")
    progress = Bar()
    try:
        path = build(
            options.checkpoint,
            options.recipe or "int8",
            options.backend,
            options.output,
            options.calibration,
            progress,
            options.force,
            demonstrations=options.demonstrations,
            compute_capability=options.compute_capability,
        )
    finally:
        progress.close()
    bundle = Bundle.load(path)
    found, profile = bundle.manifest["verification"], bundle.manifest["profile"]
    text = (
        f"{path}: {bundle.bytes / 1e6:.1f} MB, {bundle.description()['precision']}, "
        f"action error {100 * found['action_error_rel']:.2f} % of the motion over {found['frames']} observations, "
        + (f"{profile['total']['p50']:.1f} ms a chunk here" if profile else f"verified by {found['by']}, not run here")
    )
    return {"bundle": str(path), "bytes": bundle.bytes, **_manifest(bundle, layers=False)}, 0, text


def _build_to(options):
    from vla_edge.engine.build_to import build_to, report_path
    from vla_edge.engine.target import MOST_ERROR, Target
    from vla_edge.evaluate.target_report import summary, to_json

    for name in ("recipe", "compute_capability"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not go with a target, which finds and measures engines here")
    memory = None if options.max_memory_mb is None else 1e6 * options.max_memory_mb
    error = MOST_ERROR if options.max_error is None else options.max_error
    target, bar = Target(options.target_hz, memory, error), Bar()
    try:
        outcome, path = build_to(
            options.checkpoint, target, options.backend, options.output, options.calibration, options.demonstrations,
            bar,
        )  # fmt: skip
    finally:
        bar.close()
    text = summary(outcome) if path is None else f"{summary(outcome)}\n{path}: {report_path(path)} tells how"
    return {**to_json(outcome), "bundle": path and str(path)}, 0 if outcome.reached else FAILED, text


def _plan(options):
    from vla_edge.compress.recipe import load_recipe
    from vla_edge.engine.architecture_files import architecture_of, load_architecture
    from vla_edge.engine.devices import load_device
    from vla_edge.engine.plan import predict
    from vla_edge.engine.plan_report import plan_dict, plan_text, search_dict, search_text
    from vla_edge.engine.plan_search import candidates
    from vla_edge.engine.precision import asked_of_workload
    from vla_edge.engine.workload import Workload

    is_directory = Path(options.policy).expanduser().is_dir()
    architecture = architecture_of(options.policy) if is_directory else load_architecture(options.policy)
    recipe, bar = load_recipe(options.recipe), Bar()
    try:
        device = load_device(options.device, options.calibrate, bar)
    finally:
        bar.close()
    asked = dict(
        cameras=options.cameras, steps=options.flow_steps, chunk=options.chunk, prompt_tokens=options.prompt_tokens,
        keep_vision=options.keep_vision, kv=options.kv, decoding=options.decoding, draft=options.draft,
        acceptance=options.acceptance, iterations=options.iterations,
    )  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    workload = Workload.of(architecture, **{**asked_of_workload(recipe), **asked})
    if options.target_hz is None:
        plan = predict(architecture, recipe, device, workload, options.runtime, options.group_size)
        return plan_dict(plan), 0, plan_text(plan)
    found = list(candidates(architecture, device, workload, options.runtime, options.group_size))
    result = {"target_hz": options.target_hz, "candidates": search_dict(found, options.target_hz)}
    reached = any(candidate.reaches(options.target_hz) for candidate in found)
    return result, 0 if reached else FAILED, search_text(found, options.target_hz, options.all)


def _merge(options):
    from dataclasses import asdict

    from vla_edge.policy.merge import merge_adapter

    bar = Bar()
    try:
        merged = merge_adapter(options.base, options.adapter, options.output, options.nf4_base, bar)
    finally:
        bar.close()
    text = f"{merged.directory}: {merged.factored} layers merged, {merged.replaced} tensors replaced"
    if merged.adopted:
        text += f"; from the adapter's directory: {', '.join(merged.adopted)}"
    return {**asdict(merged), "directory": str(merged.directory)}, 0, text


def _distill(options):
    from dataclasses import asdict

    from vla_edge.learn.distill import distill

    bar = Bar()
    try:
        made = distill(
            options.teacher, options.output, options.size, options.demonstrations, options.joints,
            options.instructions, options.steps, options.batch, options.rate, progress=bar,
        )  # fmt: skip
    finally:
        bar.close()
    share = made.parameters / made.teacher_parameters
    text = (
        f"{made.directory}: {made.parameters:,} parameters, {100 * share:.0f} % of the teacher's "
        f"{made.teacher_parameters:,}, {len(made.joints)} joints; trained on {made.frames} frames; differs by "
        f"{100 * made.action_error_rel:.2f} % of the motion over {made.compared} observations"
    )
    return {**asdict(made), "directory": str(made.directory)}, 0, text


def _compare(options):
    from vla_edge.engine.build import build
    from vla_edge.evaluate.comparison import compare_engines
    from vla_edge.evaluate.comparison_report import summary, to_json, write_comparison_report

    bar, bundles, traced = Bar(), {}, {}
    try:
        for recipe in options.recipes:
            name = Path(recipe).stem
            bundles[name] = build(
                options.checkpoint, recipe, calibration=options.calibration, traced=traced,
                progress=lambda fraction, what, name=name: bar(fraction, f"{name}: {what}"),
                demonstrations=options.demonstrations,
            )  # fmt: skip
        seeds = range(options.first_seed, options.first_seed + options.episodes)
        store = options.report.with_suffix(".episodes")
        comparison = compare_engines(options.checkpoint, bundles, seeds, options.tier, options.workers, store, bar)
    finally:
        bar.close()
    written = [str(path) for path in write_comparison_report(comparison, options.report)]
    return {**to_json(comparison), "reports": written}, 0, "\n".join([summary(comparison), *written])


def _sensitivity(options):
    import yaml

    from vla_edge.engine.search import search
    from vla_edge.evaluate.page import write_text
    from vla_edge.evaluate.sensitivity_report import write_sensitivity_report

    output, directory = options.output, options.checkpoint.resolve()
    name = directory.parent.name or directory.name
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".progress.json")
    progress = Bar()
    try:
        recipe, choice, found, measured = search(
            options.checkpoint, options.calibration, options.bits, options.error, options.ms, options.frames,
            output.stem, progress, unfinished,
        )  # fmt: skip
    finally:
        progress.close()
    write_text(output, yaml.safe_dump(recipe.concise(), sort_keys=False, width=120))
    report = write_sensitivity_report(found, choice, measured, output.with_suffix(".html"), name)
    unfinished.unlink(missing_ok=True)
    counts = {option: list(choice.options.values()).count(option) for option in dict.fromkeys(choice.options.values())}
    layers = ", ".join(f"{count} layers in {option}" for option, count in counts.items())
    text = (
        f"{output}: {choice.average_bits:.2f} bits per weight, {layers}; action error "
        f"{100 * measured.error_rel:.2f} % of the motion on observations it fitted nothing to "
        f"(predicted {100 * choice.predicted_error_rel:.2f} %)"
        + ("" if measured.ms is None else f"; {measured.ms:.1f} ms a chunk (predicted {choice.predicted_ms:.1f})")
        + f"; why: {report}"
    )
    result = {
        "recipe": str(output), "report": str(report), "average_bits": choice.average_bits, "layers": counts,
        "predicted_error_rel": choice.predicted_error_rel, "measured_error_rel": measured.error_rel,
        "predicted_ms": choice.predicted_ms, "measured_ms": measured.ms,
    }  # fmt: skip
    return result, 0, text


def _inspect(options):
    from vla_edge.engine.bundle import Bundle

    bundle = Bundle.load(options.bundle)
    manifest, found = bundle.manifest, bundle.manifest["verification"]
    lines = [
        f"{manifest['name']}: {bundle.bytes / 1e6:.1f} MB, built {manifest['created']}, every hash is right",
        f"  policy      {bundle.spec.family}, {len(bundle.spec.joint_names)} joints, "
        f"{bundle.spec.chunk_size} points of {bundle.spec.dt:g} s, {bundle.spec.num_steps} flow steps",
        f"  cameras     {', '.join(f'{c.name} {c.source_width}x{c.source_height}' for c in bundle.spec.cameras)}",
        f"  recipe      {manifest['recipe']['name']}: {manifest['recipe']['description']}",
        f"  calibrated  on {manifest['calibration']['frames']} observations of {manifest['calibration']['source']}",
        f"  verified    on {found['frames']}: action error {1e3 * found['action_error_rad']:.2f} mrad, "
        f"{100 * found['action_error_rel']:.2f} % of the motion, cosine at least {found['cosine_min']:.5f}",
        *_cache_line(manifest),
        "",
        f"  {'stage':9}{'backend':13}{'weights':22}{'layers':>7}{'kB':>8}{'p50 ms':>8}{'p99 ms':>8}  runs with",
    ]
    for stage in bundle.stages:
        weights = ", ".join(f"{100 * share:.0f} % {precision}" for precision, share in stage.precision.items())
        time_ms = manifest["profile"].get(stage.interface.name, {})
        size = (bundle.directory / stage.file).stat().st_size
        lines.append(
            f"  {stage.interface.name:9}{stage.backend:13}{weights:22}{len(stage.layers):7}{size / 1e3:8.0f}"
            f"{time_ms.get('p50', float('nan')):8.2f}{time_ms.get('p99', float('nan')):8.2f}  "
            f"{', '.join(f'{k}={v}' for k, v in stage.options.items())}"
        )
        if options.layers:
            for name, row in stage.layers.items():
                group = f" in groups of {row['group_size']}" if "group_size" in row else ""
                shape = "x".join(map(str, row["shape"]))
                lines.append(f"    {name:45}{shape:>10}  {row['weights']}{group}, inputs {row['activations']}")
    return {"bundle": str(bundle.directory), "bytes": bundle.bytes, **_manifest(bundle, True)}, 0, "\n".join(lines)


def _cache_line(manifest) -> list[str]:
    if not manifest.get("cache"):
        return []
    now, before = manifest["cache"]["bytes"], manifest["cache"]["full_precision_bytes"]
    line = f"  cache       {now / 1e3:.1f} kB from prefix to denoise"
    return [line if now == before else f"{line}, {before / 1e3:.1f} kB in full precision"]


def _evaluate(options):
    from vla_edge.evaluate.contract import TopicContract
    from vla_edge.evaluate.junit import write_junit
    from vla_edge.evaluate.limits import Limits
    from vla_edge.evaluate.suite import Job, run_suite
    from vla_edge.resources import share_directory
    from vla_edge.robots.robot import load_robot

    bags, engines = ([*([one] if one else []), *more] for one, more in (
        (options.bag, options.bags), (options.engine, options.engines)
    ))  # fmt: skip
    if not bags or not engines:
        raise UsageError(f"there is no {'recording' if not bags else 'engine'} to evaluate; give BAG and ENGINE")
    limits = Limits.load(options.accept or share_directory() / "config" / "accept.yaml")
    several = len(bags) * len(engines) > 1
    parallel = several and (options.workers > 1 or options.dask)
    replay = {
        "rate_hz": options.rate or None, "seed": options.seed, "max_frames": options.max_frames,
        "delay_s": options.delay, "samples": options.samples, "links": tuple(options.links) if options.links else None,
        "robot": load_robot(options.robot) if options.robot else None,
        "urdf": str(options.urdf) if options.urdf else None,
    }  # fmt: skip
    contract = TopicContract.load(options.contract) if options.contract else None
    reference = str(options.reference) if options.reference else None
    jobs = [
        Job(str(bag), str(engine), reference, contract, 1 if parallel else None, replay)
        for engine in engines
        for bag in bags
    ]
    bar = Bar()
    try:
        outcomes = run_suite(jobs, limits, options.workers, options.dask, bar)
    finally:
        bar.close()
    junit = [str(write_junit(outcomes, options.junit))] if options.junit else []
    if not several and outcomes[0].error:
        raise UsageError(outcomes[0].error)
    result, written, lines = _evaluated(outcomes, options.report)
    written += junit
    code = 0 if all(outcome.passed for outcome in outcomes) else FAILED
    return {**result, "reports": written}, code, "\n".join([*lines, *(f"  {file}" for file in written)])


def _evaluated(outcomes, report: Path | None):
    """(JSON, files written, lines to print) of one pair or of several."""
    from vla_edge.evaluate.report import to_json, write_report
    from vla_edge.evaluate.suite_report import suite_json, verdict_of, write_suite_report

    if len(outcomes) > 1:
        verdict, result = verdict_of(outcomes), suite_json(outcomes)
        files = write_suite_report(outcomes, report)[:3] if report else ()
    else:
        verdict, evaluation = outcomes[0].verdict, outcomes[0].evaluation
        result = to_json(evaluation, verdict)
        files = write_report(evaluation, report, verdict) if report else ()
    lines = [verdict.headline, *(f"  {'ok  ' if c.passed else 'FAIL'} {c.sentence}" for c in verdict.checks)]
    return result, [str(file) for file in files], lines


def _convert(options):
    from vla_edge.evaluate.contract import TopicContract
    from vla_edge.evaluate.lerobot_export import export_lerobot

    cameras, joints = (tuple(names) if names else None for names in (options.cameras, options.joints))
    contract = TopicContract.load(options.contract) if options.contract else None
    bar = Bar()
    try:
        found = export_lerobot(
            options.bag, options.output, options.fps, cameras, joints, contract, not options.png, options.robot_type,
            lambda fraction, frames: bar(fraction, f"{frames} frames"),
        )  # fmt: skip
    finally:
        bar.close()
    told = f"{found.frames} frames in {found.episodes} episodes, {found.bridged} with the picture before"
    lines = [f"{options.output}: {told}"]
    lines += [f"  left out: {count} x {reason}" for reason, count in sorted(found.skipped.items())]
    return {"dataset": str(options.output), **vars(found)}, 0, "\n".join(lines)


def _closed_loop(options):
    from vla_edge.evaluate.closed_loop import run_closed_loop
    from vla_edge.evaluate.closed_loop_report import write_closed_loop_report

    if options.against:
        return _paired(options)
    bar, done = Bar(), []
    watch = _watch(options.stop_at) if options.stop_at is not None else None

    def progress(row) -> None:
        done.append(row.success)
        bar(len(done) / options.episodes, f"{sum(done)} of {len(done)} episodes succeeded")

    try:
        result = run_closed_loop(
            options.engine,
            range(options.first_seed, options.first_seed + options.episodes),
            options.tier,
            "shuffled" if options.shuffled else "none",
            options.delay,
            options.rate,
            options.workers,
            progress=progress,
            inference=options.inference,
            until=(lambda row: watch.add(row.success) is not None) if watch else None,
        )
    finally:
        bar.close()
    name = options.engine.resolve().name
    written = [str(p) for p in write_closed_loop_report(result, options.report, name)] if options.report else []
    interval = result.success_interval
    text = (
        f"{result.successes} of {result.n} episodes succeeded ({100 * result.success_rate:.1f} %, 95 % interval "
        f"{100 * interval.low:.1f} to {100 * interval.high:.1f}); the wrong object was touched first in "
        f"{result.wrong_first}"
    )
    if options.shuffled:
        text += f"; the goal given was reached in {result.given_successes}, chance is {100 * result.chance:.1f} %"
    answer = watch and watch.answer
    if watch:
        side = f"certainly {answer.value}" if answer else "not certain to be on either side of"
        text += f"; the success rate is {side} {100 * options.stop_at:g} %"
    told = {"result": result, "reports": written, "side_of_stop_at": answer and answer.value}
    return told, FAILED if answer and answer.value == "below" else 0, "\n".join([text, *written])


def _watch(limit: float):
    from vla_edge.evaluate.sequential import SequentialMean

    try:
        return SequentialMean(limit)
    except ValueError as error:
        raise UsageError(f"--stop-at: {error}") from None


def _paired(options):
    from vla_edge.evaluate.paired_run import run_paired

    bar = Bar()
    try:
        run = run_paired(
            options.against, options.engine, range(options.first_seed, options.first_seed + options.episodes),
            options.margin, workers=options.workers, tier=options.tier, delay_s=options.delay, rate_hz=options.rate,
            progress=lambda pairs, won: bar(pairs / options.episodes, f"{won} of {pairs} pairs succeeded"),
        )  # fmt: skip
    finally:
        bar.close()
    told = {"first": run.first.summary(), "second": run.second.summary(), "test": run.test, "holds": run.holds}
    return told, FAILED if run.holds is False else 0, run.one_line()


def _bench(options):
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.engine.race import race, speedup
    from vla_edge.evaluate.replay import open_policy

    if options.threads and any(not (path / "manifest.yaml").exists() for path in options.engines):
        import torch

        torch.set_num_threads(options.threads)
    runners = {path.resolve().name: open_policy(path, options.threads) for path in options.engines}
    base = next(iter(runners))
    bag = options.bag or _recording_beside(options.engines[0])
    observations = load_calibration(bag, runners[base].spec).held_out
    bar = Bar()
    try:
        laps = race(runners, observations, options.rounds, lambda fraction: bar(fraction, "timing in turn"))
    finally:
        bar.close()
    rows, lines = [], [f"{'engine':24}{'p50 ms':>9}{'p95':>9}{'p99':>9}   times {base}"]
    for name, lap in laps.items():
        ratio, interval = speedup(laps[base].total_ms, lap.total_ms)
        row = {
            "engine": name,
            **runners[name].description(),
            "ms": lap.to_dict(),
            "speedup": ratio,
            "interval": interval,
        }
        rows.append(row)
        total = row["ms"]["total"]
        lines.append(
            f"{name:24}{total['p50']:9.2f}{total['p95']:9.2f}{total['p99']:9.2f}   {ratio:.2f} "
            f"({interval[0]:.2f} to {interval[1]:.2f})"
        )
    return {"base": base, "rounds": options.rounds, "rows": rows}, 0, "\n".join(lines)


def _backends(options):
    from dataclasses import asdict

    from vla_edge.engine.overview import overview, table

    rows = overview()
    return {"backends": [asdict(row) for row in rows]}, 0, table(rows)


def _profile(options):
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.profile import profile_bundle
    from vla_edge.evaluate.profile_report import summary, write_profile_report

    bundle = Bundle.load(options.bundle)
    observations = load_calibration(options.bag or _recording_beside(bundle.directory), bundle.spec).held_out
    found = profile_bundle(bundle, observations, options.repeats, options.threads)
    name = bundle.manifest["name"]
    written = [str(write_profile_report(found, options.report, name))] if options.report else []
    return {**found.to_dict(), "reports": written}, 0, "\n".join([summary(found), *written])


def _serve(options):
    import threading

    from vla_edge.engine.remote.server import PolicyServer
    from vla_edge.evaluate.replay import open_policy

    runner = open_policy(options.engine)
    runner.warm_up()
    with PolicyServer(runner, options.host, options.port, options.api_key) as server:
        print(f"serving {options.engine} at ws://{options.host}:{server.port}", file=sys.stderr, flush=True)
        try:
            threading.Event().wait()
        except (KeyboardInterrupt, SystemExit):
            pass
    return {"port": server.port}, 0, "stopped"


def _recording_beside(engine: Path) -> Path:
    from vla_edge.compress.calibrate import CalibrationError

    for parent in engine.resolve().parents[:3]:
        if (parent / "calibration").is_dir():
            return parent / "calibration"
    raise CalibrationError(f"there is no recording beside {engine}; give one with --bag")


def _manifest(bundle, layers: bool) -> dict:
    """The manifest without the bulk that has a file or a flag of its own."""
    manifest = dict(bundle.manifest)
    if not layers:
        manifest["stages"] = {
            name: {key: value for key, value in entry.items() if key != "layers"}
            for name, entry in manifest["stages"].items()
        }
    return manifest


if __name__ == "__main__":
    sys.exit(main())
