"""The report of a sensitivity search: what each layer's precision costs the robot, and what was chosen."""

from __future__ import annotations

from pathlib import Path

from vla_edge.compress.mixed import Choice, Measured
from vla_edge.compress.sensitivity import Sensitivity
from vla_edge.evaluate.page import Page, subheading, table, two, write_json

FOOTER = (
    "One layer at a time is compressed and the chunk, after all flow steps and from the same noise, compared with full "
    "precision. Errors of layers are taken to be independent; the error of the whole was measured. No network needed."
)
MOST_BARS = 24


def write_sensitivity_report(
    found: Sensitivity, choice: Choice, measured: Measured, path: str | Path, name: str = "Policy"
) -> Path:
    """Writes `path` and the same as JSON beside it.

    Args:
        measured: of the whole choice.
    """
    options = list(next(iter(found.error_rad.values())))
    coarsest = options[0]
    ranked = sorted(found.error_rad, key=lambda layer: -found.error_rad[layer][coarsest])
    scale = 100 / found.motion_std_rad
    counts = {option: [layer for layer in ranked if choice.options[layer] == option] for option in options}
    whole = sum(found.weights.values())
    share = {option: sum(found.weights[layer] for layer in layers) / whole for option, layers in counts.items()}
    page = Page(f"{name}: sensitivity by layer", f"{len(ranked)} layers, {found.frames} observations")
    page.cards(
        [
            ("Bits per weight", f"{choice.average_bits:.2f}", "", "scales included"),
            ("Action error", f"{100 * measured.error_rel:.2f}", "%",
             f"of the motion; predicted {100 * choice.predicted_error_rel:.2f} %"),
            *([] if measured.ms is None else [
                ("Chunk", f"{measured.ms:.1f}", "ms",
                 f"{choice.predicted_ms:.1f} predicted, of which {found.rest_ms:.1f} are no layer's")]),
            *((option, str(len(layers)), "layers", f"{100 * share[option]:.0f} % of the weights")
              for option, layers in counts.items()),
        ]  # fmt: skip
    )
    bars = page.chart(
        "layers", "bars", f"Action error of each layer alone in {coarsest}", names=ranked[:MOST_BARS],
        values=[round(scale * found.error_rad[layer][coarsest], 4) for layer in ranked[:MOST_BARS]],
        marks=[round(scale * found.error_rad[layer][choice.options[layer]], 4) for layer in ranked[:MOST_BARS]],
        unit="% of the motion",
    )  # fmt: skip
    stages: dict[str, dict[str, float]] = {}
    for layer in ranked:
        row = stages.setdefault(layer.split(".")[0], dict.fromkeys(options, 0.0))
        for option in options:
            row[option] += found.error_rad[layer][option] ** 2
    by_stage = [(stage, *(f"{scale * row[option] ** 0.5:.2f}" for option in options)) for stage, row in stages.items()]
    page.section(
        "Where bits are needed",
        f"The {min(MOST_BARS, len(ranked))} most sensitive layers; the mark is the error in the precision that was "
        "chosen. By stage: all its layers together, % of the motion.",
        two(bars, subheading("By stage") + table(("Stage", *options), by_stage, numeric=range(1, len(options) + 1))),
    )
    rows = [
        (layer, choice.options[layer], found.weights[layer], *(f"{scale * errors[option]:.3f}" for option in options))
        for layer, errors in ((layer, found.error_rad[layer]) for layer in ranked)
    ]
    page.section(
        "Every layer",
        "Error of the chunk, % of the motion, when this layer alone has that precision.",
        table(("Layer", "Chosen", "Weights", *options), rows, numeric=range(2, len(options) + 3)),
    )
    write_json(
        Path(path).with_suffix(".json"),
        {"sensitivity": found.to_dict(), "choice": dict(choice.options), "average_bits": choice.average_bits,
         "predicted_error_rel": choice.predicted_error_rel, "measured_error_rel": measured.error_rel,
         "predicted_ms": choice.predicted_ms, "measured_ms": measured.ms},
    )  # fmt: skip
    return page.write(path, FOOTER)
