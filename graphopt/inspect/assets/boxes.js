// What is drawn for one node or one group: its size, its label, its chips.

import { isBackward } from "./data.js";
import { inkOn } from "./colours.js";
import { human, lastPart, shortened, svgElement } from "./text.js";

const CHAR = 7.5;
const LEAF = { min: 96, max: 230, h: 36, chip: 16 };
const GROUP = { min: 150, max: 290, h: 50 };
const MOST_CHIPS = 3;

export function label(node) {
  if (node.op === "call") return (node.target || node.name).replace(/^aten\./, "");
  return node.name;
}

export function groupTitle(item) {
  return item.module ? `${item.label} · ${item.module}` : item.label;
}

// Parameters that a node reads, and results that it gives, as short texts with what they stand for.
export function chipsOf(inspection, tree, i) {
  const node = inspection.nodes[i];
  const chips = node.state.map((path) => ({ text: lastPart(path), title: path, kind: "state" }));
  for (const folded of tree.carried.get(i) || []) {
    const name = inspection.nodes[folded].name;
    const [kind, path] = [name.slice(0, name.indexOf(" ")), name.slice(name.indexOf(" ") + 1)];
    const text = `${kind === "gradient" ? "∂" : "✎"}${lastPart(path)}`;
    chips.push({ text, title: name, kind, node: folded });
  }
  return chips;
}

export function sizeOf(inspection, tree, item) {
  if (item.children) {
    const title = groupTitle(item).length;
    return { w: clamp(title * CHAR + 44, GROUP.min, GROUP.max), h: GROUP.h };
  }
  const node = inspection.nodes[item.node];
  const chips = chipsOf(inspection, tree, item.node).slice(0, MOST_CHIPS);
  const text = Math.max(label(node).length * CHAR, (node.type || "").length * 5.6);
  const row = chips.reduce((sum, chip) => sum + chipWidth(chip) + 4, 0);
  return {
    w: clamp(Math.max(text, row) + 18, LEAF.min, LEAF.max),
    h: LEAF.h + (chips.length ? LEAF.chip + 2 : 0),
  };
}

function clamp(value, low, high) {
  return Math.round(Math.min(Math.max(value, low), high));
}

function chipWidth(chip) {
  return shortened(chip.text, 14).length * 5.6 + 10;
}

// Draws one box; `paint` is {fill, ink, parts, line} from the overlay.
export function drawBox(view, item, box, paint, far) {
  const { inspection, tree } = view;
  const group = Boolean(item.children);
  const name = group ? null : inspection.nodes[item.node].name;
  const shape = svgElement("g", {
    class: `box ${group ? "group" : "leaf"} ${paint.classes}`,
    transform: `translate(${box.x} ${box.y})`,
    "data-item": item.id,
    "data-node": name,
    "data-scope": group ? item.scope : null,
    role: "button",
    "aria-label": group ? `module ${item.scope || item.label}` : name,
    "aria-expanded": group ? "false" : null,
  });
  const frame = svgElement("rect", { class: "frame", width: box.w, height: box.h,
    rx: group ? 7 : 4 });
  if (paint.fill) frame.style.fill = paint.fill; // wins over the sheet, as an attribute would not
  shape.append(frame);
  if (!far) (group ? drawGroup : drawLeaf)(view, item, box, paint, shape);
  return shape;
}

function drawGroup(view, item, box, paint, shape) {
  const fits = Math.floor((box.w - 30) / CHAR);
  shape.append(text(12, 19, "title", `▸ ${shortened(groupTitle(item), fits)}`, paint.ink));
  shape.append(text(12, 35, "sub", shortened(paint.line, Math.floor((box.w - 20) / 5.6)), paint.ink));
  drawParts(paint.parts, 8, box.h - 9, box.w - 16, shape);
}

function drawParts(parts, x, y, width, shape) {
  for (const { share, colour } of parts) {
    shape.append(svgElement("rect", { x, y, width: Math.max(0, share * width), height: 5,
      fill: colour }));
    x += share * width;
  }
}

function drawLeaf(view, item, box, paint, shape) {
  const { inspection, tree } = view;
  const node = inspection.at(item.node, view.state);
  const fits = Math.floor((box.w - 14) / CHAR);
  const again = paint.again > 1 ? ` ×${paint.again}` : "";
  shape.append(text(9, 15, "title", shortened(label(node), fits - again.length) + again, paint.ink));
  shape.append(text(9, 29, "sub", shortened(paint.line, Math.floor((box.w - 14) / 5.4)), paint.ink));
  let x = 7;
  const chips = chipsOf(inspection, tree, item.node);
  chips.slice(0, MOST_CHIPS).forEach((chip, at) => {
    const more = at === MOST_CHIPS - 1 && chips.length > MOST_CHIPS;
    const shown = more ? `+${chips.length - at}` : shortened(chip.text, 14);
    const width = shown.length * 5.6 + 10;
    if (x + width > box.w - 4) return;
    const folded = chip.node === undefined ? null : inspection.nodes[chip.node].name;
    const group = svgElement("g", { class: `chip ${chip.kind}`, "data-node": more ? null : folded,
      "data-state": more || folded ? null : chip.title }, [
      svgElement("rect", { x, y: 34, width, height: 15, rx: 7 }),
      text(x + 5, 45, "chip-text", shown),
      svgElement("title", {}, more ? chips.slice(at).map((c) => c.title).join("\n") : chip.title),
    ]);
    shape.append(group);
    x += width + 4;
  });
}

function text(x, y, kind, content, ink) {
  const made = svgElement("text", { x, y, class: kind }, content);
  if (ink) made.style.fill = ink;
  return made;
}

// How an overlay paints a box on a side.
export function paintOf(view, item, side) {
  const { inspection, overlay } = view;
  const state = side ? view.state : 0;
  if (item.children) return paintGroup(view, item, side, state);
  const node = inspection.at(item.node, state);
  const present = inspection.has(item.node, state);
  const classes = [present ? "" : "ghost", isBackward(node) ? "backward" : "forward"];
  const fate = side ? inspection.fate(item.node, 0, state) : "same";
  if (fate === "added" || fate === "changed") classes.push(fate);
  const value = present ? overlay.value(item.node, side) : undefined;
  const fill = overlay.colour(value);
  let line = node.type || "";
  if (value !== undefined && overlay.data.name !== "phase" && overlay.data.name !== "change") {
    line = `${overlay.kind === "categorical" ? value : human(value, overlay.unit)} · ${line}`;
  }
  return { fill, ink: fill ? inkOn(fill) : null, parts: [], line, classes: classes.join(" "),
    again: side ? inspection.again(item.node, state) : 1 };
}

function paintGroup(view, item, side, state) {
  const { inspection, overlay } = view;
  const here = item.nodes.filter((i) => inspection.has(i, state)).length;
  const found = overlay.group(item, side);
  const classes = here ? "" : "ghost";
  const count = `${here} node${here === 1 ? "" : "s"}`;
  if (overlay.kind === "categorical") {
    const parts = overlay.categories.filter((name) => found.counts.has(name)).map((name) => ({
      share: found.counts.get(name) / found.total, colour: overlay.colour(name),
    }));
    const main = overlay.categories.find((name) => found.counts.has(name));
    const line = found.total && overlay.data.name !== "phase"
      ? `${count} · ${found.counts.get(main)} ${main}` : count;
    return { fill: null, ink: null, parts, line, classes };
  }
  if (!found.known) return { fill: null, ink: null, parts: [], line: count, classes };
  const shown = overlay.unit === "fraction" ? found.low : found.extreme;
  const fill = overlay.colour(shown);
  const figure = overlay.unit === "fraction"
    ? `≥ ${human(found.low, overlay.unit)}` : `Σ ${human(found.sum, overlay.unit)}`;
  return { fill, ink: fill ? inkOn(fill) : null, parts: [], line: `${count} · ${figure}`, classes };
}
