// The inspection as the page uses it: nodes by name, who reads them, and what each state has.

export const FORMAT = "graphopt.inspection";
export const VERSION = 2;

export class Inspection {
  constructor(data) {
    if (data.format !== FORMAT) throw new Error("This file holds no graphopt inspection.");
    if (data.schema_version !== VERSION) {
      throw new Error(
        `This inspection has schema version ${data.schema_version}; this page reads ${VERSION}.`);
    }
    this.data = data;
    this.nodes = data.nodes;
    this.index = new Map(this.nodes.map((node, i) => [node.name, i]));
    this.inputs = this.nodes.map((node) => this.indices(node.inputs));
    this.last = data.snapshots.length - 1;
    this.states = [];
    const present = new Set();
    const changes = new Map();
    for (const snapshot of data.snapshots) {
      snapshot.added.forEach((i) => present.add(i));
      snapshot.removed.forEach((i) => present.delete(i));
      for (const [i, fields] of Object.entries(snapshot.changed)) {
        changes.set(Number(i), { ...changes.get(Number(i)), ...fields });
      }
      this.states.push({ snapshot, present: new Set(present), changes: new Map(changes) });
    }
    this.readers = this.nodes.map(() => []);
    this.edges = [];
    const seen = new Set();
    const link = (from, to) => {
      const key = from * this.nodes.length + to;
      if (seen.has(key)) return;
      seen.add(key);
      this.edges.push([from, to]);
      this.readers[from].push(to);
    };
    this.inputs.forEach((inputs, to) => inputs.forEach((from) => link(from, to)));
    for (const state of this.states) {
      for (const [to, fields] of state.changes) {
        this.indices(fields.inputs || []).forEach((from) => link(from, to));
      }
    }
  }

  indices(names) {
    return (names || []).map((name) => this.index.get(name)).filter((i) => i !== undefined);
  }

  has(i, state) {
    return this.states[state].present.has(i);
  }

  // A node as it is in a state.
  at(i, state) {
    const changed = this.states[state].changes.get(i);
    return changed ? { ...this.nodes[i], ...changed } : this.nodes[i];
  }

  inputsAt(i, state) {
    const changed = this.states[state].changes.get(i);
    return changed && changed.inputs ? this.indices(changed.inputs) : this.inputs[i];
  }

  readersAt(i, state) {
    return this.readers[i].filter((r) => this.has(r, state) && this.inputsAt(r, state).includes(i));
  }

  again(i, state) {
    return (this.states[state].snapshot.again || {})[i] || 1;
  }

  // What became of a node between two states: same, changed, added, removed, or absent.
  fate(i, before, after) {
    const was = this.has(i, before), is = this.has(i, after);
    if (was && is) {
      return this.states[after].changes.has(i) || this.again(i, after) > 1 ? "changed" : "same";
    }
    return was ? "removed" : is ? "added" : "absent";
  }

  source(i) {
    const at = this.nodes[i].source;
    return at === undefined ? "" : this.data.sources[at];
  }

  timeline(state) {
    return this.data.timelines[this.states[state].snapshot.timeline];
  }
}

export function isBackward(node) {
  return node.phase !== undefined && node.phase !== "forward";
}

// Bytes of each category at each step of a timeline: one array for each category.
export function series(line) {
  const steps = line.steps.length;
  const rows = line.categories.map(() => new Float64Array(steps + 1));
  for (const [, start, end, bytes, category] of line.spans) {
    rows[category][start] += bytes;
    rows[category][Math.min(end + 1, steps)] -= bytes;
  }
  for (const row of rows) for (let i = 1; i < steps; i++) row[i] += row[i - 1];
  const workspace = line.categories.indexOf("workspace");
  line.workspace.forEach((bytes, i) => { rows[workspace][i] += bytes; });
  return rows.map((row) => row.subarray(0, steps));
}
