"""What can be done with an engine: inspect, profile, bench, serve; and backends."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from vla_edge.cli.common import manifest_of
from vla_edge.progress import Bar


def add(command) -> None:
    """Adds them; `command(name, run, summary)` gives a parser."""
    sub = command("inspect", _inspect, "check a bundle and tell what is in it")
    sub.add_argument("bundle", type=Path)
    sub.add_argument(
        "--layers", action="store_true", help="list what every linear layer got, and the kernels of TensorRT's plans"
    )

    sub = command("profile", _profile, "tell where an engine's time goes, and what holds it back on this computer")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--bag", type=Path, help="recording to take observations from; calibration/ beside the bundle")
    sub.add_argument("--repeats", type=int, default=100, help="inferences")
    sub.add_argument("--threads", type=int, help="at most this many for each stage")
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

    command("backends", _backends, "list the runtimes, and what each of them really computed on this computer")

    sub = command("serve", _serve, "serve an engine to other computers, in the protocol of openpi's clients")
    sub.add_argument("engine", type=Path, help="bundle, or a checkpoint for full precision")
    sub.add_argument("--host", default="127.0.0.1", help="interface to listen on; 0.0.0.0 for all of them")
    sub.add_argument("--port", type=int, default=8000)
    sub.add_argument("--api-key", help="what clients have to present")


def _inspect(options):
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.busy import caution

    bundle = Bundle.load(options.bundle)
    manifest, found = bundle.manifest, bundle.manifest["verification"]
    lines = [
        f"{manifest['name']}: {bundle.bytes / 1e6:.1f} MB, built {manifest['created']}, every hash is right",
        f"  policy      {bundle.spec.family}, {len(bundle.spec.joint_names)} joints, "
        f"{bundle.spec.chunk_size} points of {bundle.spec.dt:g} s, {_steps(bundle.spec)}",
        f"  cameras     {', '.join(f'{c.name} {c.source_width}x{c.source_height}' for c in bundle.spec.cameras)}",
        f"  recipe      {manifest['recipe']['name']}: {manifest['recipe']['description']}",
        f"  calibrated  on {manifest['calibration']['frames']} observations of {manifest['calibration']['source']}",
        f"  verified    on {found['frames']}: action error {1e3 * found['action_error_rad']:.2f} mrad, "
        f"{100 * found['action_error_rel']:.2f} % of the motion, cosine at least {found['cosine_min']:.5f}",
        *_cache_line(manifest),
        *_factor_lines(manifest.get("factored", {}), options.layers),
        *(f"  {words}" for words in filter(None, [caution(manifest)])),
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
            lines += _kernel_lines(bundle.directory / stage.file)
    return {"bundle": str(bundle.directory), "bytes": bundle.bytes, **manifest_of(bundle, True)}, 0, "\n".join(lines)


def _kernel_lines(file: Path) -> list[str]:
    """Of a plan of TensorRT: what runs, in order, and how long it took where the plan was built."""
    from vla_edge.engine.kernels import kernels_beside

    return [
        f"    {kernel.name[:60]:61}{'' if kernel.ms is None else f'{kernel.ms:.4f} ms':>11}  "
        f"{kernel.precision}  {kernel.kind}  {kernel.tactic}".rstrip()
        for kernel in kernels_beside(file)
    ]


def _steps(spec) -> str:
    asked = spec.evaluated_steps
    told = f", of which {', '.join(map(str, asked))} ask the network" if asked else ""
    cached = f"; pictures that change by at most {spec.vision_cache:g} are not looked at" if spec.vision_cache else ""
    if spec.diffusion is not None:
        return f"{spec.num_steps} {spec.diffusion.sampler} steps{cached}"
    return f"{spec.num_steps} flow steps{told}{cached}" if spec.num_steps > 1 else f"no flow{cached}"


def _cache_line(manifest) -> list[str]:
    if not manifest.get("cache", {}).get("bytes"):
        return []
    now, before = manifest["cache"]["bytes"], manifest["cache"]["full_precision_bytes"]
    line = f"  cache       {now / 1e3:.1f} kB from prefix to denoise"
    return [line if now == before else f"{line}, {before / 1e3:.1f} kB in full precision"]


def _factor_lines(factored: Mapping[str, Mapping], each: bool) -> list[str]:
    """What became of the convolutions that a recipe has factored; of every one of them where `each`."""
    if not factored:
        return []
    apart = sum(row["separate"] for row in factored.values())
    lines = [f"  factors     of {apart} of {len(factored)} convolutions in their place, the others as they were"]
    for name, row in factored.items() if each else ():
        told = "no ranks do it with fewer multiplications"
        if row["ranks"]:
            time = "not timed" if row["time"] is None else f"{row['time']:.2f} of the time"
            told = (
                f"{row['method']} {'+'.join(map(str, row['ranks']))}, {100 * row['energy']:.2f} % of the energy, "
                f"error {row['error']:.4f}, {row['multiplications']:.2f} of the multiplications, {time}"
            )
        lines.append(f"    {name:61}{'factors' if row['separate'] else 'whole':9}{told}")
    return lines


def _profile(options):
    from vla_edge.compress.calibrate import load_calibration
    from vla_edge.engine.bundle import Bundle
    from vla_edge.engine.kernels import kernels_of
    from vla_edge.engine.profile import profile_bundle
    from vla_edge.evaluate.profile_report import summary, write_profile_report

    bundle = Bundle.load(options.bundle)
    observations = load_calibration(options.bag or _recording_beside(bundle.directory), bundle.spec).held_out
    found = profile_bundle(bundle, observations, options.repeats, options.threads)
    name = bundle.manifest["name"]
    kernels = kernels_of(bundle)
    written = [str(write_profile_report(found, options.report, name, kernels))] if options.report else []
    return {**found.to_dict(), "reports": written}, 0, "\n".join([summary(found), *written])


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
