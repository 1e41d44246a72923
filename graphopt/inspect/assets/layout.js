// Runs where the layout is made: in a worker, or on the page where there are none.  It knows dagre
// and plain data, and nothing of the page.
//
// A level is {id, title, items: [{id, w, h} or a level], edges: [[from, to, forward, backward]]},
// where an edge stands for forward work, backward work or both.  Backward edges are laid out upside
// down, so that the backward pass of a module stands beside its forward pass.

const PAD = 12;
const HEADER = 26;
const placed = new Map(); // layouts of levels that were made before

function layoutLevel(level) {
  const boxes = level.items.map((item) => {
    if (!item.items) return { id: item.id, w: item.w, h: item.h };
    const inner = layoutLevel(item);
    return { id: item.id, w: inner.w, h: inner.h, inner };
  });
  const key = JSON.stringify([level.id, boxes.map((box) => [box.id, box.w, box.h])]);
  let made = placed.get(key);
  if (!made) {
    made = arrange(level, boxes);
    placed.set(key, made);
  }
  return { ...made, boxes: made.boxes.map((box, i) => ({ ...box, inner: boxes[i].inner })) };
}

function arrange(level, boxes) {
  const top = level.title ? HEADER + PAD : PAD;
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({
    rankdir: "TB", nodesep: 16, ranksep: 26, edgesep: 8,
    ranker: boxes.length > 60 ? "longest-path" : "network-simplex",
  });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const box of boxes) graph.setNode(box.id, { width: box.w, height: box.h });
  for (const [from, to, forward] of level.edges) {
    if (forward) graph.setEdge(from, to, { weight: 2 });
    else if (!graph.hasEdge(to, from)) graph.setEdge(to, from, { weight: 1 });
  }
  dagre.layout(graph);
  const size = graph.graph();
  const drawn = boxes.length > 0;
  const edges = level.edges.map(([from, to, forward, backward]) => {
    const straight = forward ? graph.edge(from, to) : graph.edge(to, from);
    const points = straight.points.map(({ x, y }) => [x + PAD, y + top]);
    return { from, to, forward, backward, points: forward ? points : points.reverse() };
  });
  return {
    w: (drawn ? size.width : 0) + 2 * PAD,
    h: (drawn ? size.height : 0) + top + PAD,
    boxes: boxes.map((box) => {
      const { x, y } = graph.node(box.id);
      return { id: box.id, x: x - box.w / 2 + PAD, y: y - box.h / 2 + top, w: box.w, h: box.h };
    }),
    edges,
  };
}
