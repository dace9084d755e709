"""A self-contained HTML page: its style, its script, no request to anywhere; light and dark, wide and narrow."""

from __future__ import annotations

from html import escape

STYLE = """
/* color-scheme: scroll bars and form controls are the browser's, which has to know */
:root { color-scheme: light;
  --ground: #fcfcfb; --card: #ffffff; --ink: #1d2126; --soft: #5d6670; --line: #dfe2e5; --head: #f3f4f5;
  --accent: #0b62a3; --good: #1b7a4b; --bad: #b3401c; --mark: #fff3c9; --paper: #ffffff; --shade: rgb(0 0 0 / .13); }
:root[data-theme=dark] { color-scheme: dark;
  --ground: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa4ae; --line: #31373d;
  --head: #22272c; --accent: #6bb6f0; --good: #6fcf9b; --bad: #f0936f; --mark: #4a3f16; --paper: #191919;
  --shade: rgb(0 0 0 / .65); }
:root[data-theme=dark] figure svg { filter: invert(.9) hue-rotate(180deg); }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.4rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 0 1rem 6rem; }
nav { position: sticky; top: 0; z-index: 5; background: var(--ground); border-bottom: 1px solid var(--line); }
nav div { max-width: 76rem; margin: 0 auto; padding: .55rem 1rem; display: flex; gap: .8rem; align-items: center; }
nav span { display: flex; gap: .8rem; overflow-x: auto; white-space: nowrap; scrollbar-width: none; flex: 1;
  mask-image: linear-gradient(90deg, #000 94%, transparent); }
nav a { color: var(--soft); text-decoration: none; font-size: 13.5px; }
nav a:hover { color: var(--accent); }
nav strong { margin-right: .4rem; }
button { font: inherit; font-size: 13px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .2rem .6rem; cursor: pointer; }
nav button { flex: none; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1.6rem 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; color: var(--soft); font-weight: 600; }
p { margin: .4rem 0; max-width: 64rem; overflow-wrap: anywhere; }
.soft, .notes p { color: var(--soft); font-size: 13.5px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
/* A shadow on the right for as long as there is more to see: the first layer moves with the table and covers it. */
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .7rem 0;
  background: linear-gradient(270deg, var(--card) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(270deg, var(--shade), transparent) right / 1.1rem 100% no-repeat scroll var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .34rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
thead th, thead th:first-child { background: var(--head); font-weight: 600; }
th[data-sort] { cursor: pointer; user-select: none; }
th[data-sort]:after { content: "\\2195"; color: var(--soft); opacity: .6; margin-left: .25rem; }
th[aria-sort=ascending]:after { content: "\\2191"; color: var(--accent); opacity: 1; }
th[aria-sort=descending]:after { content: "\\2193"; color: var(--accent); opacity: 1; }
td small { color: var(--soft); }
td.best { background: var(--mark); font-weight: 650; }
td.best small { font-weight: 400; }
td[data-p] { cursor: help; }
td[data-p]:hover, td[data-p]:focus { outline: 2px solid var(--accent); outline-offset: -2px; }
th.word, td.word { text-align: left; }
tr.reference td { color: var(--soft); }
.tall { max-height: 31rem; overflow: auto; }
.tall thead th { position: sticky; top: 0; z-index: 1; } .tall thead th:first-child { z-index: 2; }
.published { border-style: dashed; }
figure { margin: .8rem 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 56rem; margin: 0 auto; }
figcaption { color: var(--soft); font-size: 13px; padding: .3rem .4rem 0; }
.better { color: var(--good); } .worse { color: var(--bad); }
#origin { position: fixed; left: 0; right: 0; bottom: 0; max-height: 46vh; overflow: auto; background: var(--card);
  border-top: 2px solid var(--accent); padding: .7rem 1rem 1rem; font-size: 13px; display: none; z-index: 9;
  box-shadow: 0 -6px 24px rgb(0 0 0 / .18); }
#origin.open { display: block; }
#origin pre { margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.5 ui-monospace, Menlo, monospace; }
#origin button { float: right; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 600px) {
  body { font-size: 14.5px; } th, td { padding: .3rem .45rem; } table { font-size: 13px; }
  h1 { font-size: 1.35rem; } figure { padding: .3rem; overflow-x: auto; } figure svg { min-width: 34rem; }
  th:first-child, td:first-child { min-width: 7.2rem; max-width: 9.5rem; white-space: normal; }
}
@media print { nav, #origin { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
const root = document.documentElement, origins = JSON.parse(document.getElementById('origins').textContent);
const dark = matchMedia('(prefers-color-scheme: dark)');
const paint = (on) => { root.dataset.theme = on ? 'dark' : 'light'; };
paint(dark.matches); dark.addEventListener('change', (event) => paint(event.matches));
const toggle = document.getElementById('theme');
if (toggle) toggle.onclick = () => paint(root.dataset.theme !== 'dark');
for (const head of document.querySelectorAll('th[data-sort]')) {
  head.tabIndex = 0;
  const sort = () => {
    const index = [...head.parentNode.children].indexOf(head), body = head.closest('table').tBodies[0];
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = (row) => row.children[index].dataset.v ?? row.children[index].textContent.trim();
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b), p = parseFloat(x), q = parseFloat(y);
      if (Number.isNaN(p) !== Number.isNaN(q)) return Number.isNaN(p) ? 1 : -1;
      const order = Number.isNaN(p) ? x.localeCompare(y) : p - q;
      return down ? -order : order;
    });
    body.append(...rows);
  };
  head.onclick = sort;
  head.onkeydown = (event) => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); sort(); } };
}
const panel = document.getElementById('origin'), text = panel.querySelector('pre');
const show = (cell) => {
  const parts = cell.dataset.p ? cell.dataset.p.split(' ').map((key) => origins[key] || key) : [];
  text.textContent = [cell.dataset.about, ...parts].filter(Boolean).join('\\n\\n');
  panel.classList.add('open');
};
for (const cell of document.querySelectorAll('td[data-p]')) {
  cell.tabIndex = 0; cell.title = cell.dataset.about || ''; cell.onclick = () => show(cell);
  cell.onkeydown = (event) => { if (event.key === 'Enter') show(cell); };
}
panel.querySelector('button').onclick = () => panel.classList.remove('open');
document.addEventListener('keydown', (event) => { if (event.key === 'Escape') panel.classList.remove('open'); });
"""


def page(title: str, body: str, origins: str = "{}", nav: str = "") -> str:
    """A whole document; `origins` is the JSON that cells refer to, `nav` the links of the bar on top."""
    data = origins.replace("<", "\\u003c")  # no text in it may end the script element
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; img-src data:\">",
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f'<nav><div><strong>SparseForge</strong><span>{nav}</span><button id="theme">theme</button></div></nav>',
            f"<main>{body}</main>",
            '<aside id="origin" aria-live="polite"><button>close</button><strong>Where this number comes from</strong>'
            "<pre></pre></aside>",
            f'<script type="application/json" id="origins">{data}</script>',
            f"<script>{SCRIPT}</script></body></html>",
            "",
        ]
    )
