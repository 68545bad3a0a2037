"""What every page has: one file without scripts, fonts or pictures from elsewhere, wide or narrow, light or dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# What is said first of where something ran
FACTS = ("device", "device_name", "world_size", "threads", "torch", "python", "commit", "dirty")
STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#d5dae1;--card:#f6f7f9;--base:#7a8594;
--new:#1d63d8;--good:#13713c;--bad:#b3261e;--unsure:#8a5a00;--c1:#c2410c;--c2:#0f766e;--c3:#a21caf;--c4:#8a5a00;
--c5:#64748b}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e7eaee;--soft:#a0a9b5;--line:#363d47;--card:#1c2026;
--base:#98a3b1;--new:#6ea8ff;--good:#5fce8c;--bad:#ff8b82;--unsure:#e6b450;--c1:#fb923c;--c2:#2dd4bf;--c3:#e879f9;
--c4:#e6b450;--c5:#a0aec0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:16px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .25rem}
p{margin:.4rem 0}.soft,figcaption{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.unsure{color:var(--unsure)}.good,.bad,.unsure{font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.number,th.number{text-align:right;white-space:nowrap}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px 14px;margin:12px 0}
figure{margin:.5rem 0}figcaption{font-size:.87rem}svg{display:block;width:calc(100% - 72px);margin:8px 0 0 72px;
overflow:visible}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}.axis{stroke:var(--line)}.dot-base{fill:var(--base)}
.dot-new{fill:var(--new)}.sample{opacity:.28}.median{stroke-width:2.5}.median-base{stroke:var(--base)}
.median-new{stroke:var(--new)}svg svg{width:100%;margin:0}
.c0{--color:var(--new)}.c1{--color:var(--c1)}.c2{--color:var(--c2)}.c3{--color:var(--c3)}.c4{--color:var(--c4)}
.c5{--color:var(--c5)}.course{fill:none;stroke:var(--color);stroke-width:1.8;stroke-linejoin:round;
vector-effect:non-scaling-stroke}.band{fill:var(--color);opacity:.22}.dot{fill:var(--color)}.column{fill:transparent}
.column:hover{fill:var(--ink);opacity:.12}.key{white-space:nowrap;margin-left:.8em}
.key::before{content:"";display:inline-block;width:1em;height:.25em;margin-right:.4em;vertical-align:middle;
background:var(--color)}.step{stroke:var(--bad);stroke-dasharray:4 3}
.bars{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr max-content;gap:3px 10px;align-items:center}
.bars b{font-weight:400;overflow-wrap:anywhere}.bars span{text-align:right;font-variant-numeric:tabular-nums}
.bars i{display:block;height:12px;min-width:1px;background:var(--new);opacity:.75;border-radius:2px}
@media(max-width:640px){.bars{font-size:.87rem;grid-template-columns:minmax(4rem,max-content) 1fr max-content}}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 28px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:12px;margin-top:8px}
.pictures img{max-width:100%;display:block;border-radius:4px}.pictures figure{margin:0}
summary{cursor:pointer;color:var(--soft)}code{overflow-wrap:anywhere}
@media(max-width:640px){thead{display:none}tr{display:block;padding:6px 0;border-bottom:1px solid var(--line)}
td,td.number{display:flex;gap:10px;border:0;padding:1px 0;text-align:left;white-space:normal}
td::before{content:attr(data-label);color:var(--soft);flex:0 0 7em}}
"""


def document(title: str, body: str, style: str = "") -> str:
    """The page; body: HTML. style: CSS further to the one that all pages have."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int, last: int = 1) -> str:
    """`rows` are HTML already. The first `words` columns and the `last` ones are text, the others numbers."""

    kinds = [' class="number"' if words <= n < len(header) - last else "" for n in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds))
    body = "".join(
        "<tr>"
        + "".join(f'<td{kind} data-label="{escape(n)}">{cell}</td>' for cell, n, kind in zip(cells, header, kinds))
        + "</tr>\n"
        for cells in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def environments(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """Name of a side -> what `benchmark.environment.describe` said, as a table with a column for each side."""
    names = dict.fromkeys([*FACTS, *(name for about in sides.values() for name in about)])
    rows = [
        [escape(name), *(f"<code>{escape(_fact(about.get(name)))}</code>" for about in sides.values())]
        for name in names
    ]
    return table(["", *sides], rows, len(sides) + 1)


def _fact(value: Any) -> str:
    return ", ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else str(value)
