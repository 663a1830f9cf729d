"""A page to send round: one HTML file of tables and pictures for a screen, a phone and paper, which needs no network.

It knows nothing of runs. All that it is given is text and is shown as text, but for the pictures: each is an image of
its own, in which no script runs, which loads nothing and whose ids meet those of no other.
"""

from __future__ import annotations

import re
import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from simquant.tables import Table

NUMBER = re.compile(r"([-+−±~\d.,/% ]|e[-+]\d|nan|inf)*")  # what a column of figures has in its cells
JOINERS = "\n\t\u200c\u200d"  # without a shape, but what they join has one: lines, words, letters, emoji
LONG = 32  # a cell of more letters may be broken into lines
CONTENTS_FROM = 7  # so many headings want a table of contents
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Picture:
    """An SVG document under a caption; alt says what it shows to those who do not see it."""

    caption: str
    svg: str
    alt: str


@dataclass(frozen=True)
class Page:
    """All that a page shows, in its order: what was found, and below that what it was found by.

    lead   a sentence or a few
    facts  what a reader wants to know first, few words each; they stand below the lead
    """

    title: str
    lead: str
    command: str
    settings: Mapping[str, str]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def shown(text: str) -> str:
    """Return HTML that shows text and does nothing else.

    What has no shape, is no letter, or turns the writing direction is spelled as in a Python string.
    """
    hidden = (c not in JOINERS and unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text)
    spelled = (ascii(c)[1:-1] if is_hidden else c for c, is_hidden in zip(text, hidden, strict=True))
    return escape("".join(spelled))


def element(tag: str, content: str, **attributes: str) -> str:
    """Return an element around content, which is HTML; attributes are text, and left out where empty.

    An underscore in the name of an attribute stands for -, and one at its end for nothing.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    given = "".join(f' {names[name]}="{shown(value)}"' for name, value in attributes.items() if value)
    return f"<{tag}{given}>{content}</{tag}>"


def width_of(text: str) -> float:
    """Return about how many em a text is wide, rather too many than too few."""
    return sum(0.62 if c < "\u0250" else 1.0 for c in text[:LONG])


def look_of(heading: str, cells: Iterable[str]) -> str:
    """Return the class of a column: figures stand to the right, text to the left, an error close to its figure."""
    if heading.startswith("±"):
        return "error"
    return "" if all(NUMBER.fullmatch(cell) for cell in cells) else "text"


def table_row(row: Sequence[str], looks: Sequence[str], is_marked: bool) -> str:
    """Return the HTML of a row whose columns have these classes."""
    classes = [f"{look} long".strip() if len(cell) > LONG else look for cell, look in zip(row, looks, strict=True)]
    (name, look), *others = zip(map(shown, row), classes, strict=True)
    star = element("span", "\N{NO-BREAK SPACE}*", class_="star") * is_marked
    figures = "".join(element("td", cell, class_=each) for cell, each in others)
    return element("tr", element("th", name + star, scope="row", class_=look) + figures, class_="marked" * is_marked)


def table_of(table: Table) -> str:
    """Return the HTML of a table, which scrolls sideways in a box of its own where it is too wide."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    looks = [look_of(heading, cells) for heading, *cells in columns]
    em = sum(1.6 + max(map(width_of, column)) for column in columns)
    heads = (
        element("th", shown(heading), scope="col", class_=look)
        for heading, look in zip(table.headings, looks, strict=True)
    )
    rows = (table_row(row, looks, number in table.marked) for number, row in enumerate(table.rows))
    parts = element("thead", element("tr", "".join(heads))) + element("tbody", "".join(rows))
    whole = element("table", parts, style=f"--em: {em:.1f}")
    box = element("div", whole, class_="box", role="region", tabindex="0", aria_label=table.caption)
    return box + (element("p", shown(table.note), class_="note") if table.note else "")


def picture_of(picture: Picture) -> str:
    """Return the HTML of a picture, which a tap enlarges on a phone."""
    source = "data:image/svg+xml;base64," + b64encode(picture.svg.encode("utf-8", "backslashreplace")).decode()
    image = f'<img src="{source}" alt="{shown(picture.alt)}">'
    return element("div", element("label", f'<input type="checkbox" aria-label="enlarge">{image}'), class_="picture")


def pairs_of(pairs: Mapping[str, str], classes: str) -> str:
    """Return the HTML of a list of names and what each of them is; "" if there are none."""
    words = (
        element("div", element("dt", shown(name)) + element("dd", shown(text)), class_="wide" * (len(text) > 2 * LONG))
        for name, text in pairs.items()
    )
    return element("dl", "".join(words), class_=classes) if pairs else ""


def command_of(command: str) -> str:
    """Return the HTML of a command; a word of it goes to the next line as a whole, where a line has room for it."""
    words = (element("span", shown(word)) for word in command.split(" "))
    return element("pre", element("code", " ".join(words)))


def sections(page: Page) -> list[tuple[str, str]]:
    """Return (heading, HTML) of each section, findings first."""
    notes = "".join(element("li", shown(note)) for note in page.notes)
    return [
        *((table.caption, table_of(table)) for table in page.tables),
        *((picture.caption, picture_of(picture)) for picture in page.pictures),
        *[("Notes", element("ul", notes, class_="notes"))] * bool(notes),
        ("Command", command_of(page.command)),
        *[("Settings", pairs_of(page.settings, "settings"))] * bool(page.settings),
        *[("Environment", pairs_of(page.environment, "settings"))] * bool(page.environment),
    ]


def render(page: Page) -> str:
    """Return the page as an HTML document that utf-8 can encode, whatever it was given."""
    found = sections(page)
    links = "".join(element("a", shown(heading), href=f"#s{n}") for n, (heading, _) in enumerate(found))
    contents = element("nav", links, aria_label="Contents") if len(found) >= CONTENTS_FROM else ""
    intro = element("h1", shown(page.title)) + element("p", shown(page.lead), class_="lead")
    header = element("header", intro + pairs_of(page.facts, "facts") + contents)
    parts = (
        element("section", element("h2", shown(heading)) + content, id=f"s{number}")
        for number, (heading, content) in enumerate(found)
    )
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown(page.title)}</title>
<style>
{style}</style>
</head>
<body>
{header}
<main>
{chr(10).join(parts)}
</main>
</body>
</html>
"""
