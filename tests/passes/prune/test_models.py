"""`prune` on models of many kinds: smaller operators compute what the masked network computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from tests.passes.prune.models import MODELS
from tests.zoo import probe_loss

# Each is a second or two; all others are slow.
QUICK = """super_resolution mask_multiply slices bare_parameters tied_autoencoder glu_chunk glu_conv
    text_mean group_channel_shuffle batched_experts decoder attention_fused""".split()
QUICK_DOUBLE = "super_resolution slices tied_autoencoder glu_conv group_channel_shuffle".split()
# Their dimensions are many or wide, so that budgets can be met closely.
WIDE = """resnet18 resnext convnext efficientnet vgg vit_own attention_fused attention_rotary
    decoder_layer hf_bert hf_gpt2 hf_llama_gqa hf_llama_tied hf_t5 hf_whisper hf_mamba
    hf_swin""".split()
SINGLE = "hf_llama_gqa hf_llama_tied hf_t5 hf_mamba".split()  # their norms cast to float32
RECURRENT = "lstm gru lstm_bidirectional".split()  # the counter of PyTorch doesn't know them


@dataclass
class Case:
    """A model, its inputs, and what became of it."""

    name: str
    model: nn.Module
    args: tuple[Tensor, ...]
    module: Any
    twin: nn.Module

    @property
    def report(self) -> dict[str, Any]:
        return self.module.report.to_dict()["prune"]


def pruned(name: str, dtype: torch.dtype = torch.float32) -> Case:
    model, args = converted(name, dtype)
    with torch.random.fork_rng():
        module = graphopt.optimize(model, "flops=50%", example_inputs=args).eval()
    return Case(name, model, args, module, module.report.masked_module().eval())


def converted(name: str, dtype: torch.dtype, batch: int = 2) -> tuple[nn.Module, tuple[Any, ...]]:
    model, args = MODELS[name](batch)
    return model.to(dtype), tuple(a.to(dtype) if a.is_floating_point() else a for a in args)


def distance(module: Any, twin: Any, args: tuple[Any, ...]) -> float:
    """The largest difference of any output, relative to the largest element."""
    with torch.no_grad():
        got, want = tree_leaves(module(*args)), tree_leaves(twin(*args))
    assert [g.shape for g in got] == [w.shape for w in want]
    assert all(w.isfinite().all() and w.abs().max() > 1e-3 for w in want)
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))


def counted(module: Any, args: tuple[Any, ...]) -> int:
    """FLOPs by PyTorch's counter; it doesn't know the fused attention of CPUs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def gradients(module: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    module.zero_grad()
    probe_loss(module(*args)).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def marked(names: list[str], quick: list[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.fixture(scope="module", params=marked(list(MODELS), QUICK))
def case(request: pytest.FixtureRequest) -> Case:
    return pruned(request.param)


def test_it_computes_what_the_masked_network_computes(case: Case) -> None:
    assert distance(case.module, case.twin, case.args) <= 1e-5


def test_another_batch_size(case: Case) -> None:
    _, args = MODELS[case.name](3)
    assert distance(case.module, case.twin, args) <= 1e-5


def test_the_budget_is_kept_and_counted_rightly(case: Case) -> None:
    report = case.report
    budget = report["flops_before"] / 2
    print(f"{case.name}: flops {report['flops_after'] / budget:.4f} of the budget")
    assert report["flops_after"] <= budget
    if case.name in WIDE:
        assert report["flops_after"] >= 0.98 * budget
    for when, module in (("before", case.model), ("after", case.module)):
        assert report[f"params_{when}"] == sum(p.numel() for p in module.parameters())
        if case.name not in RECURRENT:
            assert report[f"flops_{when}"] == counted(module, case.args)
    assert report["params_after"] < report["params_before"]


def test_the_report_names_what_is_kept_and_what_cannot_go(case: Case) -> None:
    report, after = case.report, dict(case.module.named_parameters(remove_duplicate=False))
    frozen = {(axis["parameter"], axis["axis"]) for axis in report["frozen"]}
    assert all(axis["reason"] for axis in report["frozen"])
    for names in aliases(case.model):
        named = [name for name in names if name in report["kept"]]
        kept = report["kept"][named[0]] if named else {}
        for axis, size in enumerate(case.model.get_parameter(names[0]).shape):
            assert after[names[0]].shape[axis] == len(kept.get(str(axis), range(size)))
            assert str(axis) not in kept or not any((name, axis) in frozen for name in names)


def aliases(model: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return list(names.values())


def test_the_original_checkpoint_loads(case: Case) -> None:
    with torch.no_grad():
        before = tree_leaves(case.module(*case.args))
        other = copy.deepcopy(case.module)
        for p in other.parameters():
            p.zero_()
        other.load_state_dict(case.model.state_dict())
        after = tree_leaves(other(*case.args))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_step_changes_the_parameters(case: Case) -> None:
    module = copy.deepcopy(case.module).train()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    probe_loss(module(*case.args)).backward()
    optimizer.step()
    changed = [n for n, p in module.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) > 0.8 * len(before)
    assert all(p.isfinite().all() for p in module.parameters())


def test_it_can_be_exported(case: Case) -> None:
    program = torch.export.export(case.module, case.args)
    assert distance(program.module(), case.module, case.args) <= 1e-6


@pytest.mark.parametrize("name", marked(list(MODELS), QUICK_DOUBLE))
def test_outputs_and_gradients_in_double_precision(name: str) -> None:
    case, exact = pruned(name, torch.float64), name not in SINGLE
    for batch in (2, 3):
        _, args = converted(name, torch.float64, batch)
        assert distance(case.module, case.twin, args) <= (1e-10 if exact else 1e-5)
    want, got = gradients(case.twin, case.args), gradients(case.module, case.args)
    kept = case.report["kept"]
    for names in aliases(case.model):
        places = next((kept[name] for name in names if name in kept), {})
        for path in set(names) & set(want):
            expected = want[path]
            for axis, at in places.items():
                expected = expected.index_select(int(axis), torch.tensor(at))
            scale = max(float(expected.abs().max()), 1e-6)
            assert float((got[path] - expected).abs().max()) <= (1e-8 if exact else 1e-3) * scale, (
                path
            )
