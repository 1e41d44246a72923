"""The style sheet of the page of an explanation, and the colours of its ledger."""

from __future__ import annotations

SINKS = {
    "inputs": "#0072b2",
    "parameters": "#e69f00",
    "constants": "#8a6d00",
    "bias": "#009e73",
    "epsilon": "#cc79a7",
    "softmax": "#56b4e9",
}
"""Colours of the ledger's sinks: Okabe and Ito's palette, which the colour blind tell apart."""

STYLE = """
:root {
  --back: #f4f5f7; --card: #fff; --ink: #1c2026; --soft: #5b636e; --line: #d5d9df; --one: #0072b2;
  color-scheme: light dark;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1e2229; --ink: #e8eaee; --soft: #a3acb8; --line: #363c46;
    --one: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); }
main { max-width: 1120px; margin: 0 auto; padding: 20px 20px 60px; }
h1 { font-size: 24px; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 26px 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 14px; margin: 12px 0 6px; font-weight: 600; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 0; }
dl div { display: flex; gap: 7px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: 13px; margin: 6px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 8px 16px; min-width: 0; }
.card h3 { margin-top: 6px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 14px; margin-top: 14px; align-items: start; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 224px), 1fr));
  gap: 14px; max-width: 1080px; }
figure { margin: 0; max-width: 340px; }
figure img { display: block; width: 100%; border-radius: 6px; border: 1px solid var(--line);
  image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: 13px; }
.scale { display: flex; align-items: center; gap: 9px; margin: 8px 0; font-size: 13px;
  color: var(--soft); }
.scale i { flex: 0 1 220px; height: 11px; border-radius: 3px; border: 1px solid var(--line); }
.strip { margin: 6px 0; font-size: 16px; overflow-wrap: anywhere; }
.token { border-radius: 3px; margin: 0 1px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px;
  min-width: min(100%, 330px); }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.card td { white-space: nowrap; }
.card td:first-child { white-space: normal; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
.target td, .total td { font-weight: 700; }
.bar { position: relative; width: 160px; height: 12px; margin-top: 5px; background: linear-gradient(
  90deg, transparent calc(50% - 1px), var(--soft) 0 calc(50% + 1px), transparent 0); }
.bar.one { width: 90px; background: var(--line); border-radius: 3px; }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.bar.one i { background: var(--one); }
.stack { display: flex; height: 22px; border-radius: 4px; overflow: hidden; gap: 1px;
  margin: 8px 0; }
.stack i { min-width: 1px; }
.stack .minus { background-image: repeating-linear-gradient(
  45deg, #fff8 0 4px, transparent 4px 8px); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
summary { cursor: pointer; padding: 12px 0; font-size: 16px; }
summary:focus-visible { outline: 2px solid var(--one); }
"""
