"""The report's style sheet: light, dark, phone and print."""

from __future__ import annotations

STYLE = """\
:root {
  --page: #ffffff; --card: #f6f7f9; --text: #1d2430; --soft: #5b6575; --line: #dde1e8; --bar: #2f6fdb; --base: #9aa3b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --card: #1d222a; --text: #e8ebf0; --soft: #a3adbb; --line: #333b47; --bar: #6ea3ff;
    --base: #6b7484;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.summary p { max-width: 44rem; font-size: 1.05rem; margin: 0 0 .75rem; }
.note { color: var(--soft); margin: 0 0 .9rem; max-width: 44rem; font-size: .92rem; }
.cards { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; }
.cards.wide { grid-template-columns: minmax(0, 1fr); }
.row { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(5.5rem, 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: .3rem; image-rendering: auto; }
figcaption { color: var(--soft); font-size: .8rem; margin-top: .25rem; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: minmax(4rem, max-content) minmax(0, 1fr) max-content; gap: .3rem .7rem;
  align-items: center; }
.bars h3 { grid-column: 1 / -1; margin: .8rem 0 .1rem; }
.bars .name { font-size: .88rem; overflow-wrap: anywhere; max-width: 11rem; }
.bars .track { background: var(--card); border-radius: .2rem; height: 1.05rem; }
.bars .bar { display: block; height: 100%; min-width: 1px; background: var(--bar); border-radius: .2rem; }
.bars .bar.base { background: var(--base); }
.bars .value { font-size: .88rem; font-variant-numeric: tabular-nums; text-align: right; }
.bars small { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; min-width: 50%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; text-align: right; }
td { white-space: nowrap; }
table.details th { color: var(--soft); font-weight: 400; white-space: nowrap; }
table.details td { white-space: normal; overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: .8rem; margin-top: 2.5rem; }
@media (max-width: 36rem) {
  .bars { grid-template-columns: minmax(0, 1fr) max-content; }
  .bars .name { grid-column: 1 / -1; max-width: none; margin-bottom: -.3rem; }
}
@media print {
  :root { --page: #fff; --card: #fff; --text: #000; --soft: #444; --line: #bbb; --bar: #2f6fdb; --base: #9aa3b2; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
  .cards { grid-template-columns: 1fr 1fr; }
  .cards.wide { grid-template-columns: 1fr; }
  .cards.wide figure img { max-width: 3.4cm; }
  article, tr, section.table { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
