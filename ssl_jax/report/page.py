# SPDX-License-Identifier: Apache-2.0
"""The page of a report: its parts in order, and its style."""

import importlib.metadata
import string
import time
from collections.abc import Sequence

from ssl_jax.report import parts, runs, scores

PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title><style>$style</style></head>
<body><main>$body</main></body></html>
""")
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f5f7f9;--ink:#1c2733;--soft:#5a6672;--line:#dfe4e9;
--c0:#0b6fb8;--c1:#d1495b;--c2:#2e933c;--c3:#8d5fb0;--c4:#c07d00;--c5:#5d6770}
@media(prefers-color-scheme:dark){:root{--bg:#12171c;--card:#1b222a;--ink:#e3e9ef;--soft:#9aa7b3;
--line:#2e3842;--c0:#5ab0ee;--c1:#f0808f;--c2:#6cc77a;--c3:#bd97df;--c4:#efb94f;--c5:#a3afba}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:38px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:18px 0 6px;overflow-wrap:anywhere}
p{margin:6px 0}
.note,.last,figcaption,.sub{color:var(--soft);font-size:13.5px;overflow-wrap:anywhere}
.missing{border-left:3px solid var(--c4);padding-left:10px;margin:12px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:18px 0}
.cards div{background:var(--card);border-radius:8px;padding:10px 14px}
.cards b{display:block;font-size:18px;font-weight:600}.cards span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
.charts figure{background:var(--card);border-radius:8px;padding:10px 12px}
figure{margin:0;min-width:0}figure h3{margin:0 0 4px}figcaption{padding-top:3px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:18px}
.pictures img{width:100%;height:auto;display:block;background:#fff;border-radius:6px}
svg{display:block;width:100%;height:auto}svg text{font-size:11.5px;fill:var(--soft)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}
path.c0{stroke:var(--c0)}path.c1{stroke:var(--c1)}path.c2{stroke:var(--c2)}
path.c3{stroke:var(--c3)}path.c4{stroke:var(--c4)}path.c5{stroke:var(--c5)}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}
circle.c3{fill:var(--c3)}circle.c4{fill:var(--c4)}circle.c5{fill:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--soft)}
.legend span{display:flex;align-items:center;gap:5px;overflow-wrap:anywhere;min-width:0}
.key{width:22px;height:8px;flex:none}
.scroll{overflow-x:auto;margin:4px 0}
table{border-collapse:collapse;font-size:14px}
td,th{text-align:left;padding:4px 16px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td:first-child{white-space:nowrap}details td:first-child{white-space:normal}
tr.own{font-weight:600}tr.base{color:var(--soft)}
.facts td:first-child{color:var(--soft);white-space:nowrap}.facts td{overflow-wrap:anywhere}
details td{overflow-wrap:anywhere}
.facts td:nth-child(2):not(:last-child),.facts td:nth-child(n+3){min-width:190px}
tr.own td,tr.base td{white-space:nowrap}
details{margin:8px 0}summary{cursor:pointer;color:var(--soft);font-size:14px}
.bar{display:flex;height:14px;border-radius:7px;overflow:hidden;margin:8px 0 6px;
background:var(--line)}.bar i{display:block}
.b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}
.b3{background:var(--c3)}.b4{background:var(--c4)}.b5{background:var(--c5)}
.pair{display:flex;flex-wrap:wrap;gap:10px 60px}.pair .scroll{min-width:0}
pre{background:var(--card);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:13px;
line-height:1.6}
"""


def page(found: Sequence[runs.Run]) -> str:
    """HTML of the report on a run, or of a comparison of several."""
    several = len(found) > 1
    title = f'{len(found)} runs: {", ".join(run.name for run in found)}' if several else ''
    title = title or f'{found[0].field("name") or found[0].name}: {found[0].name}'
    order = [
        ('What differs', parts.differences) if several else None,
        ('What was trained', parts.facts),
        ('Curves', parts.curves),
        ('Pictures', parts.pictures),
        ('Evaluations', scores.scores),
        ('What went wrong', parts.health),
        ('Time', parts.time),
        ('How to use it', parts.use),
        ('Settings', parts.settings),
    ]
    version = importlib.metadata.version('ssl_jax')
    written = f'ssl_jax {version}, {time.strftime("%Y-%m-%d %H:%M %Z")}'
    body = [f'<h1>{parts.esc(title)}</h1><p class="sub">Written by {parts.esc(written)}</p>']
    if not several:
        body.append(_part(parts.cards, found[0]))
    missing = [(run.name, text) for run in found for text in run.missing]
    lines = (f'{name}: {text}' if several else text for name, text in missing)
    if missing:
        body.append(f'<div class="missing">{"".join(map(parts.note, lines))}</div>')
    for heading, make in filter(None, order):
        body.append(f'<section><h2>{heading}</h2>{_part(make, found)}</section>')
    return PAGE.substitute(title=parts.esc(title), style=STYLE, body=''.join(body))


def _part(make, argument):
    """A part of the page; files of another version, or damaged ones, cost only their part."""
    try:
        return make(argument)
    except Exception as error:
        return parts.note(f'This part could not be made ({type(error).__name__}: {error}).')
