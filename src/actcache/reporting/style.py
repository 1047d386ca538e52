"""How the page looks: by the reader's own choice of light or dark, on any width, without a font or picture."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1c2430; --soft: #566070; --line: #d9dee6;
  --one: #2f6fdb; --two: #9aa7ba; --good: #1d8a54; --bad: #c8322b; --unknown: #b9c2cf; --warn: #fdecea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181f; --card: #1c222c; --ink: #e4e8ee; --soft: #a2adbd; --line: #364050;
    --one: #6ea0f5; --two: #66738a; --good: #4cc38a; --bad: #f0716a; --unknown: #4b576a; --warn: #3a1f1e;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: .1rem 0 .4rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .5rem; font-size: 1.15rem; overflow-wrap: anywhere; }
p { margin: 0 0 .6rem; }
section { margin-top: 2rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
code { font-size: .92em; overflow-wrap: anywhere; }
a { color: var(--one); }
.soft { color: var(--soft); }
.wrong { padding: 1rem; border: 1px solid var(--bad); border-radius: 8px; background: var(--warn); }
.wrong li, .wrong p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td { max-width: 42rem; overflow-wrap: break-word; }
.fields { margin-bottom: 1rem; }
.fields td { overflow-wrap: anywhere; }
.fields td:first-child { overflow-wrap: normal; }
.number { text-align: right; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem .9rem; border-radius: 8px; background: var(--card); min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
figure p { margin: .4rem 0 0; color: var(--soft); font-size: .82rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 11.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg text.soft { fill: var(--soft); }
.axis { stroke: var(--soft); }
.grid { stroke: var(--line); stroke-dasharray: 3 3; }
.track { fill: var(--line); opacity: .5; }
.one { fill: var(--one); background: var(--one); }
.two { fill: var(--two); background: var(--two); }
.good { fill: var(--good); background: var(--good); }
.bad { fill: var(--bad); background: var(--bad); }
.unknown { fill: var(--unknown); background: var(--unknown); }
.key { margin-right: 1rem; display: inline-block; }
.key i { display: inline-block; width: .7rem; height: .7rem; margin-right: .35rem; border-radius: 2px; }
details { margin-top: .8rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .4rem; }
"""
