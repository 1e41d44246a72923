// All facts about the node that is selected.

import { chipsOf } from "./boxes.js";
import { cleared, element, human, own, shortSource } from "./text.js";

const FIELD_UNITS = { bytes: "bytes", flops: "flops", seconds: "seconds", saved: "bytes" };

export function showPanel(holder, app, node) {
  if (node === null || node === undefined) {
    cleared(holder, hint(app));
    return;
  }
  const { inspection, state } = app;
  const data = inspection.nodes[node];
  cleared(holder, [
    element("h2", {}, data.name),
    element("p", { class: "muted" }, data.target || data.op),
    presence(inspection, node, state),
    facts(inspection, node, state),
    said(app, node),
    chips(app, node),
    neighbours(app, "reads", inspection.inputsAt(node, shownState(inspection, node, state))),
    neighbours(app, "read by", inspection.readersAt(node, shownState(inspection, node, state))),
    sourceOf(inspection, node),
  ]);
}

function hint(app) {
  const keys = [["/", "search"], ["[ ]", "pass before, after"], ["o", "next overlay"],
    ["↑ ↓", "along the edges of the node"], ["← →", "node before, after in order"],
    ["Enter", "open or close its module"], ["e c", "open, close all"], ["+ − f", "zoom, fit"],
    ["g s", "graph, summary"], ["t", "light or dark"], ["Esc", "let go"]];
  return [
    element("h2", {}, "Nothing selected"),
    element("p", { class: "muted" }, `Click a module to open it, a node to see what is known of it. `
      + `${app.inspection.nodes.length} nodes.`),
    element("dl", { class: "keys" }, keys.flatMap(([key, does]) =>
      [element("dt", {}, key), element("dd", {}, does)])),
  ];
}

function shownState(inspection, node, state) {
  return inspection.has(node, state) ? state : 0;
}

function presence(inspection, node, state) {
  const fate = inspection.fate(node, 0, state);
  const texts = { added: "not in the captured program", removed: "gone", changed: "changed",
    absent: "not there yet", same: "" };
  const again = inspection.again(node, state);
  const parts = [texts[fate], again > 1 ? `runs ${again} times in a step` : ""].filter(Boolean);
  return parts.length ? element("p", { class: `fate ${fate}` }, parts.join("; ")) : null;
}

function facts(inspection, node, state) {
  const before = inspection.at(node, 0);
  const after = inspection.at(node, state);
  const rows = [];
  const add = (label, key, show = (value) => human(value, FIELD_UNITS[key] || "")) => {
    if (after[key] === undefined && before[key] === undefined) return;
    const said = (at) => (at[key] === undefined || (at[key] === null && key !== "bytes") ? "–"
      : show(at[key])); // null: a pass took it away; of bytes: nobody knows
    const [was, is] = [said(before), said(after)];
    const cell = was === is || !inspection.has(node, 0) ? [is]
      : [element("del", {}, was), " ", element("ins", {}, is)];
    rows.push(element("tr", {}, [element("th", {}, label), element("td", {}, cell)]));
  };
  add("module", "scope");
  add("class", "module");
  add("phase", "phase");
  add("type", "type", String);
  add("shape", "shapes", (shapes) => shapes.map((sizes) =>
    `[${sizes.map((size) => size ?? "?").join(", ")}]`).join(" "));
  add("dtype", "dtypes", (dtypes) => dtypes.join(", "));
  add("bytes", "bytes", (bytes) => (bytes === null ? "the data decides" : human(bytes, "bytes")));
  add("FLOPs", "flops");
  add("time", "seconds");
  add("saved", "saved");
  add("saved for", "saved_for", (names) => names.join(", "));
  add("arguments", "literals", (literals) => Object.entries(literals)
    .map(([key, value]) => `${key}: ${value}`).join(", "));
  add("traced from", "origin", String);
  return element("table", { class: "facts" }, rows);
}

// What the overlays say.
function said(app, node) {
  const rows = [];
  for (const { data, overlay } of app.overlays()) {
    if (data.field || data.name === "change") continue;
    const values = [0, 1].map((side) => overlay.value(node, side));
    const note = overlay.note(node);
    if (values.every((value) => value === undefined) && !note) continue;
    const texts = values.map((value) => (value === undefined ? "–" : human(value, overlay.unit)));
    const cell = texts[0] === texts[1] || values[0] === undefined ? [texts[1]]
      : [element("del", {}, texts[0]), " ", element("ins", {}, texts[1])];
    rows.push(element("tr", {}, [element("th", {}, data.title),
      element("td", {}, note ? [...cell, element("div", { class: "muted" }, note)] : cell)]));
  }
  return rows.length ? element("table", { class: "facts said" }, rows) : null;
}

function chips(app, node) {
  const found = chipsOf(app.inspection, app.tree, node);
  if (!found.length) return null;
  return element("section", {}, [element("h3", {}, "parameters and results"),
    element("ul", {}, found.map(({ title }) => {
      const slot = own(app.inspection.data.state, title);
      const resized = own(app.inspection.states[app.state].snapshot.state || {}, title);
      if (!slot) return element("li", {}, title);
      const sizes = `${slot.dtype}[${slot.shape.join(", ")}]`;
      const now = resized ? [" ", element("ins", {}, `[${resized.join(", ")}]`)] : [];
      return element("li", {}, [title, element("span", { class: "muted" }, ` ${sizes}`), ...now]);
    }))]);
}

function neighbours(app, title, nodes) {
  if (!nodes.length) return null;
  return element("section", {}, [element("h3", {}, title),
    element("ul", { class: "neighbours" }, nodes.map((i) => {
      const { name, target, scope } = app.inspection.nodes[i];
      return element("li", {}, element("button", { type: "button", "data-to": name,
        onclick: () => app.select(i, true) }, [name, element("span", { class: "muted" },
        ` ${[target, scope].filter(Boolean).join(" · ")}`)]));
    }))]);
}

function sourceOf(inspection, node) {
  const text = inspection.source(node);
  if (!text) return null;
  const [, place, code] = /^(.*?:\d+)(?:: (.*))?$/s.exec(text) || [null, text, ""];
  return element("section", { class: "source" }, [element("h3", {}, "source"),
    element("p", { class: "muted", title: place }, shortSource(place)),
    code ? element("code", {}, code) : null]);
}
