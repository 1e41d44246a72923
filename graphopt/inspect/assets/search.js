// Search by name, op, scope, and the node of the forward graph that one was traced from.

import { cleared, element } from "./text.js";

const MOST = 30;

export class Search {
  constructor(app, input, list) {
    this.app = app;
    this.input = input;
    this.list = list;
    this.texts = app.inspection.nodes.map((node) =>
      [node.name, node.target, node.scope, node.module, node.origin].join("\n").toLowerCase());
    input.addEventListener("input", () => this.look());
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("focus", () => { if (input.value) this.look(); });
    document.addEventListener("pointerdown", (event) => {
      if (!list.contains(event.target) && event.target !== input) this.close();
    });
  }

  look() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    if (words.length) {
      this.texts.forEach((text, i) => {
        if (words.every((word) => text.includes(word))) found.push(i);
      });
      const exact = (i) => (this.app.inspection.nodes[i].name.toLowerCase() === words[0] ? 0 : 1);
      found.sort((a, b) => exact(a) - exact(b) || a - b);
    }
    this.found = found;
    this.at = -1;
    this.app.found(found);
    this.show(words.length > 0);
  }

  show(open) {
    const { nodes } = this.app.inspection;
    const items = this.found.slice(0, MOST).map((i, at) => element("li", { role: "option",
      id: `found-${at}`, "data-to": nodes[i].name, "aria-selected": at === this.at ? "true" : "false",
      onclick: () => this.go(i) }, [element("b", {}, nodes[i].name), element("span",
      { class: "muted" }, ` ${[nodes[i].target, nodes[i].scope].filter(Boolean).join(" · ")}`)]));
    const count = element("li", { class: "count muted" }, this.found.length === 0 ? "nothing found"
      : `${this.found.length} found${this.found.length > MOST ? `, the first ${MOST}` : ""}`);
    cleared(this.list, [count, ...items]);
    this.list.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open));
    if (this.at >= 0) this.input.setAttribute("aria-activedescendant", `found-${this.at}`);
  }

  key(event) {
    const last = Math.min(this.found?.length || 0, MOST) - 1;
    if (event.key === "ArrowDown") this.at = Math.min(this.at + 1, last);
    else if (event.key === "ArrowUp") this.at = Math.max(this.at - 1, -1);
    else if (event.key === "Enter") {
      if (last >= 0) this.go(this.found[Math.max(0, this.at)]);
      return;
    } else if (event.key === "Escape") {
      this.input.value = "";
      this.look();
      this.input.blur();
      return;
    } else return;
    event.preventDefault();
    this.show(true);
  }

  go(i) {
    this.close();
    this.input.blur();
    this.app.select(i, true);
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
  }
}
