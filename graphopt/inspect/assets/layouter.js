// Hands layouts to a worker made from the page's own text; does them here where that can't be.

export class Layouter {
  constructor() {
    this.waiting = new Map();
    this.count = 0;
    this.source = document.getElementById("layout-source").textContent;
    this.where("worker");
    try {
      const text = `${this.source}\nonmessage = ({ data }) =>
        postMessage({ id: data.id, result: layoutLevel(data.level) });`;
      const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
      this.worker = new Worker(url);
      this.worker.onmessage = ({ data }) => this.settle(data.id, data.result);
      this.worker.onerror = (event) => {
        event.preventDefault();
        this.fallBack();
      };
    } catch {
      this.fallBack();
    }
  }

  where(place) {
    document.documentElement.dataset.layout = place;
  }

  layout(level) {
    return new Promise((resolve) => {
      const id = this.count++;
      this.waiting.set(id, { level, resolve });
      if (this.worker) this.worker.postMessage({ id, level });
      else this.here(id);
    });
  }

  settle(id, result) {
    const job = this.waiting.get(id);
    this.waiting.delete(id);
    if (job) job.resolve(result);
  }

  // No worker: the same text runs on the page (its hash is in the page's policy).
  fallBack() {
    if (this.worker) this.worker.terminate();
    this.worker = null;
    this.where("page");
    const script = document.createElement("script");
    script.textContent = this.source;
    document.head.append(script);
    [...this.waiting.keys()].forEach((id) => this.here(id));
  }

  here(id) {
    setTimeout(() => {
      const job = this.waiting.get(id);
      if (job) this.settle(id, window.layoutLevel(job.level));
    });
  }
}
