"""What an engine is worth: evaluate on recordings, closed-loop in simulation; and convert a recording."""

from __future__ import annotations

from pathlib import Path

from vla_edge.cli.common import FAILED, UsageError
from vla_edge.progress import Bar


def add(command) -> None:
    """Adds them; `command(name, run, summary)` gives a parser."""
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

    sub = command("closed-loop", _closed_loop, "let an engine act in a simulated world and count successes")
    sub.add_argument("engine", type=Path, help="bundle, or a checkpoint for full precision")
    sub.add_argument("--episodes", type=int, default=100)
    sub.add_argument("--first-seed", type=int, default=100_000, help="seeds count up from here, below 1,000,000")
    sub.add_argument("--world", default="tabletop", help="tabletop, or metaworld where it is installed")
    sub.add_argument("--tier", help="difficulty, or tasks of Meta-World; the world's first when left out")
    sub.add_argument("--shuffled", action="store_true", help="give the instruction of another goal of the scene")
    sub.add_argument("--delay", type=float, default=0.1, help="s from an observation to its chunk")
    sub.add_argument("--rate", type=float, default=5.0, help="observations per second")
    sub.add_argument("--inference", default="asynchronous", help="inference policy, see doc/serving.md")
    sub.add_argument("--workers", type=int, default=1, help="processes")
    sub.add_argument("--stop-at", type=float, help="end once it is certain on which side of this the success rate is")
    sub.add_argument("--against", type=Path, help="another engine on the same seeds; end once --margin is decided")
    sub.add_argument("--margin", type=float, default=0.01, help="of success rate the engine may lose to --against")
    sub.add_argument("--report", type=Path, help="HTML file to write, with a JSON file beside it")

    sub = command("convert", _convert, "turn a recording into a LeRobot dataset, for fine-tuning")
    sub.add_argument("bag", type=Path, help="rosbag2 directory or file, or ROS 1 bag")
    sub.add_argument("output", type=Path, help="dataset directory to write; must not exist")
    sub.add_argument("--fps", type=float, required=True, help="steps per second; for a policy, 1 over its dt")
    sub.add_argument("--cameras", nargs="+", help="all of the recording's otherwise")
    sub.add_argument("--joints", nargs="+", help="all of the recording's otherwise")
    sub.add_argument("--png", action="store_true", help="keep pictures without loss instead of as video")
    sub.add_argument("--robot-type", default="", help="as LeRobot calls the robot")
    sub.add_argument("--contract", type=Path, help="YAML file naming the bag's topics where they differ")


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
            world=options.world,
        )
    finally:
        bar.close()
    name = options.engine.resolve().name
    written = [str(p) for p in write_closed_loop_report(result, options.report, name)] if options.report else []
    interval = result.success_interval
    text = (
        f"{result.successes} of {result.n} episodes succeeded ({100 * result.success_rate:.1f} %, 95 % interval "
        f"{100 * interval.low:.1f} to {100 * interval.high:.1f})"
    )
    if result.choice:
        text += f"; the wrong object was touched first in {result.wrong_first}"
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
            options.margin, workers=options.workers, world=options.world, tier=options.tier, delay_s=options.delay,
            rate_hz=options.rate, inference=options.inference,
            progress=lambda pairs, won: bar(pairs / options.episodes, f"{won} of {pairs} pairs succeeded"),
        )  # fmt: skip
    finally:
        bar.close()
    told = {"first": run.first.summary(), "second": run.second.summary(), "test": run.test, "holds": run.holds}
    return told, FAILED if run.holds is False else 0, run.one_line()


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
