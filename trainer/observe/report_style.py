"""The style sheet of all pages: no fonts, pictures or scripts from anywhere."""

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #1c2024;
  --soft: #60676f; --rule: #e2e4e7; --accent: #0b6bcb; --faint: #0b6bcb55;
  --good: #1a7f4b; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1b1e23; --ink: #e8eaed;
  --soft: #9aa2ab; --rule: #30353c; --accent: #6cb2ff; --faint: #6cb2ff55;
  --good: #58c98b; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.06rem; }
.soft, figcaption, .note { color: var(--soft); }
.note { font-size: .9rem; }
code { font: .88em/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.6rem, 1fr));
  gap: .7rem; margin: 1.3rem 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .7rem .85rem; }
.card b { display: block; font-size: 1.2rem; font-weight: 650; line-height: 1.3;
  white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .82rem; }
.scroll { overflow-x: auto; }
.wide table { width: 100%; }
.wide .scroll table { min-width: 40rem; }
section { scroll-margin-top: 4rem; }
table { border-collapse: collapse; min-width: 24rem; font-variant-numeric: tabular-nums;
  font-size: .94rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; }
.num { text-align: right; padding-left: 1.1rem; padding-right: 0; white-space: nowrap; }
.txt { text-align: left; overflow-wrap: anywhere; }
tfoot td { font-weight: 650; border-bottom: 0; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(27rem, 1fr));
  gap: 1.2rem; }
@media (max-width: 34rem) { .charts { grid-template-columns: 1fr; } }
.chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .7rem .8rem .4rem; }
.chart.wide { grid-column: 1 / -1; }
.chart figcaption { font-size: .88rem; margin-bottom: .2rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg polyline.faint { stroke: var(--faint); stroke-width: 1.2; }
.bars { width: 100%; min-width: 0; }
.bars th { text-align: left; font-weight: 400; width: 30%; overflow-wrap: anywhere; }
.bars td, .bars th { border-bottom: 0; padding: .12rem .5rem .12rem 0; vertical-align: middle; }
.track { width: 50%; }
.track i { display: block; height: .8rem; min-width: 1px; border-radius: 3px;
  background: var(--accent); }
.cluster { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .2rem .8rem .8rem; margin: .9rem 0; }
.cluster .pictures { gap: .6rem; }
.cluster .pictures figure { border: 0; padding: 0; background: none; }
.cluster .kept img { outline: 3px solid var(--good); outline-offset: 1px; }
.bar { display: flex; height: 1.5rem; border-radius: 6px; overflow: hidden; margin: .35rem 0;
  background: var(--rule); }
.bar i { display: block; min-width: 1px; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px;
  margin-right: .45rem; }
.chart img { max-width: 100%; height: auto; }
.attempts { overflow-x: auto; }
.attempts svg { min-width: 44rem; }
.stacked { width: 55%; }
.stack { display: flex; height: .8rem; border-radius: 3px; overflow: hidden; }
.stack i { display: block; min-width: 1px; height: 100%; }
.p-counter { background: #2a9d6f; } .p-rapl { background: #3a8fd1; }
.p-power_integral { background: #7d6bd6; } .p-tdp_model { background: #e0a526; }
.p-limit_model { background: #c9622f; } .p-none { background: #8a939c; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .84rem; color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr));
  gap: 1rem; }
.pictures.pairs { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.pictures figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .55rem; }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 5px;
  display: block; image-rendering: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.pair small { color: var(--soft); }
.pictures figcaption { font-size: .84rem; line-height: 1.35; margin-top: .4rem; }
.ok { color: var(--good); font-weight: 650; }
.wrong { color: var(--bad); font-weight: 650; }
.missing { display: block; padding: 1.5rem .5rem; text-align: center; color: var(--soft);
  font-size: .84rem; border: 1px dashed var(--rule); border-radius: 5px; }
.absent { border: 1px dashed var(--rule); border-radius: 10px; padding: .8rem 1rem;
  color: var(--soft); }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: .9rem 1rem; overflow-x: auto; font: .84rem/1.5 ui-monospace, "DejaVu Sans Mono",
  Menlo, Consolas, monospace; }
.b-productive { background: #2a9d6f; fill: #2a9d6f; }
.b-data_stall { background: #e0a526; fill: #e0a526; }
.b-encoding { background: #9aa83a; fill: #9aa83a; }
.b-checkpoint_stall { background: #7d6bd6; fill: #7d6bd6; }
.b-evaluation { background: #3a8fd1; fill: #3a8fd1; }
.b-init { background: #8a939c; fill: #8a939c; }
.b-restore { background: #b07aa1; fill: #b07aa1; }
.b-drain { background: #c98b6b; fill: #c98b6b; }
.b-lost_work { background: #d1495b; fill: #d1495b; }
.b-idle { background: #b9bfc6; fill: #b9bfc6; }
.b-queue { background: #5f6f82; fill: #5f6f82; }
.band { fill: var(--faint); stroke: none; }
figure[data-panel] svg { touch-action: pan-y; cursor: crosshair; }
figure[data-panel] svg:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.cursor line { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.dot { fill: var(--accent); }
.run0 { --own: #2f7ed8; }
.run1 { --own: #d9730d; }
.run2 { --own: #2a9d6f; }
.run3 { --own: #c0398b; }
.run4 { --own: #7d6bd6; }
.run5 { --own: #9a8a1f; }
.run6 { --own: #3aa6b9; }
.run7 { --own: #b5533c; }
[class*="run"].swatch { background: var(--own); }
svg polyline[class*="run"] { stroke: var(--own); }
svg polyline.faint[class*="run"] { stroke-opacity: .35; }
.band[class*="run"] { fill: var(--own); fill-opacity: .18; }
.dot[class*="run"] { fill: var(--own); }
.chosen { fill: var(--faint); }
.readout { float: right; color: var(--ink); font-variant-numeric: tabular-nums; }
#tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .3rem 1rem;
  align-items: center; background: var(--page); border-bottom: 1px solid var(--rule);
  padding: .5rem 0; font-size: .88rem; }
#tools[hidden] { display: none; }
#tools fieldset { display: flex; flex-wrap: wrap; gap: .1rem .7rem; border: 0; padding: 0;
  margin: 0; min-width: 0; }
#tools legend { float: left; padding: 0 .5rem 0 0; color: var(--soft); }
#tools select, #tools button { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--rule); border-radius: 6px; padding: .15rem .5rem; }
#place { margin-left: auto; min-height: 1.5em; font-variant-numeric: tabular-nums; }
@media print { #tools, .readout, .cursor { display: none; } }
@media print { body { background: #fff; } main { max-width: none; } }
"""
