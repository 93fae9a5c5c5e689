"""The profile of an engine, for people: where its time goes, how near the machine's ceilings, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vla_edge.engine.kernels import Kernel
from vla_edge.engine.profile import Profile
from vla_edge.evaluate.kernels_report import add_kernels
from vla_edge.evaluate.page import Page, table, write_json

FOOTER = (
    "Shares of the roofline compare the time taken with the least that this computer's measured speed of products and "
    "of reading memory allows. Times of single parts do not add up to the total's percentiles. No network needed."
)


def summary(profile: Profile) -> str:
    """A table for the terminal."""
    lines = [f"{'part':18}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'GFLOP/s':>10}{'GB/s':>8}{'of roofline':>13}  held back by"]
    for name, row in profile.parts.items():
        line = f"{name:18}{row['p50']:9.3f}{row['p95']:9.3f}{row['p99']:9.3f}"
        figures = profile.stages.get(name)
        if figures is not None:
            line += f"{figures.flops_per_s / 1e9:10.1f}{figures.bytes_per_s / 1e9:8.2f}"
            line += f"{100 * figures.of_roofline:11.0f} %  {figures.bottleneck}"
        lines.append(line)
    lines += [f"  {name:16}{row['p50']:9.3f}{row['p95']:9.3f}{row['p99']:9.3f}" for name, row in profile.host.items()]
    speeds = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {name}" for name, speed in profile.roofline.flops_per_s.items())
    lines.append(
        f"this computer: {speeds}, {profile.roofline.bytes_per_s / 1e9:.1f} GB/s; most memory "
        f"{profile.peak_bytes / 1e6:.0f} MB for a bundle of {profile.bundle_bytes / 1e6:.1f} MB"
    )
    lines.append(f"a chunk is held back by {profile.bottleneck}: {profile.lever}")
    return "\n".join(lines)


def write_profile_report(
    profile: Profile, path: str | Path, name: str, kernels: Mapping[str, Sequence[Kernel]] | None = None
) -> Path:
    """Writes `path` and the same as JSON beside it. `kernels`: stage -> those of its plan."""
    total = profile.parts["total"]
    page = Page(f"{name}: profile", f"{total['n']} inferences")
    page.cards(
        [
            ("Chunk", f"{total['p50']:.1f}", "ms", f"p95 {total['p95']:.1f}, p99 {total['p99']:.1f}"),
            ("Held back by", profile.bottleneck, "", profile.lever),
            ("Memory", f"{profile.peak_bytes / 1e6:.0f}", "MB", f"bundle {profile.bundle_bytes / 1e6:.1f} MB"),
        ]
    )
    names = [part for part in profile.parts if part != "total"]
    bars = page.chart(
        "parts", "bars", "Median time of each part", names=names,
        values=[profile.parts[part]["p50"] for part in names], marks=[profile.parts[part]["p95"] for part in names],
        unit="ms",
    )  # fmt: skip
    rows = [
        (part, *(row[p] for p in ("p50", "p95", "p99")), *_against(profile.stages.get(part)))
        for part, row in (*profile.parts.items(), *profile.host.items())
    ]
    columns = ("Part", "p50 ms", "p95 ms", "p99 ms", "GFLOP/s", "GB/s", "% of roofline", "Held back by")
    page.section("Where the time goes", "The mark is the 95th percentile.", bars)
    page.section("Every part", "", table(columns, rows, numeric=range(1, 7)))
    add_kernels(page, kernels or {})
    told = {stage: [asdict(kernel) for kernel in found] for stage, found in (kernels or {}).items()}
    write_json(Path(path).with_suffix(".json"), {**profile.to_dict(), "kernels": told})
    return page.write(path, FOOTER)


def _against(figures) -> tuple[str, str, str, str]:
    if figures is None:
        return "", "", "", ""
    return (
        f"{figures.flops_per_s / 1e9:.1f}", f"{figures.bytes_per_s / 1e9:.2f}", f"{100 * figures.of_roofline:.0f}",
        figures.bottleneck,
    )  # fmt: skip
