"""How the morning report looks, beside what every page of ours has."""

from __future__ import annotations

from typing import Final

from fseft_edge.report import range_bar

STYLE: Final = (
    """\
:root { --warn: #8a5a00; --bad: #a3211b; --good: #2c6a3a; }
@media (prefers-color-scheme: dark) { :root { --warn: #e5b454; --bad: #ff9287; --good: #8fcf9d; } }
body { max-width: 84rem; }
a { color: inherit; }
.soft, .source { color: var(--soft); font-size: .88rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.2rem 0 1rem; }
.figure dd { margin: 0; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figure dd a { text-decoration: none; }
.figure dt { color: var(--soft); font-size: .88rem; }
.figure.none dd { color: var(--soft); }
.figure.failed dd { color: var(--bad); font-weight: 600; }
.figure.look dd { color: var(--warn); font-weight: 600; }
.index { list-style: none; margin: .5rem 0 1.4rem; padding: 0; }
.index li { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem 1.1rem; padding: .3rem 0;
  border-bottom: 1px solid var(--line); }
.index a:first-child, h3 { font-variant-numeric: tabular-nums; }
.index .source { margin: 0; }
.case { border-left: 3px solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0 1.8rem; }
.case.failed { border-color: var(--bad); display: grid; grid-template-columns: 16rem minmax(0, 1fr); margin: .9rem 0; }
.case.look { border-color: var(--warn); }
.case:not(.failed) { content-visibility: auto; contain-intrinsic-size: auto 22rem; }
.case p { margin: .3rem 0; }
h3 { font-size: 1rem; margin: 0 0 .3rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; }
.state { color: var(--soft); font-weight: 400; }
.case.failed .state, .complaint, .verdict.rejected { color: var(--bad); }
.verdict { font-weight: 600; font-size: .9rem; }
.verdict.accepted { color: var(--good); }
.remedy::before { content: "→ "; color: var(--soft); }
.both { display: grid; gap: 1.5rem; align-items: start; }
.both { grid-template-columns: minmax(0, 11fr) minmax(min-content, 9fr); }
.nothing { color: var(--soft); border: 1px dashed var(--line); padding: 1.5rem; text-align: center; }
.organs { width: 100%; margin: 0 0 .5rem; font-size: .92rem; }
.organs th, .organs td { padding: .3rem .5rem; vertical-align: top; }
.organs thead th { vertical-align: bottom; }
.organs th { white-space: normal; }
.organs tbody th { width: 42%; font-weight: 400; border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
.organs tbody tr:nth-child(even) { background: none; }
.organs .range { white-space: nowrap; }
.flag { color: var(--warn); font-weight: 600; text-decoration: none; margin-right: .5rem; white-space: nowrap; }
.flag:hover, .flag:focus { text-decoration: underline; }
.meanings { display: grid; grid-template-columns: max-content minmax(0, 40rem); gap: .3rem 1.2rem; }
.meanings dt { font-weight: 600; }
.meanings dd { margin: 0; }
.meanings dt:target { color: var(--warn); }
@media (max-width: 62rem) { .both { grid-template-columns: minmax(0, 1fr); gap: .7rem; } }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 2rem; }
  .figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem .5rem; }
  .case { padding-left: .7rem; }
  .organs, .organs tbody, .organs th { display: block; }
  .organs thead { display: none; }
  .organs tbody th { width: auto; border: 0; padding: .4rem 0 0; }
  .organs tr { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; padding-bottom: .4rem;
    border-bottom: 1px solid var(--line); }
  .organs tbody th { flex-basis: 100%; }
  .organs td { border: 0; padding: 0; text-align: left; }
  .organs td::before { content: attr(data-name) " "; color: var(--soft); font-size: .82rem; }
  .organs td.range { order: 1; flex-basis: 100%; }
  .organs td.range::before { content: none; }
  .case.failed { grid-template-columns: minmax(0, 1fr); }
  .meanings { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .meanings dd { margin-bottom: .5rem; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff; --warn: #6b4600;
    --bad: #8c1a15; --good: #1f5a2c; }
  :root { font-size: 8.5pt; }
  body { max-width: none; padding: 0; }
  .case { break-inside: avoid; content-visibility: visible; }
  .both { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .bar { width: 80px; }
}
"""
    + range_bar.STYLE
)
"""CSS. Colours never stand alone: what they mark is also said in words. Cases out of view are not laid out, and their
pictures not decoded, until they come near (``content-visibility``)."""
