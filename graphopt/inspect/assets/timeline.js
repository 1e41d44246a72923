// Live bytes over the steps of a training step, stacked by category, with the budget and the place
// where the backward pass begins.

import { TIMELINE } from "./colours.js";
import { series } from "./data.js";
import { cleared, element, human, svgElement } from "./text.js";

const PAD = { left: 52, right: 10, top: 10, bottom: 18 };

export class Timeline {
  constructor(inspection, holder, side, events) {
    this.inspection = inspection;
    this.side = side;
    this.events = events;
    this.svg = svgElement("svg", { class: "chart", tabindex: 0, role: "slider",
      "aria-label": `live bytes ${side ? "after" : "before"}`, "aria-valuemin": 0 });
    this.caption = element("div", { class: "caption" });
    cleared(holder, [this.caption, this.svg]);
    this.svg.addEventListener("pointermove", (event) => this.pointed(event));
    this.svg.addEventListener("pointerleave", () => this.events.step(null, side));
    this.svg.addEventListener("click", (event) => this.chosen(event));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.step = null;
  }

  // `title` says which state this is: several have the same line where passes change no graph.
  show(line, top, title) {
    const same = this.line === line && this.top === top && this.title === title;
    if (same) return;
    this.title = title;
    this.line = line;
    this.top = top;
    this.rows = series(line);
    this.stepsOf = new Map();
    line.steps.forEach((node, i) => {
      if (!this.stepsOf.has(node)) this.stepsOf.set(node, []);
      this.stepsOf.get(node).push(i);
    });
    this.spansOf = new Map();
    for (const [node, start, end] of line.spans) {
      if (!this.spansOf.has(node)) this.spansOf.set(node, []);
      this.spansOf.get(node).push([start, end]);
    }
    this.svg.setAttribute("aria-valuemax", Math.max(0, line.steps.length - 1));
    this.draw();
  }

  draw() {
    this.width = this.svg.clientWidth || 400;
    this.height = this.svg.clientHeight || 110;
    const steps = this.line.steps.length;
    const parts = [this.axes()];
    if (steps) parts.push(...this.areas());
    if (this.line.boundary !== null) parts.push(this.boundary());
    if (this.line.budget) parts.push(this.budget());
    this.marks = svgElement("g", { class: "marks" });
    cleared(this.svg, [...parts, this.marks]);
    this.describe(null);
  }

  x(step) {
    const steps = Math.max(1, this.line.steps.length);
    return PAD.left + (step * (this.width - PAD.left - PAD.right)) / steps;
  }

  y(bytes) {
    return this.height - PAD.bottom
      - (bytes * (this.height - PAD.top - PAD.bottom)) / (this.top || 1);
  }

  axes() {
    const lines = [0, 0.5, 1].map((share) => svgElement("g", { class: "grid" }, [
      svgElement("line", { x1: PAD.left, x2: this.width - PAD.right, y1: this.y(share * this.top),
        y2: this.y(share * this.top) }),
      svgElement("text", { x: PAD.left - 6, y: this.y(share * this.top) + 4 },
        human(share * this.top, "bytes")),
    ]));
    return svgElement("g", {}, lines);
  }

  // One area for each category, at most one point for each pixel: the largest value in it.
  areas() {
    const steps = this.line.steps.length;
    const columns = Math.min(steps, Math.max(1, Math.floor(this.width - PAD.left - PAD.right)));
    const base = new Float64Array(columns);
    return this.line.categories.map((category, row) => {
      const low = base.slice();
      const values = this.rows[row];
      for (let column = 0; column < columns; column++) {
        base[column] += values[this.busiest(column, columns)];
      }
      const x = (column) => this.x((column * steps) / columns).toFixed(1);
      let d = "";
      for (let c = 0; c < columns; c++) {
        d += `${c ? "L" : "M"}${x(c)},${this.y(base[c]).toFixed(1)}H${x(c + 1)}`;
      }
      for (let c = columns - 1; c >= 0; c--) {
        d += `L${x(c + 1)},${this.y(low[c]).toFixed(1)}H${x(c)}`;
      }
      return svgElement("path", { class: "area", d: `${d}Z`, fill: TIMELINE[category] || "#888",
        "data-category": category });
    });
  }

  // Of the steps that share a column, the one with the most live bytes.
  busiest(column, columns) {
    const steps = this.line.steps.length;
    const from = Math.floor((column * steps) / columns);
    const to = Math.max(from + 1, Math.floor(((column + 1) * steps) / columns));
    let best = from;
    for (let i = from; i < to; i++) if (this.total(i) > this.total(best)) best = i;
    return best;
  }

  total(step) {
    return this.rows.reduce((sum, row) => sum + row[step], 0);
  }

  boundary() {
    const x = this.x(this.line.boundary);
    return svgElement("g", { class: "boundary" }, [
      svgElement("line", { x1: x, x2: x, y1: PAD.top - 4, y2: this.height - PAD.bottom }),
      svgElement("text", { x: x - 4, y: this.height - 5, "text-anchor": "end" }, "forward"),
      svgElement("text", { x: x + 4, y: this.height - 5 }, "backward"),
    ]);
  }

  budget() {
    const y = this.y(this.line.budget);
    return svgElement("g", { class: "budget" }, [
      svgElement("line", { x1: PAD.left, x2: this.width - PAD.right, y1: y, y2: y }),
      svgElement("text", { x: this.width - PAD.right - 2, y: y - 3, "text-anchor": "end" },
        `budget ${human(this.line.budget, "bytes")}`),
    ]);
  }

  // --- both ways: a step under the pointer, the steps of a node

  stepAt(event) {
    const { left } = this.svg.getBoundingClientRect();
    const share = (event.clientX - left - PAD.left) / (this.width - PAD.left - PAD.right);
    const step = Math.floor(share * this.line.steps.length);
    return step >= 0 && step < this.line.steps.length ? step : null;
  }

  pointed(event) {
    this.events.step(this.stepAt(event), this.side);
  }

  chosen(event) {
    const step = this.stepAt(event);
    if (step !== null) this.events.select(this.line.steps[step]);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -25, PageDown: 25 }[event.key];
    const last = this.line.steps.length - 1;
    if (last < 0) return;
    if (event.key === "Enter" && this.step !== null) this.events.select(this.line.steps[this.step]);
    else if (event.key === "Home") this.events.step(0, this.side);
    else if (event.key === "End") this.events.step(last, this.side);
    else if (move) {
      const from = this.step ?? (move > 0 ? -1 : last + 1);
      this.events.step(Math.min(Math.max(from + move, 0), last), this.side);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  describe(step) {
    this.step = step;
    const { line } = this;
    if (step === null) {
      cleared(this.caption, [element("b", {}, this.title),
        ` simulated peak ${human(line.peak, "bytes")}`]);
      return;
    }
    const parts = line.categories.map((category, row) => [category, this.rows[row][step]])
      .filter(([, bytes]) => bytes > 0);
    this.svg.setAttribute("aria-valuenow", step);
    cleared(this.caption, [
      element("b", {}, this.inspection.nodes[line.steps[step]].name),
      ` ${human(this.total(step), "bytes")} `,
      ...parts.map(([category, bytes]) => {
        const dot = element("i", { class: "dot" });
        dot.style.background = TIMELINE[category] || "#888";
        return element("span", {}, [dot, `${category} ${human(bytes, "bytes")} `]);
      }),
      ` · step ${step + 1} of ${line.steps.length}`,
    ]);
  }

  markStep(step) {
    this.describe(step);
    cleared(this.marks, step === null ? [] : [this.cursor(step)]);
  }

  // Where a node runs, and how long what it makes lives.
  markNodes(nodes) {
    const drawn = [];
    for (const node of nodes) {
      for (const [start, end] of this.spansOf.get(node) || []) {
        drawn.push(svgElement("rect", { class: "life", x: this.x(start), y: PAD.top,
          width: Math.max(1, this.x(end + 1) - this.x(start)),
          height: this.height - PAD.top - PAD.bottom }));
      }
      for (const step of this.stepsOf.get(node) || []) drawn.push(this.cursor(step));
      if (drawn.length > 200) break;
    }
    cleared(this.marks, drawn);
  }

  cursor(step) {
    const x = this.x(step + 0.5);
    return svgElement("line", { class: "cursor", x1: x, x2: x, y1: PAD.top - 4,
      y2: this.height - PAD.bottom });
  }
}
