// Colours of overlays.  Categories: Okabe and Ito's palette; numbers: scales that keep their order
// of lightness, so that they can be told apart without telling hues apart.

import { human, own } from "./text.js";

const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b9a900",
  "#8a8f98"];
const SEQUENTIAL = ["#fdf6d0", "#b9dfc0", "#5cb6c4", "#2b7bba", "#16325c"];
const DIVERGING = ["#1a4f8b", "#7fb0d6", "#f5f5f3", "#f0a868", "#a34a00"];
const KNOWN = { // what is shown often keeps its colour from page to page
  forward: 0, backward: 5, recomputed: 1, keep: 2, recompute: 1, kept: 2, replaced: 5, "in part": 1,
  same: 7, changed: 1, added: 2, removed: 5, pruned: 5, frozen: 7,
};
export const TIMELINE = {
  saved: "#009e73", forward: "#56b4e9", recomputed: "#e69f00", backward: "#d55e00",
  workspace: "#8a8f98",
};

function mix(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [stops[low], stops[low + 1]].map((hex) =>
    [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const rgb = a.map((value, i) => Math.round(value + (b[i] - value) * (place - low)));
  return `#${rgb.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

// Black or white, whichever is read better on a colour.
export function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255)
    .map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.27 ? "#111" : "#fff";
}

// An overlay of an inspection with what it takes to draw it.
export class Overlay {
  constructor(inspection, data, state) {
    this.inspection = inspection;
    this.data = data;
    this.state = state;
    this.kind = data.kind;
    this.unit = data.unit || "";
    this.cache = new Map();
    if (this.kind === "categorical") this.nameCategories();
    else this.measure();
  }

  // Value of a node before (side 0) or in the state that is shown (side 1); undefined if none.
  value(i, side) {
    const { data, inspection } = this;
    const { name } = inspection.nodes[i];
    if (data.name === "change") return inspection.fate(i, 0, this.state);
    if (data.field) return inspection.at(i, side ? this.state : 0)[data.field];
    if (side === 0) {
      // What a pass did is shown before it only of what is gone afterwards.
      if (data.since !== undefined && !data.before && inspection.has(i, inspection.last)) {
        return undefined;
      }
      return own(data.before || data.values, name);
    }
    if (this.state >= (data.since ?? inspection.last)) return own(data.values, name);
    return data.before ? own(data.before, name) : undefined;
  }

  note(i) {
    return this.data.notes ? own(this.data.notes, this.inspection.nodes[i].name) : undefined;
  }

  nameCategories() {
    const counts = new Map();
    this.inspection.nodes.forEach((_, i) => {
      for (const side of [0, 1]) {
        const value = this.value(i, side);
        if (value !== undefined) counts.set(value, (counts.get(value) || 0) + 1);
      }
    });
    this.categories = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
    const taken = new Set();
    this.colours = new Map();
    for (const name of this.categories) {
      if (own(KNOWN, name) !== undefined) {
        this.colours.set(name, CATEGORIES[KNOWN[name]]);
        taken.add(KNOWN[name]);
      }
    }
    let next = 0;
    for (const name of this.categories) {
      if (this.colours.has(name)) continue;
      while (taken.has(next) && next < CATEGORIES.length - 1) next += 1;
      taken.add(next);
      this.colours.set(name, CATEGORIES[next]);
    }
  }

  measure() {
    this.top = 0;
    this.inspection.nodes.forEach((_, i) => {
      for (const side of [0, 1]) this.top = Math.max(this.top, Math.abs(this.value(i, side) || 0));
    });
    if (this.unit === "fraction") this.top = Math.max(this.top, 1);
  }

  colour(value) {
    if (value === undefined || value === null) return null;
    if (this.kind === "categorical") return this.colours.get(value) || CATEGORIES[7];
    const share = this.top ? value / this.top : 0;
    if (this.kind === "diverging") return mix(DIVERGING, 0.5 + share / 2);
    if (!value && this.unit !== "fraction") return null;
    // The eye tells small ones apart too where sizes span orders of magnitude.
    return mix(SEQUENTIAL, this.unit === "fraction" ? share : Math.sqrt(share));
  }

  // What a closed group shows: shares of categories, or the largest value and the sum.
  group(item, side) {
    const key = `${item.id} ${side}`;
    if (!this.cache.has(key)) this.cache.set(key, this.aggregate(item.nodes, side));
    return this.cache.get(key);
  }

  aggregate(nodes, side) {
    const { inspection } = this;
    const found = { counts: new Map(), total: 0, sum: 0, extreme: undefined, known: 0 };
    for (const i of nodes) {
      if (this.data.name !== "change" && !inspection.has(i, side ? this.state : 0)) continue;
      const value = this.value(i, side);
      if (value === undefined || value === null || value === "absent") continue;
      found.known += 1;
      if (this.kind === "categorical") {
        found.counts.set(value, (found.counts.get(value) || 0) + 1);
        found.total += 1;
      } else {
        found.sum += value;
        if (found.extreme === undefined || Math.abs(value) > Math.abs(found.extreme)) {
          found.extreme = value;
        }
        if (this.unit === "fraction") found.low = Math.min(found.low ?? value, value);
      }
    }
    return found;
  }

  legend() {
    if (this.kind === "categorical") {
      const meanings = this.data.legend || {};
      return this.categories.filter((name) => name !== "absent").map((name) => ({
        colour: this.colours.get(name), label: String(name), meaning: own(meanings, name),
      }));
    }
    const low = this.kind === "diverging" ? -this.top : 0;
    const stops = [0, 0.25, 0.5, 0.75, 1].map((at) =>
      mix(this.kind === "diverging" ? DIVERGING : SEQUENTIAL, at));
    return { stops, low: human(low, this.unit), high: human(this.top, this.unit) };
  }
}
