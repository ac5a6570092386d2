"""Tables and bars as aligned text and as one HTML page, which needs neither network nor script."""

import html
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

BAR = 24  # characters of the longest


@dataclass(frozen=True)
class Table:
    """`rows` of cells: text, or a number from 0 to 1, which is a bar. The first column stands to the left, others to the right.

    `closing`: a line below.
    """

    title: str
    columns: list[str]
    rows: list[list[str | float]]
    closing: str = ""


def as_text(table: Table) -> str:
    cells = [table.columns, *([_bar(cell) if isinstance(cell, float) else cell for cell in row] for row in table.rows)]
    left = [number == 0 or any(isinstance(row[number], float) for row in table.rows) for number in range(len(table.columns))]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell + " " * (width - _width(cell)) if at_left else " " * (width - _width(cell)) + cell
                       for cell, width, at_left in zip(row, widths, left, strict=True)).rstrip() for row in cells]
    return "\n".join([table.title, *(f"  {line}" for line in lines), *([f"  {table.closing}"] if table.closing else [])])


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if eighths else "▏" * (share > 0)


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum((unicodedata.east_asian_width(letter) in "WF") + 1 for letter in text if not unicodedata.combining(letter))


def as_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    closing = f"<p>{html.escape(table.closing)}</p>" if table.closing else ""
    return f"<section><h2>{html.escape(table.title)}</h2><div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{closing}</section>"


def _cell(cell: str | float) -> str:
    return f'<td class="bar"><b style="width:{100 * cell:.1f}%"></b></td>' if isinstance(cell, float) else f"<td>{html.escape(cell)}</td>"


def page(title: str, body: Iterable[str]) -> str:
    """`body`: HTML that is escaped already."""
    title, head = html.escape(title), '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return "\n".join([f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>',
                      *body, "</main></body></html>\n"])


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2024; --faint: #80868d; --line: #e1e4e8; --box: #f3f4f6; --box2: #e3e6eb;
  --learnt: #cbeed2; --learnt2: #a6dcb2; --control: #7a3fb0; --bar: #5b8def; --error: #c62828; --warning: #9a6700; --note: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --text: #e4e7ea; --faint: #858c94; --line: #2d3238; --box: #22262b; --box2: #30363d;
  --learnt: #1b4f2b; --learnt2: #2a6f3f; --control: #cda4f5; --bar: #5b8def; --error: #ff7b72; --warning: #e3b341; --note: #9aa4ae; } }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
section > div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--faint); } th:first-child, td:first-child { text-align: left; padding-left: 0; }
h2::first-letter { text-transform: uppercase; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .facts th { vertical-align: top; }
td.bar { min-width: 14rem; } td.bar b { display: block; height: .8em; min-width: 1px; background: var(--bar); border-radius: 2px; }
.verdict { font-weight: 600; } .error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
ul.findings { list-style: none; padding: 0; } ul.findings > li { margin: 0 0 1rem; padding-left: .8rem; border-left: 3px solid currentColor; }
ul.findings p { margin: 0; color: var(--text); } ul.findings ul { list-style: none; padding: 0; margin: .2rem 0 0;
  color: var(--faint); font-family: ui-monospace, monospace; font-size: .87em; overflow-wrap: anywhere; }
figure { margin: 0 0 1.4rem; } figcaption { color: var(--faint); font-size: .87em; overflow-wrap: anywhere; }
figure p { margin: .25rem 0 0; padding: .6rem .7rem; border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "Noto Color Emoji", monospace; }
figure span, .legend span { background: var(--box); border-radius: 3px; padding: .12em 0; unicode-bidi: isolate; }
figure span.o { background: var(--box2); } span.s { background: var(--learnt) !important; } figure span.s.o { background: var(--learnt2) !important; }
span.c { color: var(--control); font-weight: 600; }
figure i { font-style: normal; color: var(--faint); opacity: .75; }
figure sup { unicode-bidi: isolate; font-size: .6em; color: var(--faint); margin: 0 .15em 0 .1em; }
.legend span { padding: .12em .4em; font-family: ui-monospace, monospace; font-size: .9em; }
"""
