"""The report's parts: one HTML file that needs nothing else."""

import html

STYLE = """
:root{--ink:#1f2933;--quiet:#5f6b78;--line:#e4e8ec;--paper:#fff;--back:#f5f7f9;--accent:#2463a6;
--good:#1f7a5a;--bad:#b23a35}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);line-height:1.5;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.25;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:19px;margin:40px 0 10px}
p{margin:0 0 12px;max-width:75ch}
.quiet,figcaption{color:var(--quiet);font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px;margin:26px 0}
.tile,figure,.box{background:var(--paper);border:1px solid var(--line);border-radius:10px}
.tile{padding:16px 18px}
.tile b{display:block;font-size:30px;line-height:1.15;letter-spacing:-.02em;font-weight:650}
.tile b small{font-size:15px;font-weight:500;color:var(--quiet);letter-spacing:0}
.tile span{display:block;color:var(--quiet);font-size:13.5px;margin-top:5px}
.tile .name{margin:0 0 4px;color:var(--accent);font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:14px}
figure{margin:0 0 14px;padding:14px 16px 12px}
.pair figure{margin:0}
figure svg{display:block;width:100%;height:auto}
figcaption{margin-top:6px}
.box{padding:4px 0;overflow-x:auto;margin-bottom:12px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--quiet);font-weight:600;font-size:12.5px;white-space:normal;vertical-align:bottom}
tr:last-child td{border-bottom:0}
td.text,th.text{text-align:left}td.wrap{white-space:normal;min-width:18em}
tr.best td{background:#eef5fc;font-weight:600}
tr.part td{background:var(--back);font-weight:600;color:var(--quiet);text-align:left}
.note{border-left:3px solid #f2c14e;background:#fffaf0;padding:10px 14px;border-radius:4px;
margin:14px 0;font-size:14.5px}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
pre{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:12px 14px;
overflow-x:auto;margin:0 0 12px;white-space:pre-wrap;overflow-wrap:anywhere}
.up{color:var(--good)}.down{color:var(--bad)}
footer{margin-top:44px;padding-top:14px;border-top:1px solid var(--line)}
@media print{body{background:#fff}main{padding:0}.tile,figure,.box{break-inside:avoid}}
"""


def text(value):
    return html.escape(str(value))


def tile(name, figure, unit="", below=""):
    return (f'<div class="tile"><span class="name">{text(name)}</span><b>{text(figure)} '
            f'<small>{text(unit)}</small></b><span>{text(below)}</span></div>')


def tiles(*each):
    return f'<div class="tiles">{"".join(each)}</div>'


def figure(svg, caption, title):
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{text(title)}" ', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def pair(*figures):
    return f'<div class="pair">{"".join(figures)}</div>'


def note(words):
    return f'<div class="note">{words}</div>'


def table(head, rows, left=(0,), best=(), wrap=()):
    """Cells are text, or ("html", …). `left`: columns of words; `best`: rows to stand out."""
    def cell(kind, column, value):
        names = [n for n, columns in (("text", left), ("wrap", wrap)) if column in columns]
        body = value[1] if isinstance(value, tuple) else text(value)
        return f'<{kind} class="{" ".join(names)}">{body}</{kind}>'
    lines = ["<tr>" + "".join(cell("th", i, h) for i, h in enumerate(head)) + "</tr>"]
    for number, row in enumerate(rows):
        if len(row) == 1:  # a heading between rows
            lines.append(f'<tr class="part"><td colspan="{len(head)}">{text(row[0])}</td></tr>')
            continue
        lines.append(f'<tr{" class=best" if number in best else ""}>' +
                     "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>")
    return f'<div class="box"><table>{"".join(lines)}</table></div>'


def number(value, digits=1):
    return "–" if value is None else f"{value:,.{digits}f}"


def environment(rows):
    """Each run's place and versions; equal ones once."""
    groups = {}
    for row in rows:
        if row.get("valid") is None:
            continue
        key = tuple(row.get(k) for k in ("host", "cpu", "usable_cores", "backend", "drover",
                                         "commit"))
        groups.setdefault(key, []).append(row)
    lines = []
    for (host, cpu, cores, backend, version, commit), of in groups.items():
        times = sorted(str(r.get("time")) for r in of)
        lines.append([str(len(of)), host, cpu, cores, backend, version, str(commit)[:12],
                      f"{times[0]} to {times[-1]}"])
    out = table(["runs", "host", "processor", "cores of rank 0", "backend", "drover", "commit", "when"], lines,
                left=range(1, 8))
    if len({(line[5], line[6]) for line in lines}) > 1:
        out = note("These runs were not all made by the same build of drover.") + out
    return out


def page(title, under, body, command, when):
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{text(title)}</title><style>{STYLE}</style></head>
<body><main><h1>{text(title)}</h1><p class="quiet">{under}</p>
{body}
<h2>Made by</h2><pre>{text(command)}</pre>
<footer class="quiet">drover study, {text(when)}. Not a submitted MLPerf result: “Result not verified by
MLCommons Association”.</footer>
</main></body></html>
"""
