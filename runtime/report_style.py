"""The report's style sheet: light and dark, phone, desktop and paper. A module, so that every package carries it."""

STYLE = """
:root {
  --ground: #f7f8f8; --card: #fff; --ink: #16201f; --soft: #586663; --line: #dbe2e0; --grid: #e9eeec;
  --measured: #0b7a6f; --measured-ground: #dff3ef; --predicted: #9a5b00; --predicted-ground: #fff1d9; --hatch: #e3a548;
  --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #111716; --card: #19211f; --ink: #e8efed; --soft: #a2b0ac; --line: #33403d; --grid: #26312e;
    --measured: #4fd1bf; --measured-ground: #12403a; --predicted: #f2b85c; --predicted-ground: #46310d;
    --hatch: #b98026;
    --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.45 system-ui, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 48px; }
.defs { position: absolute; }
h1 { font-size: 30px; line-height: 1.15; margin: 2px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.eyebrow { margin: 0; font-size: 13px; letter-spacing: .06em; text-transform: uppercase; color: var(--soft); }
.facts { margin: 2px 0; color: var(--soft); overflow-wrap: anywhere; }
.note { margin: 0 0 10px; font-size: 14px; color: var(--soft); max-width: 70ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
section { margin: 16px 0; }
.badge {
  display: inline-block; font-size: 11.5px; font-weight: 650; line-height: 1; padding: 4px 7px; border-radius: 99px;
  vertical-align: 2px; white-space: nowrap; border: 1px solid;
}
.badge.measured { color: var(--measured); background: var(--measured-ground); }
.badge.predicted { color: var(--predicted); background: var(--predicted-ground); border-style: dashed; }
.unfit { color: var(--bad); font-size: 12.5px; margin-left: 6px; white-space: nowrap; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 32px; margin: 18px 0 0; padding: 0; }
.legend { font-size: 14px; }
.legend li { display: flex; align-items: center; gap: 8px; }
.legend .sample { width: 110px; flex: none; }

table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { padding: 9px 10px; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { border-top: 0; font-size: 13.5px; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
.devices td { white-space: nowrap; }
.devices th[scope=row] { border-left: 4px solid var(--measured); overflow-wrap: anywhere; min-width: 190px; }
.devices tr.predicted th[scope=row] { border-left: 4px dashed var(--hatch); }
.devices tr.predicted td { color: var(--predicted); }
.devices tr.predicted td small { color: inherit; opacity: .85; }
.wide { overflow-x: auto; }
.figures { font-size: 14px; }
.figures th, .figures td { min-width: 120px; max-width: 260px; overflow-wrap: anywhere; }
.figures tbody th { font-weight: 400; color: var(--soft); min-width: 110px; }
.figures thead td { border: 0; }
.figures th:first-child, .figures td:first-child { position: sticky; left: 0; background: var(--card); }

.chart { list-style: none; margin: 0; padding: 0; }
.chart li { display: grid; grid-template-columns: minmax(170px, 345px) 1fr 116px; gap: 14px; align-items: center; }
.chart .name { font-size: 14px; padding: 3px 0; overflow-wrap: anywhere; }
.chart .figure { font-weight: 600; font-size: 15px; text-align: right; white-space: nowrap; }
.chart .predicted .figure { color: var(--predicted); font-weight: 500; }
.chart .axis .name { color: var(--soft); text-align: right; font-size: 12.5px; }
svg { overflow: visible; display: block; }
svg.track, svg.ticks { width: 100%; }
.track { border-radius: 3px; }
.grid { stroke: var(--grid); stroke-width: 1.5; }
.ticks text { fill: var(--soft); font-size: 12px; }
g.measured circle { fill: var(--measured); }
g.measured .whisker { stroke: var(--measured); stroke-width: 5; stroke-opacity: .45; }
g.measured .tick { stroke: var(--measured); stroke-width: 2.5; }
g.measured .bar { fill: var(--measured); }
g.predicted circle { fill: var(--card); stroke: var(--hatch); stroke-width: 3; }
g.predicted .band { stroke: var(--hatch); stroke-width: 3; stroke-dasharray: 6 5; }
g.predicted .bar { fill: url(#hatch); stroke: var(--hatch); stroke-width: 1.5; }
g.part.measured rect { fill: var(--measured); }
g.part.predicted rect { fill: var(--hatch); }
.parts small { grid-column: 2 / -1; margin: -4px 0 8px; }
.hatch-ground { fill: var(--predicted-ground); }
.hatch-line { fill: var(--hatch); }
.changes th, .changes td { min-width: 92px; }
.changes th[scope=row] { min-width: 190px; position: sticky; left: 0; background: var(--card); }
.changes td.slower { color: var(--bad); font-weight: 650; }
.changes td.faster { color: var(--measured); }
.changes td.slower small, .changes td.faster small { color: inherit; }
.verdict { font-weight: 650; margin: 6px 0 10px; padding: 8px 12px; border-left: 4px solid; }
.verdict.bad { color: var(--bad); }
.verdict.good { color: var(--measured); }
.scatter { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2px 12px; margin: 26px 14px 18px 0; }
.scatter svg { width: 100%; }
.scatter .side { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.scatter .side, .scatter figcaption { font-size: 12.5px; color: var(--soft); }
.scatter .side span { max-width: 9ch; }
.scatter figcaption { text-align: center; }
.tradeoff { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 0 28px; }
.tradeoff .scatter { min-width: 0; }
.scatter .grid { stroke: var(--line); stroke-width: 1; }
.scatter .index { fill: var(--ink); font-size: 13px; font-weight: 650; }
.quality th:nth-child(2) { text-align: left; }
.quality td:first-child { font-weight: 650; }
.quality th[scope=row] { text-align: left; min-width: 150px; overflow-wrap: anywhere; }
.quality tr.predicted td:not(:first-child) { color: var(--predicted); }
.made { margin: 6px 0 0; padding: 0; list-style: none; font-size: 14px; overflow-wrap: anywhere; }
.made li { margin: 8px 0; }

@media (max-width: 720px) {
  .tradeoff { grid-template-columns: minmax(0, 1fr); }
  main { padding: 18px 12px 32px; }
  h1 { font-size: 24px; }
  section { padding: 14px; margin: 12px 0; }
  .devices, .devices tbody, .devices tr, .devices th, .devices td { display: block; }
  .devices thead { display: none; }
  .devices tr { padding: 10px 0 8px 12px; border-left: 4px solid var(--measured); margin-bottom: 14px; }
  .devices tr.predicted { border-left: 4px dashed var(--hatch); }
  .devices th[scope=row], .devices tr.predicted th[scope=row] { border: 0; padding: 0 0 4px; }
  .devices td { border: 0; padding: 2px 0; display: flex; justify-content: space-between; gap: 16px; }
  .devices td::before { content: attr(data-label); color: var(--soft); font-size: 14px; }
  .chart li { grid-template-columns: 1fr auto; gap: 0 12px; padding: 5px 0; }
  .chart .track, .chart .ticks { grid-column: 1 / -1; grid-row: 2; }
  .parts small { grid-column: 1 / -1; grid-row: 3; margin: 0 0 6px; }
  .chart .axis .name { text-align: left; grid-column: 1 / -1; grid-row: 2; }
  .chart .axis .ticks { grid-row: 1; }
}
@media print {
  :root {
    --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #ddd; --measured: #0b7a6f;
    --measured-ground: #dff3ef; --predicted: #9a5b00; --predicted-ground: #fff1d9; --hatch: #d08a20; --bad: #b3261e;
  }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  section { break-inside: avoid; border: 0; border-top: 1px solid var(--line); border-radius: 0; }
  section { padding: 12px 0; margin: 8px 0; }
  tr, .chart li { break-inside: avoid; }
  .wide { overflow: visible; }
  @page { margin: 14mm; }
}
"""
