// Ties the parts together: what is selected, which state and overlay are shown, the address, keys.

import { Overlay } from "./colours.js";
import { Inspection } from "./data.js";
import { GraphView } from "./graph.js";
import { showPanel } from "./panel.js";
import { Search } from "./search.js";
import { showSummary } from "./summary.js";
import { cleared, element } from "./text.js";
import { Timeline } from "./timeline.js";
import { buildTree } from "./tree.js";

const byId = (id) => document.getElementById(id);

export function start() {
  setTheme(stored("theme"));
  byId("theme").addEventListener("click", otherTheme);
  try {
    const data = JSON.parse(byId("inspection").textContent);
    window.inspector = new App(new Inspection(data));
  } catch (error) {
    byId("failure").hidden = false;
    byId("failure").textContent = error.message;
    document.body.dataset.tab = "failure";
  }
}

class App {
  constructor(inspection) {
    this.inspection = inspection;
    this.tree = buildTree(inspection);
    this.tree.carried = new Map();
    for (const [folded, carrier] of this.tree.chips) {
      if (!this.tree.carried.has(carrier)) this.tree.carried.set(carrier, []);
      this.tree.carried.get(carrier).push(folded);
    }
    this.state = inspection.last;
    this.selected = null;
    this.known = this.overlayList();
    this.compares = inspection.last > 0;
    document.body.dataset.sides = this.compares ? "2" : "1";
    showSummary(byId("summary"), inspection);
    this.fillPasses();
    this.fillOverlays();
    this.search = new Search(this, byId("search"), byId("results"));
    this.wire();
    this.readAddress();
    this.prepare();
  }

  // The graph is laid out while the summary is read.
  prepare() {
    if (document.body.dataset.tab !== "graph") {
      setTimeout(() => { if (!this.graph) this.makeGraph(); }, 150);
    }
  }

  overlayList() {
    const { data, last } = this.inspection;
    const fates = { same: "as captured", changed: "other arguments, or runs again",
      added: "by a pass", removed: "by a pass" };
    const change = { name: "change", title: "what changed", kind: "categorical", legend: fates };
    return last > 0 ? [...data.overlays, change] : data.overlays;
  }

  // Every overlay as it is in the state that is shown.
  overlays() {
    if (this.madeFor !== this.state) {
      this.made = this.known.map((data) => ({ data, overlay: null }));
      this.madeFor = this.state;
    }
    for (const entry of this.made) {
      entry.overlay ||= new Overlay(this.inspection, entry.data, this.state);
    }
    return this.made;
  }

  overlay() {
    const data = this.known.find(({ name }) => name === this.overlayName) || this.known[0];
    return new Overlay(this.inspection, data, this.state);
  }

  // --- what is shown

  async tab(name) {
    document.body.dataset.tab = name;
    byId("to-summary").setAttribute("aria-pressed", String(name === "summary"));
    byId("to-graph").setAttribute("aria-pressed", String(name === "graph"));
    if (name !== "graph") return;
    if (!this.graph) await this.makeGraph();
    else if (this.unseen) {
      this.unseen = false;
      this.graph.fit();
      this.lines.forEach((line) => line.draw());
    }
  }

  makeGraph() {
    this.ready ||= this.buildGraph();
    return this.ready;
  }

  async buildGraph() {
    const events = {
      select: (i) => this.select(i),
      toggle: (id) => this.toggle(id),
      hover: (item) => this.hover(item),
    };
    this.graph = new GraphView(this.inspection, this.tree, [byId("before"), byId("after")], events);
    const holders = [byId("timeline-before"), byId("timeline-after")];
    const stepped = { select: (i) => this.select(i, true), step: (s, side) => this.step(s, side) };
    this.lines = holders.map((holder, side) => new Timeline(this.inspection, holder, side, stepped));
    byId("empty").hidden = this.inspection.nodes.length > 0;
    this.showState();
    await this.graph.relayout();
    this.graph.fit();
    this.lines.forEach((line) => line.draw());
    this.unseen = document.body.dataset.tab !== "graph";
    document.documentElement.dataset.ready = "graph";
  }

  showState() {
    if (!this.graph) return;
    const overlay = this.overlay();
    this.graph.show(this.state, overlay);
    this.showLegend(overlay);
    const lines = [this.inspection.timeline(0), this.inspection.timeline(this.state)];
    const top = Math.max(...lines.map((line) => Math.max(line.peak, line.budget || 0)));
    const { snapshot } = this.inspection.states[this.state];
    const title = this.state ? `after ${snapshot.label}` : "as captured";
    this.lines.forEach((line, side) => line.show(lines[side], top, side ? title : "before"));
    byId("after-title").textContent = title + (snapshot.recorded ? "" : " (graph not recorded)");
    this.showPanel();
  }

  showPanel() {
    showPanel(byId("panel"), this, this.selected);
  }

  showLegend(overlay) {
    const legend = overlay.legend();
    const frames = this.compares ? ["added", "changed", "gone"].map((kind) =>
      element("span", { class: "entry frames" }, [element("i", { class: `swatch ${kind}` }), kind]))
      : [];
    if (overlay.kind === "categorical") {
      cleared(byId("legend"), [...legend.map(({ colour, label, meaning }) => {
        const swatch = element("i", { class: "swatch" });
        swatch.style.background = colour;
        return element("span", { title: meaning || null, class: "entry value" }, [swatch, label]);
      }), ...frames]);
      return;
    }
    const scale = element("i", { class: "scale" });
    scale.style.background = `linear-gradient(to right, ${legend.stops.join(", ")})`;
    cleared(byId("legend"), [element("span", { class: "entry value" },
      [`${legend.low} `, scale, ` ${legend.high}`]), ...frames]);
  }

  // --- events

  async select(i, reveal = false) {
    this.selected = i ?? null;
    if (i !== null && reveal) {
      await this.tab("graph");
      await this.graph.reveal(i);
    }
    this.showPanel();
    this.markSelected();
    this.writeAddress();
  }

  markSelected() {
    if (!this.graph) return;
    const nodes = this.selected === null ? [] : [this.selected];
    this.graph.focus = this.selected;
    this.graph.mark("selected", nodes);
    this.graph.draw();
    this.lines.forEach((line) => line.markNodes(nodes));
  }

  async toggle(id) {
    if (await this.graph.toggle(id)) this.remark();
  }

  remark() {
    this.graph.mark("found", this.search.found || []);
    this.markSelected();
  }

  hover(item) {
    const nodes = item === null ? [] : item.children ? item.nodes : [item.node];
    const shown = nodes.length || this.selected === null ? nodes : [this.selected];
    this.graph.mark("hot", nodes);
    this.lines.forEach((line) => line.markNodes(shown));
  }

  step(step, side) {
    const line = this.lines[side];
    line.markStep(step);
    if (step === null) {
      this.hover(null);
      return;
    }
    const node = line.line.steps[step];
    this.graph.mark("hot", [node]);
    this.lines[1 - side].markNodes([node]);
  }

  found(nodes) {
    if (this.graph) this.graph.mark("found", nodes);
  }

  setState(state) {
    this.state = Math.min(Math.max(state, 0), this.inspection.last);
    byId("passes").value = this.state;
    byId("passes").setAttribute("aria-valuetext",
      this.inspection.states[this.state].snapshot.label);
    byId("pass-label").textContent = this.inspection.states[this.state].snapshot.label;
    this.showState();
    this.markSelected();
    this.writeAddress();
  }

  setOverlay(name) {
    this.overlayName = name;
    byId("overlay").value = name;
    if (!this.graph) return;
    const overlay = this.overlay();
    this.graph.show(this.state, overlay);
    this.showLegend(overlay);
    this.writeAddress();
  }

  // --- controls

  fillPasses() {
    const slider = byId("passes");
    slider.max = this.inspection.last;
    slider.value = this.state;
    byId("pass-label").textContent = this.inspection.states[this.state].snapshot.label;
    slider.closest("label").hidden = !this.compares;
  }

  fillOverlays() {
    const names = this.known.map(({ name }) => name);
    const wish = ["decision", "linearized", "channels", "relevance", "change", "phase"];
    this.firstOverlay = wish.find((name) => names.includes(name)) || names[0];
    this.overlayName = this.firstOverlay;
    cleared(byId("overlay"), this.known.map(({ name, title, pass }) =>
      element("option", { value: name, title: pass || null }, title)));
    byId("overlay").value = this.overlayName;
  }

  wire() {
    byId("to-summary").addEventListener("click", () => this.tab("summary"));
    byId("to-graph").addEventListener("click", () => this.tab("graph"));
    byId("passes").addEventListener("input", (event) => this.setState(Number(event.target.value)));
    byId("overlay").addEventListener("change", (event) => this.setOverlay(event.target.value));
    byId("side").addEventListener("click", () => this.otherSide());
    byId("zoom-in").addEventListener("click", () => this.graph.zoomBy(1.3));
    byId("zoom-out").addEventListener("click", () => this.graph.zoomBy(1 / 1.3));
    byId("zoom-fit").addEventListener("click", () => this.graph.fit(true));
    byId("open-all").addEventListener("click", () => this.openAll(true));
    byId("close-all").addEventListener("click", () => this.openAll(false));
    window.addEventListener("hashchange", () => this.readAddress());
    window.addEventListener("resize", () => this.resized());
    document.addEventListener("keydown", (event) => this.key(event));
  }

  async openAll(open) {
    await this.makeGraph();
    await this.graph.openAll(open);
    this.remark();
  }

  otherSide() {
    const now = document.body.dataset.side === "before" ? "after" : "before";
    document.body.dataset.side = now;
    byId("side").textContent = now === "after" ? "show before" : "show after";
    if (this.graph) this.graph.draw();
    this.lines?.forEach((line) => line.draw());
  }

  resized() {
    if (!this.graph || document.body.dataset.tab !== "graph") return;
    this.graph.draw();
    this.lines.forEach((line) => line.draw());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const slides = event.target.matches("[type=range]"); // it takes arrows, and leaves letters
    const typing = event.target.matches("input, select, textarea") && !slides;
    if ((typing && event.key !== "Escape") || (slides && event.key.startsWith("Arrow"))) return;
    const does = this.keys()[event.key];
    if (!does) return;
    if (event.key === "Enter" && event.target.matches("button, summary, a")) return;
    event.preventDefault();
    does();
  }

  keys() {
    const onGraph = document.body.dataset.tab === "graph" && this.graph;
    const always = {
      "/": () => { byId("search").focus(); byId("search").select(); },
      "s": () => this.tab("summary"),
      "g": () => this.tab("graph"),
      "t": otherTheme,
      "[": () => this.setState(this.state - 1),
      "]": () => this.setState(this.state + 1),
      "o": () => this.nextOverlay(),
      "Escape": () => this.select(null),
    };
    if (!onGraph) return always;
    return { ...always,
      "e": () => this.openAll(true),
      "c": () => this.openAll(false),
      "f": () => this.graph.fit(true),
      "+": () => this.graph.zoomBy(1.3),
      "-": () => this.graph.zoomBy(1 / 1.3),
      "ArrowUp": () => this.along(this.inspection.inputsAt(this.selected ?? 0, this.state)),
      "ArrowDown": () => this.along(this.inspection.readersAt(this.selected ?? 0, this.state)),
      "ArrowLeft": () => this.beside(-1),
      "ArrowRight": () => this.beside(1),
      "Enter": () => this.toggleAround(),
    };
  }

  nextOverlay() {
    const at = this.known.findIndex(({ name }) => name === this.overlayName);
    this.setOverlay(this.known[(at + 1) % this.known.length].name);
  }

  along(nodes) {
    if (this.selected === null) this.beside(1);
    else if (nodes.length) this.select(nodes[0], true);
  }

  beside(by) {
    const count = this.inspection.nodes.length;
    if (!count) return;
    const at = this.selected === null ? (by > 0 ? 0 : count - 1) : this.selected + by;
    if (at >= 0 && at < count) this.select(at, true);
  }

  toggleAround() {
    if (this.selected === null) return;
    const item = this.graph.visible(this.selected);
    const group = item.children ? item : item.parent;
    if (group.parent) this.toggle(group.id);
  }

  // --- the address: #node=NAME&pass=2&overlay=saved

  readAddress() {
    const text = location.hash.slice(1);
    if (text === this.written) return;
    const wanted = new URLSearchParams(text.replaceAll("+", "%2B"));
    const overlay = wanted.get("overlay");
    if (this.known.some(({ name }) => name === overlay)) this.setOverlay(overlay);
    if (wanted.has("pass") && /^\d+$/.test(wanted.get("pass"))) {
      this.setState(Number(wanted.get("pass")));
    }
    const node = this.inspection.index.get(wanted.get("node"));
    if (node !== undefined) this.select(node, true);
    else if (wanted.has("pass") || overlay) this.tab("graph");
    else if (!this.graph) this.tab("summary");
  }

  writeAddress() {
    const parts = [];
    if (this.selected !== null) {
      parts.push(`node=${encodeURIComponent(this.inspection.nodes[this.selected].name)}`);
    }
    if (this.overlayName !== this.firstOverlay) {
      parts.push(`overlay=${encodeURIComponent(this.overlayName)}`);
    }
    if (this.state !== this.inspection.last) parts.push(`pass=${this.state}`);
    this.written = parts.join("&");
    if (location.hash.slice(1) !== this.written) {
      history.replaceState(null, "", this.written ? `#${this.written}` : location.pathname);
    }
  }
}

// --- light and dark: as the system has it, until somebody chooses

function setTheme(name) {
  if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
}

function otherTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme || system;
  const other = now === "dark" ? "light" : "dark";
  setTheme(other);
  try {
    localStorage.setItem("graphopt-theme", other);
  } catch { /* a page that may keep nothing */ }
}

function stored(name) {
  try {
    return localStorage.getItem(`graphopt-${name}`);
  } catch {
    return null;
  }
}

start();
