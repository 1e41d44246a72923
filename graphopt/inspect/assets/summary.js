// The first page: what was asked for, what came of it, what each pass did, and the modules.

import { Overlay } from "./colours.js";
import { isBackward } from "./data.js";
import { cleared, element, human } from "./text.js";

export function showSummary(holder, inspection) {
  const { data } = inspection;
  const { summary } = data;
  const budget = Object.entries(summary.budget).map(([key, value]) => `${key} = ${value}`);
  cleared(holder, [
    element("h1", {}, data.title),
    element("p", { class: "lead" }, [
      `${inspection.states[inspection.last].present.size} nodes, ${kindOf(data)}`,
      budget.length ? `; budget ${budget.join(", ")}` : "",
      data.passes.length ? element("code", { class: "pipeline" }, data.passes.join(" → ")) : null,
    ]),
    summary.warnings.length ? warnings(summary.warnings) : null,
    figures(inspection, summary),
    summary.bounds.length ? bounds(summary.bounds) : null,
    summary.passes.length ? passes(inspection, summary.passes) : null,
    modules(inspection),
  ]);
}

function kindOf(data) {
  const kinds = { program: "the forward graph", joint: "forward and backward",
    plan: "a planned step" };
  return `${kinds[data.view]} in ${data.training ? "training" : "eval"} mode`;
}

function figures(inspection, summary) {
  const cards = summary.figures.filter(({ before, after }) => before || after).map((figure) => {
    const { label, before, after, limit, unit } = figure;
    const change = before ? Math.round((100 * after) / before) : null;
    const top = Math.max(before, after, limit || 0) || 1;
    const bar = (value, kind) => {
      const inner = element("div", { class: `bar ${kind}` });
      inner.style.width = `${(100 * value) / top}%`;
      return inner;
    };
    const line = element("div", { class: "limit" });
    if (limit) line.style.left = `${(100 * limit) / top}%`;
    return element("div", { class: "card" }, [
      element("h3", {}, label),
      element("p", { class: "figure" }, [element("span", { class: "before" }, human(before, unit)),
        " → ", element("b", {}, human(after, unit)),
        change === null ? "" : element("span", { class: "muted" }, ` ${change} %`)]),
      element("div", { class: "bars" }, [bar(before, "before"), bar(after, "after"),
        limit ? line : null]),
      limit ? element("p", { class: "muted" }, `budget ${human(limit, unit)}`) : null,
    ]);
  });
  const lines = [inspection.timeline(0), inspection.timeline(inspection.last)];
  if (!cards.length) {
    cards.push(element("div", { class: "card" }, [element("h3", {}, "simulated peak"),
      element("p", { class: "figure" }, element("b", {}, human(lines[1].peak, "bytes")))]));
  }
  return element("div", { class: "cards" }, cards);
}

function bounds(entries) {
  const rows = entries.map(({ section, what, value, bound, gap, status, unit, scope }) =>
    element("tr", {}, [element("th", {}, `${section}: ${what}`), td(human(value, unit)),
      td(human(bound, unit)), td(human(gap, unit)), element("td", { class: "text" }, status),
      element("td", { class: "text muted" }, scope)]));
  return section("How far from the best", table(
    ["", "value", "proven bound", "gap", "status", "holds for"], rows));
}

function passes(inspection, entries) {
  const rows = entries.map((entry, at) => {
    const { snapshot } = inspection.states[at + 1];
    const changed = Object.keys(snapshot.changed).length;
    const again = Object.keys(snapshot.again || {}).length;
    const deltas = snapshot.recorded ? [`+${snapshot.added.length}`, `−${snapshot.removed.length}`,
      `~${changed}`].join(" ") : "not recorded";
    const facts = entry.facts.map(([, label, text]) => element("tr", {}, [element("th", {}, label),
      td(text)]));
    const details = facts.length ? element("details", {}, [element("summary", {},
      `${facts.length} figures`), element("table", {}, facts)]) : "";
    return element("tr", {}, [element("th", {}, element("code", {}, entry.pass)),
      td(entry.changed ? "yes" : "no"), td(human(entry.seconds, "seconds")), td(deltas),
      td(again ? String(again) : "–"), element("td", { class: "text" }, details)]);
  });
  return section("What each pass did", table(
    ["pass", "changed", "took", "nodes", "recomputed", "reported"], rows));
}

function warnings(texts) {
  return element("section", { class: "warnings" }, [element("h2", {}, "Warnings"),
    element("ul", {}, texts.map((text) => element("li", {}, text)))]);
}

// Sums by module, of what runs in the last state.
function modules(inspection) {
  const rows = new Map();
  const row = (scope) => {
    if (!rows.has(scope)) {
      rows.set(scope, { scope, module: inspection.data.modules[scope] || "", forward: 0,
        backward: 0, flops: 0, bytes: 0, saved: 0, peak: 0 });
    }
    return rows.get(scope);
  };
  const overlay = (name) => {
    const data = inspection.data.overlays.find((each) => each.name === name);
    return data && new Overlay(inspection, data, inspection.last);
  };
  const [saved, peak] = [overlay("saved"), overlay("peak")];
  const { last } = inspection;
  inspection.nodes.forEach((_, i) => {
    const node = inspection.at(i, last);
    if (node.op !== "call" || !inspection.has(i, last)) return;
    for (const scope of chain(node.scope || "")) {
      const sum = row(scope);
      sum[isBackward(node) ? "backward" : "forward"] += 1;
      sum.flops += node.flops || 0;
      sum.bytes += node.bytes || 0;
      sum.saved += saved?.value(i, 1) || 0;
      sum.peak += peak?.value(i, 1) || 0;
    }
  });
  const whole = rows.get("")?.peak || 0;
  const cells = (item) => [element("th", { class: "scope" }, item.scope || "(model)"),
    element("td", { class: "text muted" }, item.module), td(item.forward), td(item.backward),
    td(human(item.flops, "flops")), td(human(item.bytes, "bytes")), td(human(item.saved, "bytes")),
    td(whole ? human(item.peak / whole, "fraction") : "–")];
  const ordered = [...rows.values()].filter(({ scope }) => scope.split(".").length <= 3)
    .sort((a, b) => compare(a.scope, b.scope));
  if (!ordered.length) return null;
  return section("Modules", table(
    ["module", "class", "forward", "backward", "FLOPs", "allocated", "saved", "of peak"],
    ordered.map((item) => element("tr", {}, cells(item)))));
}

function chain(scope) {
  if (!scope) return [""];
  const parts = scope.split(".");
  return ["", ...parts.map((_, i) => parts.slice(0, i + 1).join("."))];
}

function compare(a, b) {
  return a.localeCompare(b, undefined, { numeric: true });
}

function td(content) {
  return element("td", {}, String(content));
}

function table(titles, rows) {
  return element("div", { class: "scroll" }, element("table", {}, [
    element("thead", {}, element("tr", {}, titles.map((title) => element("th",
      { class: ["holds for", "class", "status", "reported"].includes(title) ? "text" : null }, title)))),
    element("tbody", {}, rows)]));
}

function section(title, content) {
  return element("section", {}, [element("h2", {}, title), content]);
}
