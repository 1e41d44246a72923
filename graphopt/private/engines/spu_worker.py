"""Runs a circuit in SPU: ``python spu_worker.py FOLDER``, in an environment of its own.

It imports nothing of graphopt: SPU wants numpy below 2 and a JAX of its own, which graphopt's
environment doesn't have.  The parties are threads; each step is compiled and run for itself, and
the link's counters are read between steps.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from spu import api, libspu
from spu.utils import frontend

PROTOCOLS = {
    "semi2k": (libspu.ProtocolKind.SEMI2K, 2),
    "cheetah": (libspu.ProtocolKind.CHEETAH, 2),
    "aby3": (libspu.ProtocolKind.ABY3, 3),
}
LINK = re.compile(r"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+)")


def move(step, *given):
    """Elements by their places; place 0 is a zero."""
    *values, index = given
    index = np.asarray(index)
    flat = [v.reshape(-1) for v in values]
    if index.all():  # a zero to take from would have to be shared first
        index = index - 1
    else:
        flat = [jnp.zeros(1, jnp.float32), *flat]
    return jnp.take(jnp.concatenate(flat), index.reshape(-1), axis=0).reshape(index.shape)


def total(step, x):
    """Sum over dimensions, divided by an integer."""
    how = step["attributes"]
    result = jnp.sum(x, tuple(how["dims"]), keepdims=how["keepdim"]) if how["dims"] else x
    return result if how["divisor"] == 1 else result * np.float32(1.0 / how["divisor"])


def patches(x, kernel, how):
    """(n, c, *space) -> (n, c, positions, kernel elements), by slices alone."""
    pads = [(0, 0, 0), (0, 0, 0), *[(p, p, 0) for p in how["padding"]]]
    x = lax.pad(x, jnp.float32(0), pads) if any(how["padding"]) else x
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, how["stride"], how["dilation"], strict=True)
    ]
    found = []
    for place in np.ndindex(*kernel):
        start = [0, 0, *[p * d for p, d in zip(place, how["dilation"], strict=True)]]
        steps = [1, 1, *how["stride"]]
        end = [
            *x.shape[:2],
            *[b + (n - 1) * s + 1 for b, n, s in zip(start[2:], sizes, steps[2:], strict=True)],
        ]
        found.append(lax.slice(x, start, end, steps).reshape(*x.shape[:2], -1))
    return jnp.stack(found, -1)


def conv(step, x, weight):
    """One matrix product for each group; depthwise, where those would be vectors, one product."""
    how, groups = step["attributes"], step["attributes"]["groups"]
    out, deep, *kernel = weight.shape
    taken = patches(x, kernel, how)
    if groups > 1 and deep == 1:
        spread = jnp.repeat(taken, out // groups, axis=1)
        return jnp.sum(spread * weight.reshape(out, 1, -1), -1).reshape(step["shape"])
    n, positions = taken.shape[0], taken.shape[2]
    results = []
    for g in range(groups):
        rows = taken[:, g * deep : (g + 1) * deep].transpose(0, 2, 1, 3).reshape(n * positions, -1)
        columns = weight[g * out // groups : (g + 1) * out // groups].reshape(out // groups, -1)
        results.append(rows @ columns.T)
    joined = jnp.concatenate(results, 1).reshape(n, positions, out).transpose(0, 2, 1)
    return joined.reshape(step["shape"])


OPS = {
    "add": lambda s, a, b: a + b,
    "sub": lambda s, a, b: a - b,
    "shift": lambda s, a, b: a + b,
    "scale": lambda s, a, b: a * b,
    "multiply": lambda s, a, b: a * b,
    "square": lambda s, a: a * a,
    "matmul": lambda s, a, b: a @ b,
    "conv": conv,
    "move": move,
    "sum": total,
    "reshape": lambda s, a: a.reshape(s["shape"]),
    "relu": lambda s, a: jnp.maximum(a, 0),
    "negative": lambda s, a: (a < 0).astype(jnp.float32),
    "exp": lambda s, a: jnp.exp(a),
    "reciprocal": lambda s, a: 1.0 / a,
    "rsqrt": lambda s, a: lax.rsqrt(a),
    "sigmoid": lambda s, a: jax.nn.sigmoid(a),
    "tanh": lambda s, a: jnp.tanh(a),
}


class Simulation:
    """All parties of a computation, as threads over a link in memory."""

    def __init__(self, protocol, document, values, log):
        kind, self.parties = PROTOCOLS[protocol]
        self.config = libspu.RuntimeConfig(protocol=kind, field=libspu.FieldType.FM64)
        self.config.enable_pphlo_profile = True
        self.io = api.Io(self.parties, self.config)
        self.document, self.values, self.log = document, values, log
        self.shapes = dict(document["shapes"])
        self.figures, self.results = {}, {}
        self.barrier = threading.Barrier(self.parties)
        self.failure = None

    def compile(self, step):
        """One step as an SPU executable; public operands become constants of it."""
        names, args, fixed = [], [], {}
        for name in step["inputs"]:
            if self.document["constants"].get(name) is False:
                known = self.values[name]
                fixed[name] = known if known.dtype == np.int64 else known.astype(np.float32)
            elif name not in names:
                names.append(name)
                args.append(np.zeros(self.shapes[name], np.float32))

        def function(*secrets):
            given = dict(zip(names, secrets, strict=True))
            operands = [fixed[n] if n in fixed else given[n] for n in step["inputs"]]
            result = OPS[step["op"]](step, *operands)
            return jnp.broadcast_to(result, step["shape"])

        visible = [libspu.Visibility.VIS_SECRET] * len(args)
        self.shapes[step["name"]] = step["shape"]
        executable, _ = frontend.compile(
            frontend.Kind.JAX, function, tuple(args), {}, names, visible,
            lambda flat: [step["name"]],
        )  # fmt: skip
        return executable

    def run(self):
        """Outputs, and (bytes, messages, seconds) by step."""
        steps = self.document["steps"]
        compiled = {}
        for done, step in enumerate(steps):
            compiled[step["name"]] = self.compile(step)
            if done % 10 == 0:
                print(f"@{done}/{2 * len(steps)}", file=sys.__stdout__, flush=True)
        shared = {}
        for name in (*self.document["inputs"], *self.document["constants"]):
            if self.document["constants"].get(name) is not False:
                value = self.values[name].astype(np.float32)
                shared[name] = self.io.make_shares(value, libspu.Visibility.VIS_SECRET)
        description = libspu.link.Desc()
        for rank in range(self.parties):
            description.add_party(f"id_{rank}", f"thread_{rank}")
        threads = [
            threading.Thread(target=self._party, args=(rank, description, steps, compiled, shared))
            for rank in range(self.parties)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return self._outputs(), self.figures

    def _outputs(self):
        """The outputs in the clear."""
        outputs = []
        for i, name in enumerate(self.document["outputs"]):
            if self.document["constants"].get(name) is False:
                outputs.append(self.values[name])  # known to all
                continue
            shares = [self.results[rank][i] for rank in range(self.parties)]
            outputs.append(np.asarray(self.io.reconstruct(shares)).reshape(self.shapes[name]))
        return outputs

    def _party(self, rank, description, steps, compiled, shared):
        try:
            self._take_part(rank, description, steps, compiled, shared)
        except BaseException as error:
            self.failure = self.failure or error
            self.barrier.abort()

    def _take_part(self, rank, description, steps, compiled, shared):
        link = libspu.link.create_mem(description, rank)
        runtime = api.Runtime(link, libspu.RuntimeConfig(self.config))
        for name, shares in shared.items():
            runtime.set_var(name, shares[rank])
        for turn in range(2):  # the first turn pays for the set-up of OT and keys
            for done, step in enumerate(steps):
                self.barrier.wait()
                start = time.perf_counter()
                runtime.run(compiled[step["name"]])
                self.barrier.wait()
                if rank == 0:
                    self.figures[step["name"]] = self._read(time.perf_counter() - start)
                    if turn and done % 10 == 0:
                        place = len(steps) + done
                        print(f"@{place}/{2 * len(steps)}", file=sys.__stdout__, flush=True)
        known = {name for name, secret in self.document["constants"].items() if not secret}
        self.results[rank] = [
            None if name in known else runtime.get_var(name) for name in self.document["outputs"]
        ]

    def _read(self, seconds):
        """Bytes sent by all parties and messages sent by the busiest, from the profile."""
        lines = LINK.findall(self.log.read())
        sent = sum(int(send) for send, _, _ in lines)
        return float(sent), max((int(actions) for _, _, actions in lines), default=0), seconds


def main(folder):
    """Run the job in a folder and write its result there."""
    document = json.loads((folder / "circuit.json").read_text())
    names = json.loads((folder / "names.json").read_text())
    with np.load(folder / "values.npz", allow_pickle=False) as arrays:
        values = {name: arrays[f"a{i}"] for i, name in enumerate(names)}
    log_path = folder / "profile.log"
    sys.__stdout__ = os.fdopen(os.dup(1), "w")
    errors = os.dup(2)
    with open(log_path, "w") as sink:
        os.dup2(sink.fileno(), 1)  # SPU writes its profile to the process's own streams
        os.dup2(sink.fileno(), 2)
    try:
        with open(log_path) as log:
            simulation = Simulation(document["settings"]["protocol"], document, values, log)
            outputs, figures = simulation.run()
    finally:
        os.dup2(errors, 2)
    np.savez(folder / "outputs.npz", **{f"a{i}": o for i, o in enumerate(outputs)})
    (folder / "steps.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
