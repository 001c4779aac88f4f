"""From a matplotlib figure to an SVG that lives inside a page: text stays text, colours are the page's own.

Draw with the colours in COLOURS; each becomes the CSS variable of its name, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = tuple(f"series{number}" for number in range(1, 7))
_NAMES = ("ink", "muted", "grid", "surface", "candidate", "baseline", "good", "bad", "unsure", *SERIES)
COLOURS = {name: f"#0d0c{number:02x}" for number, name in enumerate(_NAMES)}  # unlike any colour that matplotlib chooses

SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 1,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.axisbelow": True,
}

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


def render(figure: Figure, key: str, title: str, description: str, tips: Mapping[str, Sequence[str]]) -> str:
    """The figure as an <svg> element, one CSS pixel to the point.

    `key` begins every id in it. `tips` holds, for the gid of a line with markers, what is said on hovering each of them.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": key}):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for gid, texts in tips.items():
        _add_tips(root, gid, texts)
    _prefix_ids(root, key)
    _label(root, key, title, description)
    for element in root.iter(f"{{{_SVG}}}text"):
        style = _without_font_family(element.get("style", ""))
        element.set("style", style if "fill:" in style else f"{style}; fill: #000000")  # what SVG says by default
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    text = ElementTree.tostring(root, encoding="unicode")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    stray = re.search(r"(?:fill|stroke): ?(#[0-9a-fA-F]{3,8})", text)
    if stray:
        raise ValueError(f"figure {key!r} must use the colours of the page, got {stray[1]}")
    return text


def _label(root, key: str, title: str, description: str) -> None:
    for name in ("width", "height"):
        root.set(name, root.get(name).removesuffix("pt"))
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    for name, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(f"{{{_SVG}}}{name}", {"id": f"{key}-{name}"})
        element.text = text
        root.insert(0, element)


def _prefix_ids(root, key: str) -> None:
    for element in root.iter():
        if element.get("id"):
            element.set("id", f"{key}-{element.get('id')}")
        for name, value in element.attrib.items():
            if "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{key}-"))
            elif name == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(name, f"#{key}-{value[1:]}")


def _add_tips(root, gid: str, texts: Sequence[str]) -> None:
    group = next(element for element in root.iter() if element.get("id") == gid)
    marks = list(group.iter(f"{{{_SVG}}}use"))
    if len(marks) != len(texts):
        raise ValueError(f"tips of {gid!r} must be one for each of {len(marks)} markers, got {len(texts)}")
    for mark, text in zip(marks, texts):
        ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = text


def _without_font_family(style: str) -> str:
    """matplotlib writes `font: 12px 'DejaVu Sans'; ...`: the size stays, the family is the page's."""
    return re.sub(r"font: ?(?:[a-z]+ )*([0-9.]+px)[^;]*", r"font-size: \1", style)
