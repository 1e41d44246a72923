"""Runs other tools for relevance propagation: one process that answers requests, line by line.

Run as `python -I worker.py` under the environment of `environment.py`; imports nothing of graphopt.
A request is one line of JSON on stdin, `{"kind": ..., "tensors": FILE, "answer": FILE, ...}`; the
answer is one line of JSON on stdout, its tensors are in the safetensors file named `answer`.

LXT patches classes and modules for the whole process, so every request is answered in a fork.

What LXT 2.1 ("efficient") does, read in its source: gradient times input of a changed forward pass.
There is no stabiliser in Linear, Conv, Add and products (epsilon = 0), biases take their share and
keep it, and relevance of position and token type embeddings is not reported.

- Linear, Conv1D, additions, masks, rotary embedding, scaling: their gradient (LRP-0).
- Activations of an MLP (and BERT's pooler and prediction heads): identity, as y / (x + 1e-10), the
  1e-10 without sign; so 0 at x = 0, where the limit is f'(0).
- Layer norm: the standard deviation is a constant, the mean is not (centering is linear); the
  bias takes its share.  RMS norm: 1 / rms is a constant, in float32 whatever the model's dtype
  (gemma3: as the model's own forward casts).  Norms of queries and keys (qwen3, gemma3) too.
- Gated MLP: half to act(gate), half to up; CP: act(gate) is a constant.
- Attention: both products half and half, that is 1/4 to q, 1/4 to k, 1/2 to v (after rotation and
  norm of q and k, before heads are repeated); the softmax has its gradient.  CP: q and k are
  constants.  Eager and sdpa give the same; dropout is off.
- The output explained is the logit itself.  What follows from a softcap or another activation
  outside of the classes patched (gemma3's final_logit_softcapping) has its plain gradient.

llama, qwen2, qwen3, gemma3, gpt2 have both variants (gpt2: CP differs in attention alone); bert has
AttnLRP alone, in a copy of an older modeling_bert that replaces the module's names; the ViT
it knows is torchvision's (CP attention), so transformers' ViT has a map of our own here.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

Tensors = dict[str, Tensor]
Request = dict[str, Any]
Answer = tuple[dict[str, Any], Tensors]
Patch = Callable[[Any], bool]
ABSENT = object()


class Net(nn.Module):
    """Layers in a row; the network itself flattens, since captum has no rule for such a layer."""

    def __init__(self, layers: list[tuple[str, dict[str, Any]]]) -> None:
        super().__init__()
        self.flattening: dict[int, tuple[int, int]] = {}
        for i, (name, options) in enumerate(layers):
            if name == "Flatten":
                self.flattening[i] = (options.get("start_dim", 1), options.get("end_dim", -1))
            elif name == "Residual":
                self.add_module(str(i), Residual(**options))
            else:
                self.add_module(str(i), getattr(nn, name)(**options))
        self.length = len(layers)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.length):
            flat = self.flattening.get(i)
            x = x.flatten(*flat) if flat else self.get_submodule(str(i))(x)
        return x


class Residual(nn.Module):
    """Layers in a row and what went into them, added by zennit's layer for sums."""

    def __init__(self, inner: list[tuple[str, dict[str, Any]]]) -> None:
        from zennit.layer import Sum

        super().__init__()
        self.inner = Net(inner)
        self.sum = Sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(torch.stack([x, self.inner(x)], -1))


def build(request: Request, tensors: Tensors) -> Net:
    """The network of a request: `layers` and tensors named `weights.<layer>.<parameter>`."""
    net = Net(request["layers"]).to(tensors["x"].dtype).eval()
    net.load_state_dict(below("weights.", tensors))
    return net


def below(prefix: str, tensors: Tensors) -> Tensors:
    """Tensors whose names begin so, without the prefix."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# ---- zennit and captum ---------------------------------------------------------------------------


def zennit(request: Request, tensors: Tensors) -> Answer:
    """Relevance at `x` from `relevance` at the output, under a rule for all layers or a composite.

    `rule` and `parameters` name a class of zennit.rules; `composite` and `parameters` one of
    zennit.composites.  Tensors `parameters.<name>` are added to the parameters.
    """
    import zennit.composites
    import zennit.rules

    net = build(request, tensors)
    parameters = {**request["parameters"], **below("parameters.", tensors)}
    if "composite" in request:
        composite = getattr(zennit.composites, request["composite"])(**parameters)
    else:
        rule = getattr(zennit.rules, request["rule"])(**parameters)
        leaves = set(zennit.core.collect_leaves(net))
        composite = zennit.core.Composite(lambda ctx, name, m: rule if m in leaves else None)
    x = tensors["x"].requires_grad_()
    with composite.context(net) as modified:
        output = modified(x)
        (found,) = torch.autograd.grad(output, x, tensors["relevance"])
    return {}, {"relevance": found, "output": output}


def captum(request: Request, tensors: Tensors) -> Answer:
    """Relevance at `x` of the outputs `target`; `rules` names a class of captum's by layer."""
    from captum.attr import LRP
    from captum.attr._utils import lrp_rules

    net = build(request, tensors)
    for name, (rule, parameters) in request["rules"].items():
        net.get_submodule(name).rule = getattr(lrp_rules, rule)(**parameters)
    x = tensors["x"].requires_grad_()
    output = net(x)
    found = LRP(net).attribute(x, target=tensors["target"])
    return {}, {"relevance": found, "output": output}


# ---- LXT -----------------------------------------------------------------------------------------


def vit_map(attention: Patch | None = None) -> dict[Any, Patch]:
    """Transformers' ViT, for which LXT has no map: made of its own parts as its map of GPT-2 is."""
    from lxt.efficient import patches, rules
    from transformers.models.vit import modeling_vit

    def intermediate(self: Any, hidden_states: Tensor) -> Tensor:
        return rules.identity_rule_implicit(self.intermediate_act_fn, self.dense(hidden_states))

    return {
        modeling_vit.ViTIntermediate: partial(patches.patch_method, intermediate),
        nn.LayerNorm: partial(patches.patch_method, patches.layer_norm_forward),
        nn.Dropout: partial(patches.patch_method, patches.dropout_forward),
        modeling_vit: attention or patches.patch_attention,
    }


class Patched:
    """LXT's patches of one family, which can be switched off for a plain run in between."""

    def __init__(self, request: Request) -> None:
        from lxt.efficient import monkey_patch, patches

        family, rules = request["family"], request["rules"]
        self.modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if family == "vit":
            targets = vit_map(patches.patch_cp_attention if rules == "cp" else None)
        else:
            maps = importlib.import_module(f"lxt.efficient.models.{family}")
            targets = maps.cp_LRP if rules == "cp" else maps.attnLRP
        before = {target: dict(vars(target)) for target in targets}
        if hasattr(self.modeling, "ALL_ATTENTION_FUNCTIONS"):  # one variant changes it in place
            self.modeling.ALL_ATTENTION_FUNCTIONS = dict(self.modeling.ALL_ATTENTION_FUNCTIONS)
        monkey_patch(self.modeling, targets)
        self.changes = [
            (target, name, before[target].get(name, ABSENT), value)
            for target in targets
            for name, value in vars(target).items()
            if not name.startswith("__") and before[target].get(name, ABSENT) is not value
        ]
        if not all(any(t is target for t, *_ in self.changes) for target in targets):
            raise RuntimeError(f"LXT has not patched all of {list(targets)}")

    def switch(self, on: bool) -> None:
        for target, name, old, new in self.changes:
            value = new if on else old
            if value is ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, value)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        self.switch(on=False)
        try:
            yield
        finally:
            self.switch(on=True)

    def build(self, request: Request, tensors: Tensors) -> nn.Module:
        """A model of transformers from its configuration and its weights, in eval mode, frozen."""
        kind = getattr(self.modeling, request["class"])
        config = kind.config_class(**request["config"])
        config._attn_implementation = request["attention"]
        model = kind(config)
        weights = below("weights.", tensors)
        model.to(next(t.dtype for t in weights.values() if t.is_floating_point()))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"weights: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        if model.config._attn_implementation != request["attention"]:
            raise RuntimeError(f"attention is {model.config._attn_implementation}")
        return model.eval().requires_grad_(False)


class Explained:
    """Gradient times input of chosen outputs of a model: with LXT's patches this is its relevance.

    Tensors: `input_ids` (embedded first), or `inputs_embeds`, or `pixel_values`, and other inputs
    of the model as they are; `target`, integers of shape (batch, dims of the output - 1): the index
    of the output explained in each sample; or floats of the output's shape: how much each output
    counts.
    """

    def __init__(self, model: nn.Module, tensors: Tensors, output: str) -> None:
        self.model, self.output, self.target = model, output, tensors["target"]
        rest = {n: t for n, t in tensors.items() if n != "target" and "." not in n}
        if "input_ids" in rest:
            with torch.no_grad():
                rest["inputs_embeds"] = model.get_input_embeddings()(rest.pop("input_ids"))
        self.name = next(n for n in ("inputs_embeds", "pixel_values") if n in rest)
        self.x = rest.pop(self.name).requires_grad_()
        self.keywords: dict[str, Any] = rest
        if "use_cache" in inspect.signature(model.forward).parameters:
            self.keywords["use_cache"] = False

    def run(self) -> tuple[Tensor, Tensor]:
        """The outputs, and the gradient of the chosen ones at the input."""
        output = self.model(**{self.name: self.x}, **self.keywords)[self.output]
        if self.target.is_floating_point():
            chosen = output * self.target
        else:
            chosen = output[(torch.arange(len(output)), *self.target.T)]
        (gradient,) = torch.autograd.grad(chosen.sum(), self.x)
        return output, gradient

    def relevance(self) -> Tensor:
        return self.run()[1] * self.x

    def gradient(self) -> Tensor:
        return self.run()[1]


def lxt(request: Request, tensors: Tensors) -> Answer:
    """LXT's relevance at the (embedded) inputs of a model."""
    model = Patched(request).build(request, tensors)
    explained = Explained(model, tensors, request["output"])
    output, gradient = explained.run()
    x = explained.x
    return {}, {"relevance": gradient * x, "output": output, explained.name: x}


def lxt_cost(request: Request, tensors: Tensors) -> Answer:
    """Seconds and bytes of LXT's relevance, beside those of the plain forward and input gradient.

    Both run in turns, and their tensors come back; the ratio is the median over the turns.  `peak`
    is the allocator's bytes above the start, as graphopt.cost.allocator.trace_memory has them.
    """
    patched = Patched(request)
    model = patched.build(request, tensors)
    explained = Explained(model, tensors, request["output"])
    with patched.off():
        plain = Explained(patched.build(request, tensors), tensors, request["output"])
    times: list[tuple[float, float]] = []
    for turn in range(request["warmup"] + request["repeats"]):
        own = seconds(explained.relevance)
        with patched.off():
            reference = seconds(plain.gradient)
        if turn >= request["warmup"]:
            times.append((own, reference))
    own_peak = peak(explained.relevance)
    with patched.off():
        reference_peak = peak(plain.gradient)
        gradient = plain.gradient()
    own_times, reference_times = zip(*times, strict=True)
    figures = {
        "seconds": statistics.median(own_times),
        "reference_seconds": statistics.median(reference_times),
        "ratio": statistics.median(a / b for a, b in times),
        "peak": own_peak,
        "reference_peak": reference_peak,
        "threads": torch.get_num_threads(),
    }
    return figures, {"relevance": explained.relevance(), "gradient": gradient}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak(call: Callable[[], object]) -> int:
    """Most bytes alive at any moment of a call, above those at its start, by the memory events."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
            with record_function("peers::start"):
                pass
            result = call()
            with record_function("peers::end"):
                pass
        del result
    finally:
        gc.enable()
    events = session.profiler.kineto_results.events()
    (start,) = (e.start_ns() for e in events if e.name() == "peers::start")
    (end,) = (e.start_ns() for e in events if e.name() == "peers::end")
    memory = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = most = 0
    for _, change in sorted((m for m in memory if start <= m[0] <= end), key=lambda m: m[0]):
        live += change
        most = max(most, live)
    return most


# ---- requests ------------------------------------------------------------------------------------

KINDS = {"zennit": zennit, "captum": captum, "lxt": lxt, "lxt_cost": lxt_cost}
# What is imported before the fork, so that it is imported once
PRELOADED = {
    "zennit": ("zennit",),
    "captum": ("captum.attr",),
    "lxt": ("lxt.efficient", "transformers.models.vit.modeling_vit"),
}


def answer(request: Request) -> dict[str, Any]:
    """Answer one request; what fails is told, not raised."""
    try:
        tensors = load_file(request["tensors"])
        figures, found = KINDS[request["kind"]](request, tensors)
        save_file({n: t.detach().contiguous().clone() for n, t in found.items()}, request["answer"])
        return {"figures": figures}
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    """Answer until stdin ends, each request in a fork: what LXT patches is patched there alone."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        for name in PRELOADED[request["kind"].split("_")[0]]:
            importlib.import_module(name)
        child = os.fork()
        if child == 0:
            replies.write(json.dumps(answer(request)) + "\n")
            replies.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            replies.write(json.dumps({"error": f"the process ended with {status}"}) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
