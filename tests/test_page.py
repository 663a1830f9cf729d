"""The page to send round: what it is given is text and nothing else, and a browser shows all of it on every medium."""

import base64
import contextlib
import html
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from simquant import plots
from simquant.page import Page, Picture, render
from simquant.tables import Table

VOID = {"meta", "img", "input"}
PLAIN = st.text(
    st.characters(exclude_categories=("Cc", "Cf", "Cs")), min_size=1, max_size=60
)  # all that has a shape of its own
ANY = st.text(st.characters(exclude_categories=()), max_size=60)
EMOJI, HEBREW = "\U0001f469\u200d\U0001f52c", "\u05e2\u05d1\u05e8\u05d9\u05ea"
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</style></title></pre><img src=/leak onerror=alert(1)>",
    "]]>",
    "-->",
    '\'" onload="alert(1)',
    "&lt;b&gt; &amp;amp; &#0;",
    "{0} {text} %s \\",
    f"{EMOJI} {HEBREW}",
    "url(/leak) @import '/leak';",
]
SAFE_LINKS = re.compile(r"#s\d+|data:image/svg\+xml;base64,[A-Za-z0-9+/]+=*")


class Parsed(HTMLParser):
    """A page's tags in their order, its attributes, and {tag: the texts inside elements of that tag}."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], {}, []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"{tag} closes itself")


def drawing(word="a title"):
    """Return a picture with a clip path, a marker and a title, which all figures of matplotlib name alike."""
    figure = Figure(figsize=(12, 8))
    axes = figure.add_subplot()
    axes.plot([0, 1, 2], [1, 0, 3], "o-")
    axes.set_title(word)
    return plots.svg_of(figure)


SVG = drawing()


def page_of(text, pictures=1, rows=2, columns=3):
    """Return a page that has text wherever one can be."""
    cells = [[f"{text}{row}{column}" for column in range(columns)] for row in range(rows)]
    table = Table(text, [text + str(n) for n in range(columns)], cells, 1, {0}, text)
    pairs = {text: text, text + " ": text}
    pictures = [Picture(text, SVG, text)] * pictures
    return Page(text, text, text, pairs, [table], pictures, pairs, [text, text], pairs)


def wide_page(rows=40):
    """Return a page with long and with wide tables, two pictures, long words and a long command."""
    names = ["format", "bits", *(f"figure {n}" for n in range(14)), "remark"]
    figures = [[f"format_{n}", *(f"{n * m / 7:.4f}" for m in range(15)), "a remark of some words"] for n in range(rows)]
    narrow = Table("Narrow", ["layer", "Δppl"], [["0", "+0.1"], ["1", "+0.2"]])
    long = "/a/path" * 30
    tables = [Table("Wide and long", names, figures, 1, {1}, "a note"), narrow, Table(long, ["path"], [[long]])]
    pictures = [Picture("One", SVG, "one"), Picture("Another", drawing("another"), "another")]
    command = f"python3 script.py --flag {long} {'--more of it ' * 20}"
    settings = {f"flag_{n}": long if n == 3 else str(n) for n in range(50)}
    return Page(
        "A page", "What was found. " * 10, command, settings, tables, pictures, settings, [long], {"model": long}
    )


@given(PLAIN)
@example("".join(HOSTILE).replace("\u200d", ""))
def test_what_a_page_is_given_is_text_at_its_place(text):
    texts = Parsed(render(page_of(text))).texts
    assert texts["title"] == texts["h1"] == [text]
    assert texts["pre"] == texts["p"][:1] == [text]
    assert texts["td"] == [f"{text}{row}{column}" for row in range(2) for column in (1, 2)]
    assert texts["th"] == [f"{text}{n}" for n in range(3)] + [f"{text}00\N{NO-BREAK SPACE}*", f"{text}10"]
    assert texts["h2"] == [text, text, "Notes", "Command", "Settings", "Environment"]
    assert texts["dd"] == [text] * 6 and texts["dt"] == [text, text + " "] * 3
    assert texts["li"] == [text] * 2 and texts["p"] == [text] * 2


@given(st.lists(st.sampled_from(HOSTILE) | ANY, min_size=1, max_size=4).map("".join).filter(len))
def test_no_text_changes_what_a_page_does(text):
    written = render(page_of(text))
    written.encode("utf-8")
    parsed, harmless = Parsed(written), Parsed(render(page_of("harmless")))
    tags, expected = ([tag for tag in each.tags if tag != "span"] for each in (parsed, harmless))  # words of a command
    assert tags == expected and "script" not in tags
    names = {(tag, name) for tag, name, _ in parsed.attributes}
    assert names - {(tag, name) for tag, name, _ in harmless.attributes} <= {
        ("div", "class"),
        ("th", "class"),
        ("td", "class"),
    }
    for _, name, value in parsed.attributes:
        assert name not in ("href", "src") or SAFE_LINKS.fullmatch(value)
        assert name != "style" or re.fullmatch(r"--em: [\d.]+", value)
        assert name != "class" or re.fullmatch(r"[a-z ]+", value)
    assert parsed.texts["style"] == harmless.texts["style"]
    assert not re.search(r"url\(|@import|https?:", parsed.texts["style"][0])


def test_what_has_no_shape_is_spelled_and_nothing_else():
    given_and_shown = {
        "\u202e\u2066\u200e": r"\u202e\u2066\u200e",  # they turn the writing direction of what follows
        "\ud800\x1b[1m\x00\r\xad": r"\ud800\x1b[1m\x00\r\xad",
        f"{EMOJI} {HEBREW} \u0646\u200c\u062e \\ \\n": f"{EMOJI} {HEBREW} \u0646\u200c\u062e \\ \\n",
    }
    for title, shown in given_and_shown.items():
        assert Parsed(render(page_of(title))).texts["h1"] == [shown]


def test_a_part_without_content_is_left_out():
    parsed = Parsed(render(Page("t", "l", "c", {})))
    assert parsed.texts["h2"] == ["Command"] and not {"table", "img", "nav", "dl", "ul"} & set(parsed.tags)
    assert Parsed(render(wide_page())).texts["a"] == Parsed(render(wide_page())).texts["h2"]


def test_the_pictures_are_those_that_were_given_and_their_letters_are_paths():
    images = [value for tag, name, value in Parsed(render(wide_page())).attributes if (tag, name) == ("img", "src")]
    assert [base64.b64decode(each.partition(",")[2]).decode() for each in images[:1]] == [SVG]
    assert SVG.count("<svg") == 1 and "<text" not in SVG and "<!-- a title -->" in SVG


def test_figures_stand_to_the_right_words_to_the_left_and_errors_close_to_their_figure():
    rows = [["a", "1.5", "0.1", "+2.1e-05", "99.5%", "4/2", "-", "keys"], ["b", "-", "-", "−3", "1%", "4", "nan", "4"]]
    parsed = Parsed(render(Page("t", "l", "c", {}, [Table("t", ["n", "x", "±", "d", "p", "w", "m", "part"], rows)])))
    classes = [value for tag, name, value in parsed.attributes if tag == "td" and name == "class"]
    assert classes == ["error", "text"] * 2


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ),
]


@pytest.fixture
def browser(tmp_path):
    """Return what runs headless Chromium, which reaches this machine alone, and gives what it prints."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: on Debian, apt-get install chromium")

    def run(*args):
        command = [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *map(str, args)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=tmp_path).stdout

    return run


@contextlib.contextmanager
def served(folder):
    """Serve a folder on the loopback inside the block; yield its address and a list of the paths asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


HARNESS = """<!DOCTYPE html><title>measuring</title><body>WIDTHS<script>
onload = () => {
  const measured = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, all = name => [...page.querySelectorAll(name)], root = page.documentElement
    const boxes = all(".box"), images = all("img")
    const sizes = {title: page.title, width: root.clientWidth, content: root.scrollWidth,
      boxes: boxes.map(each => [each.clientWidth, each.scrollWidth]), cells: all("td, th").map(each => each.innerText),
      images: images.map(each => [each.complete && each.naturalWidth, each.clientWidth]),
      outside: all("h1, h2, p, a, pre, dd, dt, li, .box, .picture").filter(each => {
        const at = each.getBoundingClientRect(); return at.left < -1 || at.right > root.clientWidth + 1
      }).map(each => each.outerHTML.slice(0, 80))}
    boxes.forEach(each => each.scrollLeft = 1e5)
    sizes.names = all("tbody th").map(each => each.getBoundingClientRect().left)
    all("input").forEach(each => each.click())
    sizes.enlarged = images.map(each => each.clientWidth)
    sizes.after = root.scrollWidth
    return sizes
  })
  const shown = document.createElement("pre")
  shown.id = "measured"
  shown.textContent = JSON.stringify(measured)
  document.body.append(shown)
}
</script>"""


def measured(browser, folder, page, widths):
    """Return what a browser measures of a page at these widths in pixels, and the paths that it asked for."""
    frames = "".join(f'<iframe src="page.html" style="border: 0" width={each} height=800></iframe>' for each in widths)
    (folder / "page.html").write_text(render(page), encoding="utf-8")
    (folder / "harness.html").write_text(HARNESS.replace("WIDTHS", frames), encoding="utf-8")
    with served(folder) as (address, asked):
        dom = browser("--dump-dom", f"{address}/harness.html")
    return json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1])), asked


def test_a_browser_shows_every_cell_of_a_page_from_the_disk(browser, tmp_path):
    page = wide_page()
    (tmp_path / "page.html").write_text(render(page), encoding="utf-8")
    texts = Parsed(browser("--dump-dom", (tmp_path / "page.html").as_uri())).texts
    assert texts["td"] == [cell for table in page.tables for row in table.rows for cell in row[1:]]
    assert texts["h2"][:5] == [each.caption for each in (*page.tables, *page.pictures)]


def test_a_page_fits_a_phone_a_tablet_and_a_screen(browser, tmp_path):
    sizes, asked = measured(browser, tmp_path, wide_page(), (320, 390, 768, 1280))
    assert {*asked} <= {"/harness.html", "/page.html", "/favicon.ico"}
    for width, each in zip((320, 390, 768, 1280), sizes, strict=True):
        assert width - 20 <= each["width"] <= width  # a bar to scroll by may take the rest
        assert each["content"] == each["after"] == each["width"] and each["outside"] == []
        assert each["boxes"][0][1] > each["boxes"][0][0]  # the wide table scrolls in its own box
        assert each["boxes"][1][1] == each["boxes"][1][0]  # the narrow one need not
        assert min(each["names"]) >= 0  # scrolled to its end, it still says what each row is
        assert all(loaded and 0 < shown <= each["width"] for loaded, shown in each["images"])
        is_phone = width < 700
        grown = [after > 1.5 * shown for after, (_, shown) in zip(each["enlarged"], each["images"], strict=True)]
        assert grown == [is_phone] * 2


def test_nothing_in_hostile_text_runs_or_asks_for_anything(browser, tmp_path):
    text = " ".join(HOSTILE)
    inside = "<script>fetch('/leak')</script><image href='/leak' width='9' height='9'/>"
    picture = Picture(text, f"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'>{inside}</svg>", text)
    page = replace(page_of(text), pictures=[picture])
    (each,), asked = measured(browser, tmp_path, page, (390,))
    assert {*asked} <= {"/harness.html", "/page.html", "/favicon.ico"}
    assert each["title"] == text and each["images"][0][0] == 9
    assert each["content"] == each["width"] and f"{text}11" in each["cells"]


@pytest.mark.parametrize(("rows", "pages"), [(2, {3, 4}), (40, {4, 5}), (400, range(7, 10))])
def test_a_page_is_printed_on_as_much_paper_as_it_needs(browser, tmp_path, rows, pages):
    (tmp_path / "page.html").write_text(render(wide_page(rows)), encoding="utf-8")
    browser(f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    printed = (tmp_path / "page.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) in pages
