"""``cachectl inspect --html``: the page is whole, says what is there, fetches nothing, and looks right."""

from __future__ import annotations

import base64
import errno
import hashlib
import html.parser
import os
import struct
import zlib

import numpy as np
import pytest

import actcache
from actcache.admin import report as reporting
from actcache.admin.report import page as page_module
from actcache.admin.report.plots import Markup, Row, bars, element, histogram
from tests.cli.inspected import damage
from tests.cli.running import cachectl
from tests.support import key, make_store, recipe, segment_files
from tests.support.browser import CHROMIUM, Browser

HOSTILE = "<script>document.title='run'</script>\"'><img src=http://192.0.2.1/x.png onerror=alert(1)>&amp;\x1b[2J\x00"
#: Of the store: its collection, bytes, checksums, ages; of its spaces, lengths, norms, ages where several.
PLOTS = 4 + 3 + 2 + 3
LONG = "an-organization-of-note/" + "a-model-with-a-name-that-goes-on-" * 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four spaces: one of many lengths in three segments, one with a hostile name and a corrupt entry, one with a
    damaged segment, one empty."""
    url = tmp_path_factory.mktemp("page") / "store"
    rng = np.random.default_rng(1)
    with actcache.open(url) as opened:
        with opened.space(recipe(model=LONG, layer=6)) as space:
            for part in np.array_split(np.arange(90), 3):
                rows = [rng.normal(0, 1 + n % 3, (int(rng.integers(1, 120)), 8)).astype(np.float32) for n in part]
                space.put([key(n) for n in part], rows)
                space.flush()
        opened.space(recipe(layer=9)).close()
        opened.put_collection("corpus", [key(0)])
    damage(segment_files(make_store(url, range(20), model=HOSTILE))[0], 5)
    folder = make_store(url, range(20), layer=2, segments=2)
    damaged = segment_files(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    return url


@pytest.fixture(scope="module")
def page(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "report.html"
    result = cachectl("inspect", store, "--html", path)
    assert result.code == 4, result.err  # a segment is damaged
    assert str(path) in result.out
    return path


class Elements(html.parser.HTMLParser):
    """Every element with its attributes; fails where tags do not nest."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_says_what_is_there(store, page):
    text = page.read_text()
    elements = Elements(text)
    said = " ".join(elements.texts)
    names = recipe().fingerprint, recipe(model=LONG, layer=6).fingerprint
    assert names[1] in said
    for fact in (
        str(store),
        "corpus",
        "Bytes by space",
        "Checksums",
        "Age of segments",
        "Lengths",
        "Norms of a sample",
    ):
        assert fact in said
    assert "is damaged" in said
    assert "truncated" in said
    assert "1 entry fails its checksum" in said
    assert len([one for tag, one in elements.found if tag == "rect" and one["class"] == "bad"]) == 1
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    plots = [attributes for tag, attributes in elements.found if tag == "svg"]
    assert len(plots) == PLOTS
    for plot in plots:
        assert plot["role"] == "img"
        assert set(plot["aria-labelledby"].split()) <= set(ids)


def test_nothing_in_the_page_runs_or_is_fetched(page):
    text = page.read_text()
    elements = Elements(text)
    tags = {tag for tag, _ in elements.found}
    assert [tag for tag, _ in elements.found].count("script") == 1
    (policy,) = [one["content"] for tag, one in elements.found if one.get("http-equiv") == "Content-Security-Policy"]
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [word for word in ("innerHTML", "eval", "fetch", "XMLHttp", "import", "http") if word in script]
    assert not tags & {"img", "iframe", "object", "embed", "form", "base", "video"}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), attributes
    assert "url(" not in text
    assert "@import" not in text
    assert "onerror=alert(1)" in " ".join(elements.texts)  # it is text
    assert "\x1b" not in text
    assert "\x00" not in text


def test_markup_escapes_all_but_markup():
    made = element("a", {"href": '"><b>'}, "<i>", element("b", None, "&"), Markup("<u></u>"), "\ud800\x07")
    assert made == '<a href="&quot;&gt;&lt;b&gt;">&lt;i&gt;<b>&amp;</b><u></u>\N{REPLACEMENT CHARACTER}' + (
        "\N{REPLACEMENT CHARACTER}</a>"
    )


def test_a_file_that_stands_is_left_alone(store, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("mine")
    assert "stands already" in cachectl("inspect", store, "--html", path).refused(2)
    assert path.read_text() == "mine"
    dangling = tmp_path / "link.html"
    dangling.symlink_to(tmp_path / "nowhere")
    assert "stands already" in cachectl("inspect", store, "--html", dangling).refused(2)
    with actcache.open(store, "r") as opened:
        found = reporting.store_detail(opened, sample=0)
    with pytest.raises(actcache.errors.UsageError):
        reporting.write_page(found, path)


def test_a_page_is_whole_or_absent(store, tmp_path, monkeypatch):
    cachectl("inspect", store, "--html", tmp_path / "no-folder" / "report.html").refused(3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("actcache.io.files.FileOperations.sync_file", full)
    assert "free some space" in cachectl("inspect", store, "--html", tmp_path / "report.html").refused(3)
    assert list(tmp_path.iterdir()) == []


def test_a_page_where_there_are_no_links(store, tmp_path, monkeypatch):
    """As on most network shares: the file gets its name all the same, and never another's."""

    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("actcache.io.files.os.link", refused)
    assert cachectl("inspect", store, "--html", tmp_path / "report.html", "--sample", 0).code == 4
    assert (tmp_path / "report.html").read_text().endswith("</html>\n")
    assert len(list(tmp_path.iterdir())) == 1

    def made_meanwhile(found, *_):
        (tmp_path / "other.html").write_text("mine")
        return made(found)

    made = page_module.render_page
    monkeypatch.setattr(page_module, "render_page", made_meanwhile)
    assert "made meanwhile" in cachectl("inspect", store, "--html", tmp_path / "other.html").refused(2)
    assert (tmp_path / "other.html").read_text() == "mine"


def test_the_page_of_an_empty_store(tmp_path):
    actcache.open(tmp_path / "store").close()
    assert cachectl("inspect", tmp_path / "store", "--html", tmp_path / "r.html").code == 0
    assert "0 spaces" in (tmp_path / "r.html").read_text()


def test_plots_are_to_scale():
    """Bars of known numbers, as long as they should be."""
    counts = reporting.Histogram((0, 10, 20, 30), (1, 0, 4))
    rects = [a for tag, a in Elements(histogram(counts, str, str, "x")("t", "d")).found if tag == "rect"]
    heights = [float(rect["height"]) for rect in rects]
    assert heights[1] == 0
    assert heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    drawn = bars([Row("a", [("one", 3.0), ("two", 1.0)], "4"), Row("b", [("one", 2.0)], "2")])("t", "d")
    widths = {}
    for tag, attributes in Elements(drawn).found:
        if tag == "rect":
            widths.setdefault((attributes["class"], attributes["y"]), float(attributes["width"]))
    one, two = (sorted((w for (kind, _), w in widths.items() if kind == k), reverse=True) for k in ("one", "two"))
    assert one[0] == pytest.approx(1.5 * one[1], abs=0.2)
    assert one[0] == pytest.approx(3 * two[0], abs=0.2)


# --- in a browser -----------------------------------------------------------------------------------------------------

#: Boxes of plots and their texts; the page's own width.
MEASURE = """(() => {
  const box = one => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  return {
    plots: [...document.querySelectorAll('svg')].map(svg => ({
      box: box(svg),
      bars: [...svg.querySelectorAll('rect:not(.track)')].map(box),
      texts: [...svg.querySelectorAll('text')].map(one => [one.textContent, ...box(one)]),
    })),
    cards: [...document.querySelectorAll('figure')].map(box),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    scripts: document.scripts.length,
    title: document.title,
    images: document.images.length,
  };
})()"""
COLOURS = """(() => [...document.querySelectorAll('p, td, th, h1, h2, figcaption, svg text, a, li')].map(one => {
  let under = one;
  while (under && getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
  const style = getComputedStyle(one);
  return [one instanceof SVGElement ? style.fill : style.color, getComputedStyle(under).backgroundColor];
}))()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def resize(browser, width, colours="light"):
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colours}])


@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(browser, page, width):
    resize(browser, width)
    browser.open(page.as_uri())
    found = browser.evaluate(MEASURE)
    assert (found["scripts"], found["images"]) == (1, 0)
    assert found["title"].startswith("Activation cache ")
    assert found["overflow"] <= 0  # tables scroll, not the page
    assert len(found["plots"]) == PLOTS
    for plot in found["plots"]:
        left, top, right, bottom = plot["box"]
        assert right - left > 250
        assert bottom - top > 30
        for x0, y0, x1, y1 in plot["bars"]:
            assert left - 1 <= x0 <= x1 <= right + 1
            assert top - 1 <= y0 <= y1 <= bottom + 1
        for text, x0, y0, x1, y1 in plot["texts"]:
            assert x1 - x0 > 0, text
            assert left - 1 <= x0 <= x1 <= right + 1, text
            assert top - 1 <= y0 <= y1 <= bottom + 1, text
        for i, (text, x0, y0, x1, y1) in enumerate(plot["texts"]):
            for other, u0, v0, u1, v1 in plot["texts"][:i]:
                apart = x1 <= u0 or u1 <= x0 or y1 <= v0 + 3 or v1 <= y0 + 3  # boxes of lines have some air
                assert apart, (text, other)
    bars_drawn = [box for plot in found["plots"] for box in plot["bars"] if box[3] > box[1]]
    assert len(bars_drawn) > 20
    columns = {round(box[0]) for box in found["cards"]}
    assert len(columns) == (3 if width == 1200 else 1)
    asked = [told["request"]["url"] for method, told in browser.events if method == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert [event for event in browser.events if event[0] in loud] == []


def test_readers_who_do_not_see_the_plots(browser, page):
    resize(browser, 1200)
    browser.open(page.as_uri())
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]
    named = [node["name"]["value"] for node in images]
    assert len([name for name in named if len(name) > 20]) == PLOTS, named  # title and description


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_texts_stand_out(browser, page, colours):
    """WCAG 2.2, contrast (minimum): 4.5 to 1."""
    resize(browser, 1200, colours)
    browser.open(page.as_uri())
    pairs = {tuple(pair) for pair in browser.evaluate(COLOURS)}
    assert len(pairs) > 3
    for pair in pairs:
        low, high = sorted(luminance(colour) for colour in pair)
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
        assert (max(luminance(under) for _, under in pairs) > 0.5) == (colours == "light")


def luminance(colour):
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_plots_are_painted(browser, page):
    """What a screenshot shows of a plot is its bars, its texts and what is under them."""
    resize(browser, 1200)
    browser.open(page.as_uri())
    plots = browser.evaluate(MEASURE)["plots"]
    for plot in plots[:6]:
        left, top, right, bottom = plot["box"]
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top, "scale": 0.5}
        shot = browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        assert len(pixels(base64.b64decode(shot["data"]))) > 10


def pixels(png):
    """Return the colours of a PNG of 8 bits a channel (ISO/IEC 15948, filters in 9.2)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks.append((kind, png[at + 8 : at + 8 + length]))
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[0][1][:10])
    assert depth == 8
    size = {2: 3, 6: 4}[colour]
    data = zlib.decompress(b"".join(part for kind, part in chunks if kind == b"IDAT"))
    above, found = bytearray(width * size), set()
    for row in range(height):
        kind, *given = data[row * (width * size + 1) : (row + 1) * (width * size + 1)]
        line = bytearray(given)
        for i in range(len(line)):
            a, b, c = (line[i - size] if i >= size else 0), above[i], (above[i - size] if i >= size else 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            line[i] = (line[i] + (0, a, b, (a + b) // 2, paeth)[kind]) & 255
        found.update(bytes(line[i : i + size]) for i in range(0, len(line), size))
        above = line
    return found


# --- what is first, and what can be asked of it -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """A store of one model's layers, put in no order, of which one has half of the corpus, and one document is odd."""
    url = tmp_path_factory.mktemp("layers") / "store"
    rng = np.random.default_rng(1)
    with actcache.open(url) as opened:
        for layer in (10, 2, 7):
            with opened.space(recipe(model="one", layer=layer)) as space:
                for n in range(30 if layer != 7 else 15):
                    rows = rng.normal(0, layer * (50 if n == 13 else 1), (4 + n, 8)).astype(np.float32)
                    space.put([key(n)], [rows], [np.arange(4 + n, dtype=np.int32)])
        opened.put_collection("corpus", [key(n) for n in range(30)])
    path = url.parent / "report.html"
    assert cachectl("inspect", url, "--html", path).code == 0
    return path


def test_what_matters_comes_first(layers):
    said = Elements(layers.read_text()).texts
    titles = [text for text in said if text.startswith("one, layer ")]
    assert titles == ["one, layer 2, float32", "one, layer 7, float32", "one, layer 10, float32"]
    assert "15 of 30 (50 %)" in said
    assert said.count("30 of 30 (100 %)") == 2
    assert "nothing to show" not in " ".join(said)
    assert "By layer: one" in said
    assert said.index("Unusual documents") < said.index("Recipe")
    assert key(13).hex()[:12] in said
    drawn = [text for text in said if text.startswith("layer 10, float32: norms")]
    assert len(drawn) == 1


def test_it_says_how_to_see_the_share_of_a_corpus(layers, tmp_path):
    said = "no corpus is kept as a collection here"
    assert said not in " ".join(Elements(layers.read_text()).texts).lower()
    make_store(tmp_path / "store", range(3))
    assert cachectl("inspect", tmp_path / "store", "--html", tmp_path / "report.html").code == 0
    assert said in " ".join(Elements((tmp_path / "report.html").read_text()).texts).lower()


def test_tables_are_sorted_and_spaces_compared(browser, layers):
    browser.open(layers.as_uri())
    column = "[...document.querySelector('table.sorted').tBodies[0].rows].map(row => row.cells[%d].textContent)"
    click = "document.querySelectorAll('table.sorted th button')[%d].click()"
    assert browser.evaluate(column % 1) == ["2", "7", "10"]
    for number, wanted in ((1, ["2", "7", "10"]), (1, ["10", "7", "2"]), (4, ["15", "30", "30"])):
        browser.evaluate(click % number)
        assert browser.evaluate(column % number) == wanted
    differ = (
        "[...document.querySelectorAll('#compared tbody tr')].map(row => [...row.cells].map(one => one.textContent))"
    )
    assert browser.evaluate(differ) == [["layer", "2", "7"]]
    browser.evaluate("second.value = first.value; second.dispatchEvent(new Event('change'))")
    assert browser.evaluate(differ) == []


def test_unusual_documents_are_found_by_the_norms_of_all():
    """By NumPy alone: the entries whose mean norm is furthest from the median of all."""
    from actcache.admin.report.spaces import _outliers

    class Space:
        def get(self, keys):
            return [None for _ in keys]

    norms = np.array([*np.linspace(9, 11, 41), 30.0, 2.0, np.nan])
    found = _outliers(Space(), [key(n) for n in range(44)], [3] * 44, norms)
    assert [one.key for one in found] == [key(41), key(42)]
    middle = np.median(norms[:-1])
    assert found[0].off == pytest.approx((30 - middle) / np.median(np.abs(norms[:-1] - middle)))
    assert _outliers(Space(), [key(n) for n in range(5)], [3] * 5, norms[-5:]) == []
