"""A self-contained HTML page out of parts: cards, tables, charts. Nothing is loaded from anywhere when it is opened."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from vla_edge.evaluate.evaluation import plain
from vla_edge.evaluate.verdict import Verdict


class Page:
    """Collects the parts of one report, in reading order.

    Args:
        title, subtitle: plain text.
    """

    def __init__(self, title: str, subtitle: str):
        self._title, self._subtitle = title, subtitle
        self._body: list[str] = []
        self._charts: dict[str, object] = {}
        self._data: dict[str, object] = {}

    def verdict(self, verdict: Verdict) -> None:
        """The answer first: headline and one sentence for each limit."""
        items = []
        for check in verdict.checks:
            badge = "badge" if check.passed else "badge bad"
            items.append(
                f'<li><span class="{badge}">{"pass" if check.passed else "fail"}</span>'
                f"<span>{text(check.sentence)}</span></li>"
            )
        tone = "verdict" if verdict.passed else "verdict bad"
        self._body.append(
            f'<div class="{tone}" id="verdict"><strong class="headline">{text(verdict.headline)}</strong>'
            f'<ul class="checks">{"".join(items)}</ul></div>'
        )

    def cards(self, cards: Iterable[tuple[str, str, str, str]]) -> None:
        """Key figures as (label, value, unit, detail)."""
        items = (
            f'<div class="card"><div class="label">{text(label)}</div><div class="value">{text(value)}'
            f'<small>{text(unit)}</small></div><div class="detail">{text(detail)}</div></div>'
            for label, value, unit, detail in cards
        )
        self._body.append(f'<div class="cards">{"".join(items)}</div>')

    def section(self, heading: str, note: str, *parts: str) -> None:
        """A titled block; `note` says how to read it, `parts` are HTML of this module's functions."""
        self._body.append(
            f'<section><h2>{text(heading)}</h2><p class="note">{text(note)}</p>{"".join(parts)}</section>'
        )

    def chart(self, name: str, kind: str, label: str, **content) -> str:
        """A place for a chart drawn in the page (kind "lines", "bars", "scatter" or "histogram"), with its data."""
        self._charts[name] = plain({"kind": kind, "label": label, **content})
        return f'<div class="chart" data-chart="{text(name)}"></div>'

    def data(self, name: str, value: object) -> None:
        """Data for the page's script."""
        self._data[name] = plain(value)

    def write(self, path: str | Path, footer: str) -> Path:
        """Writes the page, whole or not at all."""
        data = json.dumps({"charts": self._charts, **self._data}, separators=(",", ":"), allow_nan=False)
        filled = {
            "title": text(self._title),
            "subtitle": text(self._subtitle),
            "body": "\n".join(self._body),
            "footer": text(footer),
            # "</script>" inside a string would end the element early.
            "data": data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
        }
        page = files("vla_edge.evaluate").joinpath("report.html").read_text(encoding="utf-8")
        # In one go, so that what is filled in is never taken for a placeholder.
        pieces = page.split("{{")
        out = [pieces[0]]
        for piece in pieces[1:]:
            name, rest = piece.split("}}", 1)
            out += [filled[name], rest]
        return write_text(path, "".join(out))


def text(value: object) -> str:
    """Plain text -> HTML."""
    return html.escape(str(value), quote=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> str:
    """An HTML table; `numeric` are the columns set right."""

    def cell(tag: str, index: int, value: object) -> str:
        return f"<{tag}{' class=n' if index in numeric else ''}>{text(value)}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(columns))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def two(left: str, right: str) -> str:
    """Two parts beside each other where the window is wide enough."""
    return f'<div class="two"><div>{left}</div><div>{right}</div></div>'


def subheading(title: str) -> str:
    """A heading inside a section."""
    return f"<h3>{text(title)}</h3>"


def legend(entries: Mapping[str, str], dashed: Sequence[str] = ()) -> str:
    """Name -> colour variable of the template."""
    items = (
        f'<span><i class="{"dashed" if name in dashed else ""}" style="border-color:var(--{color})"></i>'
        f"{text(name)}</span>"
        for name, color in entries.items()
    )
    return f'<div class="legend">{"".join(items)}</div>'


def folded(summary: str, inside: str) -> str:
    """Detail that opens on request."""
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def mrad(value: float) -> str:
    """rad -> text in mrad, three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    milli = 1e3 * value
    return f"{milli:.0f}" if abs(milli) >= 100 else f"{milli:.1f}" if abs(milli) >= 1 else f"{milli:.2f}"


def scaled(value: float, factor: float) -> float | None:
    """For charts: times `factor`, rounded; None where it is not known."""
    return round(value * factor, 4) if math.isfinite(value) else None


def data_uri(content: bytes, mime: str) -> str:
    """A file inside the page."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def write_text(path: str | Path, content: str) -> Path:
    """Writes a file and renames it into place, so that nobody ever reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
    return path


def write_json(path: str | Path, value: object) -> Path:
    """Writes strict JSON (no NaN), indented for people."""
    return write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
