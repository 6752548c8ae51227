"""A report as a list of blocks, and its three forms: markdown, one HTML file with its figures inside, plain text.

A block is a pair: ("h1" or "h2", text), ("p", text), ("list", [text, ...]), ("table", (header, rows)) or
("figure", (name, caption)). Text may hold **bold** and `code`.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

Table = tuple[list[str], list[list[str]]]  # header, rows
Block = tuple[str, object]
EMPTY_CELLS = ("not measured", "diverged")

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --stripe: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a0a0a0; --line: #3a3a3a; --paper: #161616; --stripe: #1f1f1f; }
}
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; } p + p { margin-top: 0; }
code { font-size: .88em; background: var(--stripe); padding: .1em .25em; border-radius: 3px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { border-bottom-width: 2px; } tbody tr:nth-child(even) { background: var(--stripe); }
td { min-width: 5rem; } td:last-child:not(.right) { min-width: 14rem; }
.right { text-align: right; } td.right { min-width: 0; white-space: nowrap; }
figure { margin: 1.2rem 0; } figcaption { color: var(--soft); font-size: .85rem; max-width: 46rem; margin-top: .4rem; }
figure .scroll { margin: 0; border-radius: 6px; background: #fff; }
img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 0 auto; background: #fff; }
img.wide { max-width: none; min-width: 36rem; }
"""


def right_aligned(table: Table) -> list[bool]:
    """Which columns hold numbers: those in which nothing begins with a letter or has a word in it."""

    def is_number(cell: str) -> bool:
        return cell in EMPTY_CELLS or not (cell[:1].isalpha() or re.search("[A-Za-z]{2}", cell))

    header, rows = table
    return [all(is_number(row[i]) for row in rows) for i in range(len(header))]


# -----------------------------------------------------------------------------
# markdown and plain text


def markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    header, rows = table
    rule = ["---:" if right else "---" for right in right_aligned(table)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def plain(table: Table) -> str:
    header, rows = table
    widths, right = [max(map(len, column)) for column in zip(header, *rows)], right_aligned(table)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def to_markdown(blocks: Sequence[Block]) -> str:
    def block(kind: str, content) -> str:
        if kind == "table":
            return markdown(content)
        if kind == "figure":
            name, caption = content
            return f"![{caption}]({name}.png)\n\n{caption}"
        if kind == "list":
            return "\n".join(f"- {item}" for item in content)
        return {"h1": "# ", "h2": "## ", "p": ""}[kind] + content

    return "\n\n".join(block(kind, content) for kind, content in blocks) + "\n"


# -----------------------------------------------------------------------------
# HTML


def to_html(blocks: Sequence[Block], figures: Path) -> str:
    """One file that needs no other: the figures' SVG files, read from the folder `figures`, are inside as base64.

    As images, not as elements of the page: ids of one figure are those of another. Their card is light in the dark
    too, since their ink is dark; on a narrow screen wide figures are scrolled, like wide tables.
    """

    def table(header: list[str], rows: list[list[str]]) -> str:
        marks = [' class="right"' if right else "" for right in right_aligned((header, rows))]

        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}{m}>{inline(c)}</{tag}>" for c, m in zip(cells, marks)) + "</tr>"

        body = "\n".join(line(row, "td") for row in rows)
        return (
            f'<div class="scroll"><table>\n<thead>{line(header, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
        )

    def block(kind: str, content) -> str:
        if kind == "table":
            return table(*content)
        if kind == "figure":
            name, caption = content
            svg = (figures / f"{name}.svg").read_bytes()
            width, height = map(float, re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
            wide = ' class="wide"' if width > 500 else ""
            size = f'width="{width:.0f}" height="{height:.0f}"'
            source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
            alt = html.escape(caption)
            return (
                f'<figure><div class="scroll"><img{wide} alt="{alt}" {size} src="{source}"></div>\n'
                f"<figcaption>{alt}</figcaption></figure>"
            )
        if kind == "list":
            return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in content) + "\n</ul>"
        return f"<{kind}>{inline(content)}</{kind}>"

    title = next((html.escape(str(text).replace("`", "")) for kind, text in blocks if kind == "h1"), "Report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(block(kind, content) for kind, content in blocks)
        + "\n</body>\n</html>\n"
    )


def inline(text: str) -> str:
    """**bold** and `code` as HTML; everything else is escaped."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
