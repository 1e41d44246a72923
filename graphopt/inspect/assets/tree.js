// The tree of module scopes.  A group holds the forward and the backward work of one module; nodes
// that only name a result (the gradient of a parameter, the new value of a buffer) are chips on the
// node that makes it.  Long rows of nodes are cut into parts, so that no level is too large to draw.

import { isBackward } from "./data.js";
import { lastPart, own } from "./text.js";

const LARGEST_LEVEL = 160;
const PART = 80;
const LOOSE = 12; // so many nodes may stand between the modules of a level
const BUNDLE = 8;

export function buildTree(inspection) {
  const builder = new TreeBuilder(inspection);
  return builder.build();
}

class TreeBuilder {
  constructor(inspection) {
    this.inspection = inspection;
    this.root = group("", "", null);
    this.groups = new Map([["", this.root]]);
    this.leaves = new Array(inspection.nodes.length);
    this.scopes = []; // the scope under which each node stands
    this.chips = new Map(); // folded node -> the node that carries it
  }

  build() {
    const { nodes } = this.inspection;
    nodes.forEach((node, i) => this.fold(node, i));
    nodes.forEach((node, i) => { if (!this.chips.has(i)) this.place(node, i); });
    joinChains(this.root);
    this.bundle();
    this.cut(this.root);
    this.count(this.root, 0);
    const tree = { root: this.root, groups: new Map(), leaves: this.leaves, chips: this.chips };
    walk(this.root, (item) => { if (item.children) tree.groups.set(item.id, item); });
    this.link();
    return tree;
  }

  fold(node, i) {
    const inputs = this.inspection.inputs[i];
    const result = /^(gradient|mutation) /.exec(node.name);
    if (result && inputs.length === 1 && this.inspection.readers[i].length === 0) {
      this.chips.set(i, inputs[0]);
    }
  }

  place(node, i) {
    const scope = this.scopes[i] = this.scopeOf(node, i);
    const parent = this.groupOf(scope);
    const leaf = { id: `n${i}`, node: i, parent, level: 0 };
    this.leaves[i] = leaf;
    parent.children.push(leaf);
  }

  scopeOf(node, i) {
    if (node.op === "output") return this.scopeOfResult(node);
    const added = !this.inspection.has(i, 0);
    if (node.scope || node.op !== "call" || !(isBackward(node) || added)) return node.scope || "";
    // What passes add belongs to no module: it stands with what it reads.  So do sums of gradients:
    // they stand beside what was added last.
    const scopes = this.inspection.inputs[i].filter((input) => this.scopes[input])
      .sort((a, b) => a - b).map((input) => [this.scopes[input], this.inspection.nodes[input].scope]);
    if (!scopes.length) return "";
    const [scope, itsOwn] = scopes[scopes.length - 1];
    if (added) return scope;
    return itsOwn ? scope.slice(0, Math.max(0, scope.lastIndexOf("."))) : scope;
  }

  scopeOfResult(node) {
    const path = node.name.replace(/^(gradient|mutation) /, "");
    const scope = path === node.name ? "" : path.slice(0, Math.max(0, path.lastIndexOf(".")));
    return this.groups.has(scope) ? scope : "";
  }

  groupOf(scope) {
    const known = this.groups.get(scope);
    if (known) return known;
    const parent = this.groupOf(scope.includes(".") ? scope.slice(0, scope.lastIndexOf(".")) : "");
    const made = group(scope, lastPart(scope), parent);
    made.module = own(this.inspection.data.modules, scope) || "";
    this.groups.set(scope, made);
    parent.children.push(made);
    return made;
  }

  // Nodes between modules that hang together, such as those that make a mask, are shown as one group
  // where there are many.
  bundle() {
    const sets = new Sets();
    for (const [from, to] of this.inspection.edges) {
      const [a, b] = [this.leaves[from], this.leaves[to]];
      if (!a || !b || a.parent !== b.parent || this.isSize(from, to)) continue;
      const { nodes } = this.inspection;
      if (isBackward(nodes[from]) === isBackward(nodes[to])) sets.join(a, b);
    }
    walk(this.root, (item) => {
      if (!item.children || item.bundled) return;
      const loose = item.children.filter((child) => !child.children
        && this.inspection.nodes[child.node].op === "call");
      if (loose.length <= LOOSE || loose.length === item.children.length) return;
      const bundles = new Map();
      loose.forEach((leaf) => {
        const first = sets.find(leaf);
        if (!bundles.has(first)) bundles.set(first, []);
        bundles.get(first).push(leaf);
      });
      for (const leaves of bundles.values()) {
        if (leaves.length < BUNDLE) continue;
        const made = group(item.scope, `ops`, item);
        made.id = `${item.id}/ops${leaves[0].node}`;
        made.bundled = true;
        made.children = leaves;
        const at = item.children.indexOf(leaves[0]);
        item.children[at] = made;
        item.children = item.children.filter((child) => !leaves.includes(child));
        leaves.forEach((leaf) => { leaf.parent = made; });
      }
    });
  }

  // Cuts the children of a group into parts of consecutive ones where there are too many.
  cut(item) {
    item.children.forEach((child) => { if (child.children) this.cut(child); });
    let depth = 0;
    while (item.children.length > LARGEST_LEVEL) {
      const parts = [];
      for (let at = 0; at < item.children.length; at += PART) {
        const children = item.children.slice(at, at + PART);
        const part = group(item.id, "", item);
        part.id = `${item.id}/${depth}.${at / PART}`;
        part.label = `part ${at / PART + 1}`;
        part.part = true;
        part.children = children;
        children.forEach((child) => { child.parent = part; });
        parts.push(part);
      }
      item.children = parts;
      depth += 1;
    }
  }

  count(item, level) {
    item.level = level;
    item.nodes = [];
    for (const child of item.children) {
      if (child.children) {
        this.count(child, level + 1);
        for (const node of child.nodes) item.nodes.push(node);
      } else {
        child.level = level + 1;
        item.nodes.push(child.node);
      }
    }
  }

  // Sizes run from the inputs to everywhere: drawn only where nothing else leads to their reader.
  isSize(from, to) {
    const { nodes, inputs } = this.inspection;
    const size = (i) => (nodes[i].type || "").startsWith("size ");
    return size(from) && inputs[to].some((i) => !size(i));
  }

  // Edges of each level: between children of one group, forward and backward ones apart.
  link() {
    for (const [from, to] of this.inspection.edges) {
      if (this.isSize(from, to)) continue;
      let a = this.leaves[this.chips.has(from) ? this.chips.get(from) : from];
      let b = this.leaves[this.chips.has(to) ? this.chips.get(to) : to];
      if (!a || !b || a === b) continue;
      while (a.parent !== b.parent) {
        if (a.level >= b.level && a.parent) a = a.parent;
        else b = b.parent;
      }
      if (a === b) continue;
      const { nodes } = this.inspection;
      const backward = isBackward(nodes[from]) && isBackward(nodes[to]);
      const key = `${a.id} ${b.id} ${backward}`;
      const known = a.parent.edges.get(key);
      if (known) known.pairs.push([from, to]);
      else a.parent.edges.set(key, { a, b, backward, pairs: [[from, to]] });
    }
  }
}

// Disjoint sets of leaves.
class Sets {
  constructor() {
    this.parents = new Map();
  }

  find(leaf) {
    let at = leaf;
    while (this.parents.has(at)) at = this.parents.get(at);
    return at;
  }

  join(a, b) {
    const [first, second] = [this.find(a), this.find(b)];
    if (first !== second) this.parents.set(second, first);
  }
}

function group(scope, label, parent) {
  const id = `g${scope}`;
  return { id, scope, label, parent, module: "", children: [], edges: new Map(), nodes: [] };
}

function walk(item, visit) {
  visit(item);
  (item.children || []).forEach((child) => walk(child, visit));
}

// A group that holds nothing but one other group is shown as one: transformer.h
function joinChains(item) {
  item.children = item.children.map((child) => {
    while (child.children && child.children.length === 1 && child.children[0].children) {
      const [inner] = child.children;
      inner.label = `${child.label}.${inner.label}`;
      inner.parent = item;
      child = inner;
    }
    if (child.children) joinChains(child);
    return child;
  });
}

// The groups that are open at first: those that hold most of the nodes, while all fits.
export function initiallyOpen(root, limit = 90) {
  const open = new Set([root.id]);
  let visible = root.children.length;
  for (;;) {
    const candidates = [];
    walk(root, (item) => {
      if (item.children && !open.has(item.id) && open.has(item.parent.id)
        && item.nodes.length > 0.4 * root.nodes.length
        && visible + item.children.length <= limit) candidates.push(item);
    });
    if (candidates.length === 0) return open;
    open.add(candidates[0].id);
    visible += candidates[0].children.length - 1;
  }
}

export function ancestors(item) {
  const found = [];
  for (let at = item.parent; at; at = at.parent) found.push(at);
  return found;
}
