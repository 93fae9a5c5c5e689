"""What comes before an engine, and what makes one: build, export, plan, sensitivity, compare, merge, distill, draft."""

from __future__ import annotations

from pathlib import Path

from vla_edge.cli.common import FAILED, UsageError, manifest_of
from vla_edge.progress import Bar


def add(command) -> None:
    """Adds them; `command(name, run, summary)` gives a parser."""
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
    sub.add_argument(
        "--build-memory-mb", type=float,
        help="that the build may take, what is free when left out; a policy that does not fit is built piece by piece",
    )  # fmt: skip

    sub = command(
        "export", _export, "compress an OpenVLA for runtimes of language models: a Hugging Face directory and vision.onnx"
    )
    sub.add_argument("checkpoint", type=Path, help="directory of an OpenVLA")
    sub.add_argument("output", type=Path, help="directory to write")
    sub.add_argument("--layout", default="edge_llm", help="of the layers: edge_llm, modelopt, compressed_tensors or awq")
    sub.add_argument("--recipe", default="int4-edge-llm", help="name of a shipped recipe, or a YAML file")
    sub.add_argument("--calibration", type=Path, help="as of build")
    sub.add_argument("--demonstrations", type=Path, nargs="+", default=[], help="as of build")
    sub.add_argument("--build-memory-mb", type=float, help="as of build")

    sub = command("plan", _plan, "predict time, rates and memory of an engine on a device, before anything is built")
    sub.add_argument("policy", help="checkpoint directory, or a published architecture such as pi0.5 or openvla-7b")
    sub.add_argument("--recipe", default="int8", help="name of a shipped recipe, a YAML file, or a bundle built by one")
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
    sub.add_argument("--drafter", help="block, as vla-edge draft trains it, or history, which costs nothing")
    sub.add_argument("--acceptance", type=float, help="share of proposed tokens that are accepted")
    sub.add_argument("--iterations", type=int, help="passes until a fixed point")
    sub.add_argument("--group-size", type=int, help="of 4-bit weights, instead of the recipe's")
    sub.add_argument("--target-hz", type=float, help="list what reaches this many chunks per second")
    sub.add_argument("--all", action="store_true", help="with --target-hz, list what does not reach it too")
    sub.add_argument("--calibrate", action="store_true", help="measure this computer again")

    sub = command("sensitivity", _sensitivity, "find which layers need their bits, and write the recipe of a budget")
    sub.add_argument("checkpoint", type=Path, help="directory in LeRobot's layout")
    budget = sub.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=float, help="most bits per weight on average, scales included")
    budget.add_argument("--error", type=float, help="most action error, as a share of the motion's standard deviation")
    budget.add_argument("--ms", type=float, help="most milliseconds of a chunk on this machine")
    sub.add_argument("--calibration", type=Path, help="recording; calibration/ beside the checkpoint")
    sub.add_argument("--frames", type=int, default=16, help="observations the error is measured on")
    sub.add_argument("--output", type=Path, default=Path("mixed.yaml"), help="recipe to write, its report beside it")

    sub = command(
        "compare", _compare, "build several recipes and set them side by side, in radians, successes, MB and ms"
    )
    sub.add_argument("checkpoint", type=Path, help="directory in LeRobot's layout")
    sub.add_argument(
        "--recipes", nargs="+", default=["int8", "int4-gptq", "int4-awq", "int4-rtn"], help="names or files"
    )
    sub.add_argument("--episodes", type=int, default=0, help="of the simulated world for each engine; 0 for none")
    sub.add_argument("--first-seed", type=int, default=300_000, help="seeds count up from here, below 1,000,000")
    sub.add_argument("--world", default="tabletop", help="they act in: tabletop, or metaworld where installed")
    sub.add_argument("--tier", help="difficulty of the episodes; hard at the tabletop, the world's first otherwise")
    sub.add_argument("--workers", type=int, default=1, help="processes")
    sub.add_argument("--calibration", type=Path, help="recording; calibration/ beside the checkpoint")
    sub.add_argument(
        "--demonstrations", type=Path, nargs="+", default=[], help="recordings that recipes with training train on"
    )
    sub.add_argument("--report", type=Path, default=Path("compare.html"), help="page to write, JSON beside it")

    sub = command("merge", _merge, "merge a LoRA, DoRA or QLoRA adapter (peft's) into a checkpoint, giving a new one")
    sub.add_argument("base", type=Path, help="checkpoint the adapter was trained on, in LeRobot's layout")
    sub.add_argument("adapter", type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    sub.add_argument("output", type=Path, help="checkpoint directory to write; must not exist")
    sub.add_argument(
        "--nf4-base", action="store_true", help="round adapted layers to NF4 first, as QLoRA trained the adapter"
    )

    sub = command("distill", _distill, "make a smaller policy that does what a teacher does, giving a checkpoint")
    sub.add_argument("teacher", type=Path, help="checkpoint directory of a SmolVLA or an OpenVLA")
    sub.add_argument("output", type=Path, help="checkpoint directory to write; must not exist")
    sub.add_argument("--size", type=float, default=0.5, help="share of the teacher's parameters it may have")
    sub.add_argument("--demonstrations", type=Path, nargs="+", required=True, help="recordings to train on")
    sub.add_argument("--joints", nargs="+", default=[], help="names or patterns of those it moves; else all")
    sub.add_argument("--instructions", nargs="+", default=[], help="patterns of those it follows; else all")
    sub.add_argument("--steps", type=int, default=2500, help="of training")
    sub.add_argument("--batch", type=int, default=32, help="frames of each step")
    sub.add_argument("--rate", type=float, default=1e-3, help="learning rate at its peak")

    sub = command("draft", _draft, "train what proposes action tokens for speculative decoding, into a checkpoint")
    sub.add_argument("checkpoint", type=Path, help="directory of an OpenVLA; a file is added to it")
    sub.add_argument("--demonstrations", type=Path, nargs="+", required=True, help="recordings to train on")
    sub.add_argument("--kind", default="block", help="block, or medusa for a head for each token ahead")
    sub.add_argument("--width", type=int, default=256, help="of a block's layers")
    sub.add_argument("--layers", type=int, default=1, help="of a block, or of each head before its last")
    sub.add_argument("--steps", type=int, default=2000, help="of training")
    sub.add_argument("--batch", type=int, default=64, help="frames of each step")
    sub.add_argument("--rate", type=float, default=1e-3, help="learning rate at its peak")
    sub.add_argument("--frames", type=int, default=4000, help="of the recordings, at most")
    sub.add_argument("--force", action="store_true", help="in the place of a draft that is there")


def _build(options):
    from vla_edge.engine.build import build
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.busy import caution

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
            build_memory_mb=options.build_memory_mb,
        )
    finally:
        progress.close()
    bundle = Bundle.load(path)
    found, profile = bundle.manifest["verification"], bundle.manifest["profile"]
    text = (
        f"{path}: {bundle.bytes / 1e6:.1f} MB, {bundle.description()['precision']}, "
        f"action error {100 * found['action_error_rel']:.2f} % of the motion over {found['frames']} observations, "
        + (f"{profile['total']['p50']:.1f} ms a chunk here" if profile else f"verified by {found['by']}, not timed here")
    )
    text = "\n".join(filter(None, [text, caution(bundle.manifest)]))
    return {"bundle": str(path), "bytes": bundle.bytes, **manifest_of(bundle, layers=False)}, 0, text


def _build_to(options):
    from vla_edge.engine.build_to import build_to, report_path
    from vla_edge.engine.busy import caution
    from vla_edge.engine.manifest import read_manifest
    from vla_edge.engine.target import MOST_ERROR, Target
    from vla_edge.evaluate.target_report import summary, to_json

    for name in ("recipe", "compute_capability", "build_memory_mb"):
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
    lines = [summary(outcome)]
    if path is not None:
        lines += [f"{path}: {report_path(path)} tells how", caution(read_manifest(path))]
    text = "\n".join(filter(None, lines))
    return {**to_json(outcome), "bundle": path and str(path)}, 0 if outcome.reached else FAILED, text


def _export(options):
    from vla_edge.engine.handover import LANGUAGE, hand_over

    bar = Bar()
    try:
        made = hand_over(
            options.checkpoint, options.output, options.layout, options.recipe, options.calibration, bar,
            options.demonstrations, options.build_memory_mb,
        )  # fmt: skip
    finally:
        bar.close()
    found = made.facts["verification"]
    text = (
        f"{made.directory}: {made.bytes / 1e6:.1f} MB; {LANGUAGE}/ in the layout {options.layout}, vision.onnx; action error "
        f"{100 * found['action_error_rel']:.2f} % of the motion over {found['frames']} observations, by {found['by']}"
    )
    return {"directory": str(made.directory), "bytes": made.bytes, **made.facts}, 0, text


def _plan(options):
    from vla_edge.engine.devices import load_device
    from vla_edge.engine.engine_plan import policy_shapes, recipe_of
    from vla_edge.engine.plan import predict
    from vla_edge.engine.plan_report import plan_dict, plan_text, search_dict, search_text
    from vla_edge.engine.plan_search import candidates
    from vla_edge.engine.precision import asked_of_workload
    from vla_edge.engine.workload import Workload

    architecture, recipe, bar = policy_shapes(options.policy), recipe_of(options.recipe), Bar()
    try:
        device = load_device(options.device, options.calibrate, bar)
    finally:
        bar.close()
    asked = dict(
        cameras=options.cameras, steps=options.flow_steps, chunk=options.chunk, prompt_tokens=options.prompt_tokens,
        keep_vision=options.keep_vision, kv=options.kv, decoding=options.decoding, draft=options.draft, drafter=options.drafter,
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


def _compare(options):
    from vla_edge.engine.build import build
    from vla_edge.evaluate.comparison import compare_engines
    from vla_edge.evaluate.comparison_report import summary, to_json, write_comparison_report
    from vla_edge.sim.worlds import world

    # of the tabletop the tier where full precision, too, fails now and then: there losses show
    tier = world(options.world).tier(options.tier or ("hard" if options.world == "tabletop" else None))
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
        comparison = compare_engines(
            options.checkpoint, bundles, seeds, tier, options.workers, store, bar, options.world
        )
    finally:
        bar.close()
    written = [str(path) for path in write_comparison_report(comparison, options.report)]
    return {**to_json(comparison), "reports": written}, 0, "\n".join([summary(comparison), *written])


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


def _draft(options):
    from dataclasses import asdict

    from vla_edge.learn.draft import train_draft

    bar = Bar()
    try:
        made = train_draft(
            options.checkpoint, options.demonstrations, options.kind, options.width, options.layers, options.steps,
            options.batch, options.rate, options.frames, force=options.force, progress=bar,
        )  # fmt: skip
    finally:
        bar.close()
    text = (
        f"{made.file}: {made.parameters:,} parameters, trained on {made.frames} frames; {made.passes:.2f} passes a chunk in "
        f"the place of {made.plain_passes}, {made.tokens_per_pass:.2f} tokens a pass, on {made.compared} frames of others"
    )
    return {**asdict(made), "file": str(made.file)}, 0, text
