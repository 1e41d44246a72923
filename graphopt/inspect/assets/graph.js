// The graph twice, before and after, in one layout: what moves or opens on one side does so on the
// other.  Only what lies in the window is in the document.

import { drawBox, groupTitle, paintOf, sizeOf } from "./boxes.js";
import { Layouter } from "./layouter.js";
import { cleared, shortened, svgElement } from "./text.js";
import { ancestors, initiallyOpen } from "./tree.js";

const MARGIN = 200;
const FAR = 0.22; // below this scale no text can be read, and none is drawn
const SCALES = [0.04, 3];

export class GraphView {
  constructor(inspection, tree, panes, events) {
    this.inspection = inspection;
    this.tree = tree;
    this.events = events;
    this.open = initiallyOpen(tree.root);
    this.layouter = new Layouter();
    this.items = new Map(); // what is laid out: item id -> {item, x, y, w, h, open}
    this.lines = [];
    this.at = { x: 0, y: 0, k: 1 };
    this.hot = new Set();
    this.found = new Set();
    this.sizes = new Map();
    this.panes = panes.map((svg, side) => this.pane(svg, side));
  }

  pane(svg, side) {
    const layers = ["rooms", "lines", "boxes", "links"].map((kind) =>
      svgElement("g", { class: kind }));
    const world = svgElement("g", { class: "world" }, layers);
    cleared(svg, [arrows(side), world]);
    const pane = { svg, side, world, layers };
    svg.addEventListener("pointerdown", (event) => this.grab(svg, event));
    svg.addEventListener("wheel", (event) => this.wheel(svg, event), { passive: false });
    svg.addEventListener("click", (event) => this.click(event));
    svg.addEventListener("pointerover", (event) => this.over(event));
    svg.addEventListener("pointerleave", () => this.events.hover(null));
    return pane;
  }

  // --- layout

  async relayout(keep = null) {
    const before = keep && this.items.get(keep);
    const turn = this.turn = (this.turn || 0) + 1;
    const result = await this.layouter.layout(this.level(this.tree.root));
    if (turn !== this.turn) return false; // a later request took over
    this.items.clear();
    this.lines = [];
    this.spread(this.tree.root, result, 0, 0);
    this.size = { w: result.w, h: result.h };
    const after = keep && this.items.get(keep);
    if (before && after) { // what was clicked stays under the pointer
      this.at.x += (before.x - after.x) * this.at.k;
      this.at.y += (before.y - after.y) * this.at.k;
    }
    this.draw();
    return true;
  }

  level(item) {
    const items = item.children.map((child) => {
      if (child.children && this.open.has(child.id)) return this.level(child);
      if (!this.sizes.has(child.id)) {
        this.sizes.set(child.id, sizeOf(this.inspection, this.tree, child));
      }
      return { id: child.id, ...this.sizes.get(child.id) };
    });
    return { id: item.id, title: item.parent ? item.label : "", items, edges: merged(item) };
  }

  spread(item, result, x, y) {
    this.items.set(item.id, { item, x, y, w: result.w, h: result.h, open: true });
    const children = new Map(item.children.map((child) => [child.id, child]));
    for (const box of result.boxes) {
      const child = children.get(box.id);
      if (box.inner) this.spread(child, box.inner, x + box.x, y + box.y);
      else this.items.set(child.id, { item: child, x: x + box.x, y: y + box.y, w: box.w, h: box.h });
    }
    for (const line of result.edges) {
      this.lines.push({ ...line, points: line.points.map(([px, py]) => [px + x, py + y]) });
    }
  }

  // --- what others ask for

  show(state, overlay) {
    this.state = state;
    this.overlay = overlay;
    this.draw();
  }

  toggle(id) {
    if (id === this.tree.root.id) return Promise.resolve(false);
    if (this.open.has(id)) this.open.delete(id);
    else this.open.add(id);
    return this.relayout(id);
  }

  openAll(open) {
    this.open = open
      ? new Set(this.tree.groups.keys()) : new Set([this.tree.root.id]);
    return this.relayout().then(() => this.fit());
  }

  // The box that stands for a node: its own, or the closed group that holds it.
  visible(node) {
    const carrier = this.tree.chips.has(node) ? this.tree.chips.get(node) : node;
    let item = this.tree.leaves[carrier];
    while (item && !this.items.has(item.id)) item = item.parent;
    return item;
  }

  async reveal(node) {
    const carrier = this.tree.chips.has(node) ? this.tree.chips.get(node) : node;
    const leaf = this.tree.leaves[carrier];
    if (!leaf) return;
    const closed = ancestors(leaf).filter((item) => !this.open.has(item.id));
    closed.forEach((item) => this.open.add(item.id));
    if (closed.length || !this.items.has(leaf.id)) await this.relayout();
    this.centre(leaf.id);
  }

  centre(id) {
    const box = this.items.get(id);
    if (!box) return;
    const { width, height } = this.window();
    this.at.k = Math.max(this.at.k, 0.8);
    this.at.x = width / 2 - (box.x + box.w / 2) * this.at.k;
    this.at.y = height / 2 - (box.y + box.h / 2) * this.at.k;
    this.draw();
  }

  fit(whole = false) {
    const { width, height } = this.window();
    if (!this.size || !width) return;
    const k = Math.min(width / this.size.w, height / this.size.h, 1.15);
    this.at.k = whole ? k : Math.min(Math.max(k, Math.min(0.8, (1.6 * width) / this.size.w)), 1.15);
    this.at.x = (width - this.size.w * this.at.k) / 2;
    this.at.y = Math.max(26, (height - this.size.h * this.at.k) / 2);
    this.draw();
  }

  zoom(factor, x, y) {
    const k = Math.min(Math.max(this.at.k * factor, SCALES[0]), SCALES[1]);
    this.at.x = x - ((x - this.at.x) * k) / this.at.k;
    this.at.y = y - ((y - this.at.y) * k) / this.at.k;
    this.at.k = k;
    this.move();
  }

  zoomBy(factor) {
    const { width, height } = this.window();
    this.zoom(factor, width / 2, height / 2);
  }

  window() {
    const shown = this.panes.find(({ svg }) => svg.clientWidth > 0) || this.panes[0];
    return { width: shown.svg.clientWidth, height: shown.svg.clientHeight };
  }

  // Boxes of these nodes are marked: hovered, found by a search, or selected.
  mark(kind, nodes) {
    this[kind] = new Set(nodes.map((node) => this.visible(node)?.id));
    for (const { world } of this.panes) {
      world.querySelectorAll("[data-item]").forEach((box) =>
        box.classList.toggle(kind, this[kind].has(box.getAttribute("data-item"))));
    }
  }

  // --- drawing

  move() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  draw() {
    if (!this.overlay || !this.size) return;
    const { width, height } = this.window();
    const { x, y, k } = this.at;
    const area = [(-x - MARGIN) / k, (-y - MARGIN) / k, (width - x + MARGIN) / k,
      (height - y + MARGIN) / k];
    this.area = area;
    const boxes = [...this.items.values()].filter((box) => overlaps(box, area));
    const lines = this.lines.filter((line) => crosses(line.points, area));
    for (const pane of this.panes) {
      if (pane.svg.clientWidth) this.drawPane(pane, boxes, lines);
    }
  }

  drawPane(pane, boxes, lines) {
    const { x, y, k } = this.at;
    pane.world.setAttribute("transform", `translate(${x} ${y}) scale(${k})`);
    const [rooms, paths, leaves, links] = pane.layers;
    cleared(rooms, boxes.filter((box) => box.open && box.item.parent).map((box) => this.room(box)));
    cleared(paths, lines.map((line) => this.path(line, pane.side)).flat());
    cleared(leaves, boxes.filter((box) => !box.open).map((box) => this.box(box, pane.side)));
    cleared(links, this.links(pane.side));
  }

  box(box, side) {
    const shape = drawBox(this, box.item, box, paintOf(this, box.item, side), this.at.k < FAR);
    for (const kind of ["hot", "found", "selected"]) {
      if (this[kind]?.has(box.item.id)) shape.classList.add(kind);
    }
    return shape;
  }

  room(box) {
    const title = shortened(groupTitle(box.item), Math.floor((box.w - 24) / 6.4));
    return svgElement("g", {
      class: `room ${box.item.level % 2 ? "odd" : "even"}`, transform: `translate(${box.x} ${box.y})`, "data-item": box.item.id,
      "data-scope": box.item.scope, role: "button", "aria-expanded": "true",
      "aria-label": `module ${box.item.scope || box.item.label}`,
    }, [
      svgElement("rect", { class: "wall", width: box.w, height: box.h, rx: 8 }),
      svgElement("rect", { class: "bar", width: box.w, height: 24, rx: 8 }),
      svgElement("text", { x: 10, y: 16, class: "title" }, `▾ ${title}`),
    ]);
  }

  path(line, side) {
    const drawn = [];
    const both = line.forward && line.backward;
    const marker = `url(#arrow-${side})`;
    if (line.forward) {
      drawn.push(svgElement("path", { class: "line", d: smooth(line.points, both ? -5 : 0),
        "marker-end": marker }));
    }
    if (line.backward) {
      const points = line.forward ? [...line.points].reverse() : line.points;
      drawn.push(svgElement("path", { class: "line backward", d: smooth(points, both ? 5 : 0),
        "marker-end": `url(#arrow-back-${side})` }));
    }
    return drawn;
  }

  // From the selected node to whatever it reads and whoever reads it.
  links(side) {
    const { focus, inspection } = this;
    const state = side ? this.state : 0;
    if (focus === undefined || focus === null || !inspection.has(focus, state)) return [];
    const here = this.items.get(this.visible(focus)?.id);
    const drawn = [];
    const draw = (from, to, kind) => {
      if (!from || !to || from === to) return;
      const start = [from.x + from.w / 2, from.y + from.h / 2];
      const end = [to.x + to.w / 2, to.y + to.h / 2];
      const bend = Math.max(40, Math.abs(end[1] - start[1]) / 3);
      const d = `M${start} C${start[0]},${start[1] + bend} ${end[0]},${end[1] - bend} ${end}`;
      drawn.push(svgElement("path", { class: `link ${kind}`, d }));
    };
    for (const i of inspection.inputsAt(focus, state)) {
      draw(this.items.get(this.visible(i)?.id), here, "reads");
    }
    for (const i of inspection.readersAt(focus, state)) {
      draw(here, this.items.get(this.visible(i)?.id), "read");
    }
    return drawn;
  }

  // --- pointer

  grab(svg, start) {
    if (start.button !== 0) return;
    const { x, y } = this.at;
    this.dragged = false;
    const move = (event) => {
      const [dx, dy] = [event.clientX - start.clientX, event.clientY - start.clientY];
      if (!this.dragged && Math.hypot(dx, dy) < 4) return;
      this.dragged = true;
      this.at.x = x + dx;
      this.at.y = y + dy;
      this.move();
    };
    const stop = () => {
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", stop);
    };
    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", stop);
  }

  wheel(svg, event) {
    event.preventDefault();
    const { left, top } = svg.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) {
      this.zoom(Math.exp(-event.deltaY / 150), event.clientX - left, event.clientY - top);
      return;
    }
    this.at.x -= event.deltaX;
    this.at.y -= event.deltaY;
    this.move();
  }

  click(event) {
    if (this.dragged) return;
    const chip = event.target.closest(".chip[data-node]");
    const target = chip || event.target.closest("[data-item]");
    if (!target) {
      this.events.select(null);
      return;
    }
    const name = target.getAttribute("data-node");
    if (name !== null) this.events.select(this.inspection.index.get(name));
    else this.events.toggle(target.getAttribute("data-item"));
  }

  over(event) {
    const target = event.target.closest(".leaf, .group");
    const box = target && this.items.get(target.getAttribute("data-item"));
    this.events.hover(box ? box.item : null);
  }
}

// Edges of a level as [from, to, forward, backward]: one for forward work from one to the other
// together with the backward work that comes back.
function merged(item) {
  const found = new Map();
  const edges = [...item.edges.values()];
  for (const { a, b, backward } of edges) {
    if (!backward) found.set(`${a.id} ${b.id}`, [a.id, b.id, true, false]);
  }
  for (const { a, b, backward } of edges) {
    if (!backward) continue;
    const forward = found.get(`${b.id} ${a.id}`);
    if (forward) forward[3] = true;
    else found.set(`${a.id} ${b.id} back`, [a.id, b.id, false, true]);
  }
  return [...found.values()];
}

function overlaps(box, [left, top, right, bottom]) {
  return box.x < right && box.y < bottom && box.x + box.w > left && box.y + box.h > top;
}

function crosses(points, [left, top, right, bottom]) {
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  return Math.min(...xs) < right && Math.max(...xs) > left
    && Math.min(...ys) < bottom && Math.max(...ys) > top;
}

function smooth(points, shift) {
  const moved = points.map(([x, y]) => [x + shift, y]);
  let d = `M${moved[0]}`;
  for (let i = 1; i < moved.length - 1; i++) {
    const [x, y] = moved[i], [nx, ny] = moved[i + 1];
    const end = i === moved.length - 2 ? [nx, ny] : [(x + nx) / 2, (y + ny) / 2];
    d += ` Q${x},${y} ${end}`;
  }
  return moved.length === 2 ? `${d} L${moved[1]}` : d;
}

function arrows(side) {
  const arrow = (id, kind) => svgElement("marker", { id, class: kind, viewBox: "0 0 8 8", refX: 7,
    refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
  svgElement("path", { d: "M0,0.5 L7.5,4 L0,7.5 z" }));
  return svgElement("defs", {}, [arrow(`arrow-${side}`, "arrow"),
    arrow(`arrow-back-${side}`, "arrow backward")]);
}
