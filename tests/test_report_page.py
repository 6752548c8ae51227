"""report.html: one file that opens offline, on a phone and in the dark."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

from scripts.report import __main__ as report
from scripts.report.evidence import read_evidence
from scripts.report.render import inline, to_html
from tests.report_runs import add_sections, make_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Its elements with their attributes and text; closing tags must match, ids must differ."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        parent = self.open[-1] if self.open else None
        assert {"tr": ("thead", "tbody"), "td": ("tr",), "th": ("tr",), "thead": ("table",), "tbody": ("table",)}.get(
            tag, (parent,)
        ).count(parent)
        assert parent != "p" or tag in ("code", "strong")  # any other would end the paragraph
        assert len(attrs) == len(dict(attrs))
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_one_file_for_phones_and_the_dark(runs, monkeypatch):
    add_sections(runs)
    folder = make_report(monkeypatch)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "prefers-color-scheme: dark" in text and text.startswith("<!doctype html>")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    assert not page.of("script") and not page.of("link") and not page.of("iframe") and "@import" not in text
    outside = [a for _, attributes in page.elements for a in attributes if a in ("href", "srcset", "style", "data")]
    assert not outside and not re.findall(r"url\(", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    figures = page.of("img")
    assert len(page.of("figure")) == len(figures) == len(list(folder.glob("*.svg"))) == 5
    for figure in figures:
        head, _, data = figure["src"].partition(",")
        svg = base64.b64decode(data, validate=True).decode()
        assert head == "data:image/svg+xml;base64" and figure["alt"]
        assert ET.fromstring(svg).tag.endswith("svg")
        links = re.findall(r"""(?:href|src)=["']([^"']*)""", svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(link.startswith("#") for link in links)  # nothing from elsewhere
    blocks = report.report_blocks(read_evidence(runs.parent, "tiny"), set())
    tables = [[header, *rows] for kind, (header, rows) in (b for b in blocks if b[0] == "table")]
    bare = lambda cell: cell.replace("`", "").replace("**", "")
    assert page.tables == [[[bare(cell) for cell in row] for row in table] for table in tables]
    assert len(page.tables) >= 10 and all(len({len(row) for row in table}) == 1 for table in page.tables)
    assert text.count('<div class="scroll">') == len(tables) + len(figures)  # wide ones scroll, not the page


def test_text_is_escaped_in_the_page(tmp_path):
    assert inline("a < b & **c `d`**") == "a &lt; b &amp; <strong>c <code>d</code></strong>"
    page = to_html([("h1", "A `title`"), ("list", ["<one>"]), ("table", (["x"], [["<script>"]]))], tmp_path)
    assert "<title>A title</title>" in page and "<li>&lt;one&gt;</li>" in page and "<script" not in page
