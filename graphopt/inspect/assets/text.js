// Numbers and names for people, and elements made without ever parsing text as HTML.

const UNITS = {
  bytes: ["B", "kB", "MB", "GB", "TB"],
  flops: ["", "k", "M", "G", "T", "P"],
  "": ["", "k", "M", "G", "T", "P"],
};

// What an object has by itself: names of models may be those of every object, such as constructor.
export function own(object, key) {
  return Object.prototype.hasOwnProperty.call(object, key) ? object[key] : undefined;
}

export function human(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (unit === "fraction") return `${round(100 * value)} %`;
  if (unit === "seconds") return seconds(value);
  const units = UNITS[unit] || UNITS[""];
  if (Math.abs(value) < 1 && unit === "") return String(round(value));
  let size = value, at = 0;
  while (Math.abs(size) >= 999.5 && at < units.length - 1) { size /= 1000; at += 1; }
  return `${round(size)} ${units[at]}`.trim();
}

function round(value) {
  return Number(value.toPrecision(3));
}

function seconds(value) {
  if (value >= 1) return `${round(value)} s`;
  return value >= 1e-3 ? `${round(1e3 * value)} ms` : `${round(1e6 * value)} µs`;
}

export function shortened(text, length) {
  return text.length <= length ? text : `${text.slice(0, length - 1)}…`;
}

// Path of a file without the folders that everybody shares.
export function shortSource(text) {
  return text.replace(/^.*?(?:site-packages|dist-packages)\//, "");
}

export function lastPart(path) {
  return path.slice(path.lastIndexOf(".") + 1);
}

export function element(tag, attributes = {}, children = []) {
  return filled(document.createElement(tag), attributes, children);
}

export function svgElement(tag, attributes = {}, children = []) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of [children].flat()) {
    if (child !== null && child !== undefined) made.append(child);
  }
  return made;
}

export function cleared(node, children = []) {
  node.replaceChildren(...[children].flat().filter((child) => child));
  return node;
}
