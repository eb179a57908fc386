"""Static HTML pages of one file: no script, no network, every word escaped, pictures and drawings inside.

The reports of a data set, of `ldm init` and of `ldm compare` are made of these parts.
"""

import base64
import html
from collections.abc import Mapping, Sequence

import numpy as np

BINS = 32
CHART_WIDTH, CHART_HEIGHT = 320, 90
COLOURS = ("#4472b0", "#cc5533", "#44883c", "#8855aa", "#aa8822", "#227788", "#bb4477", "#555555")
Points = tuple[Sequence[float], Sequence[float]]


def render_page(title: str, body: str, *, about: str, lead: str = "", figure_width: str = "10rem") -> str:
    """Return a whole page: `title` as its heading, `about` behind it in the window's; `lead` and `body` are HTML."""
    return PAGE.format(
        title=html.escape(title), about=html.escape(about), lead=lead, body=body, figure_width=figure_width
    )


def sections(parts: Sequence[tuple[str, str]]) -> str:
    """Return the parts (title, HTML) that have something in them, each under its title."""
    return "\n".join(
        f"<section><h2>{html.escape(title)}</h2>{content}</section>" for title, content in parts if content
    )


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a table of text; without a head where all its words are empty."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head) if any(head) else ""
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in line) + "</tr>" for line in lines
    )
    return f"<table><tr>{cells}</tr>{rows}</table>"


def picture(png: bytes, alternative: str, size: str = "") -> str:
    """Return a PNG as a part of the page; `size` is an attribute such as "height='96'"."""
    data = base64.b64encode(png).decode()
    return f"<img alt='{html.escape(alternative)}' {size} src='data:image/png;base64,{data}'>"


def histogram(values: Sequence[float] | np.ndarray, title: str) -> str:
    """Return a drawing of the distribution of `values`, its range and median written below; nothing for none."""
    array = np.asarray(values, np.float64)
    if not array.size:
        return ""
    whole = bool((array == array.round()).all())
    distinct = int(np.ptp(array)) + 1 if whole else BINS
    counts, _ = np.histogram(array, bins=min(distinct, BINS))
    width, high = CHART_WIDTH / len(counts), CHART_HEIGHT - 4
    bars = "".join(
        f"<rect x='{place * width:.1f}' y='{CHART_HEIGHT - high * count / counts.max():.1f}' width='{max(1.0, width - 1):.1f}' "
        f"height='{high * count / counts.max():.1f}'/>"
        for place, count in enumerate(counts)
    )
    said = f"{array.min():.4g} to {array.max():.4g}, median {np.median(array):.4g}, {array.size} values"
    return _chart(bars, title, said)


def curves(lines: Mapping[str, Points], title: str, across: str) -> str:
    """Return a drawing of each line (x, y) in a colour of its own, finite points alone; nothing where there are none.

    Every line keeps its colour where another has no points: colours follow the order of `lines`.
    """
    finite: dict[str, np.ndarray] = {}
    for name, points in lines.items():
        both = np.asarray(points, np.float64).reshape(2, -1)
        finite[name] = both[:, np.isfinite(both).all(axis=0)]
    everything = np.concatenate(list(finite.values()), axis=1) if finite else np.empty((2, 0))
    if not everything.size:
        return ""
    low, high = everything.min(axis=1), everything.max(axis=1)
    span = np.where(high > low, high - low, 1.0)
    drawn = ""
    for number, both in enumerate(finite.values()):
        x, y = (both - low[:, None]) / span[:, None]
        corners = [
            (CHART_WIDTH * a, CHART_HEIGHT - (CHART_HEIGHT - 4) * b) for a, b in zip(x, y, strict=True)
        ]
        drawn += _line(corners, COLOURS[number % len(COLOURS)])
    said = f"{low[1]:.4g} to {high[1]:.4g}; {across} {low[0]:,.6g} to {high[0]:,.6g}"
    return _chart(drawn, title, said)


def _line(corners: Sequence[tuple[float, float]], colour: str) -> str:
    if len(corners) == 1:
        ((x, y),) = corners
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'/>"
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f"<polyline points='{points}' stroke='{colour}'/>" if points else ""


def legend(names: Sequence[str]) -> str:
    """Return the names with the colours that `curves` gives them."""
    marks = (
        f"<b style='color:{COLOURS[number % len(COLOURS)]}'>&#9644;</b> {html.escape(name)}"
        for number, name in enumerate(names)
    )
    return f"<p>{' &nbsp; '.join(marks)}</p>"


def _chart(drawing: str, title: str, said: str) -> str:
    name = html.escape(title)
    return (
        f"<figure class='chart'><svg viewBox='0 0 {CHART_WIDTH} {CHART_HEIGHT + 2}' role='img' aria-label='{name}'>{drawing}"
        f"</svg><figcaption><b>{name}</b><br>{html.escape(said)}</figcaption></figure>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}: {about}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: .5rem 0; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }}
figure {{ display: inline-block; vertical-align: top; margin: .5rem 1rem .5rem 0; }}
.chart {{ width: 20rem; }} .chart rect {{ fill: #4472b0; }}
.chart polyline {{ fill: none; stroke-width: 1.2; vector-effect: non-scaling-stroke; }}
.gallery figure {{ width: {figure_width}; }} img {{ image-rendering: pixelated; margin-right: .25rem; max-width: 100%; }}
figcaption {{ font-size: .85rem; overflow-wrap: anywhere; }}
code {{ background: #f2f2f2; padding: 0 .3rem; }}
</style></head><body><h1>{title}</h1>
{lead}
{body}
</body></html>
"""
