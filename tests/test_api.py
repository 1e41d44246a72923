"""The doors: arguments, bad input, and that the user's model is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import errors
from graphopt.passes.canonicalize import Canonicalize

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.dropout(torch.relu_(self.linear(self.norm(x)))) * scale


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that must not change."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(n, m.training) for n, m in model.named_modules()],
        [t.clone() for t in tensors],
        [id(t) for t in tensors],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_an_empty_budget_cleans_up_and_nothing_else() -> None:
    model = Net()
    module = graphopt.optimize(model, example_inputs=(X,))
    assert module.report.pipeline == "canonicalize"
    assert "relu_" not in module.code
    data = module.report.to_dict()
    assert data["schema_version"] == 1
    assert data["canonicalize"]["functionalized"] == 1


def test_the_result_shares_nothing_unless_asked() -> None:
    model = Net()
    apart = graphopt.optimize(model, example_inputs=(X,))
    assert apart.linear.weight is not model.linear.weight
    assert torch.equal(apart.linear.weight, model.linear.weight)
    shared = graphopt.optimize(model, example_inputs=(X,), inplace=True)
    assert shared.linear.weight is model.linear.weight


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_left_as_it_was(inplace: bool) -> None:
    model = Net()
    model.dropout.eval()
    model.linear.weight.grad = torch.ones(4, 4)
    before = state(model)
    module = graphopt.optimize(model, example_inputs=(X,), inplace=inplace)
    assert same(state(model), before)
    assert module.training
    assert not module.dropout.training


def test_passes_override_the_budget_and_take_their_options_from_it() -> None:
    module = graphopt.optimize(Net(), example_inputs=(X,), passes=[Canonicalize(inline=False)])
    assert module.report.pipeline == "canonicalize{inline=false}"
    text = graphopt.optimize(Net(), example_inputs=(X,), passes="canonicalize{inline=false}")
    assert text.report.pipeline == module.report.pipeline


def test_passes_compose_across_calls() -> None:
    once = graphopt.optimize(Net(), example_inputs=(X,), passes="canonicalize")
    twice = graphopt.optimize(once, example_inputs=(X,), passes="canonicalize")
    assert twice.report.pipeline == "canonicalize,canonicalize"
    assert not twice.report.passes[1].changed


def test_keyword_inputs_and_single_tensors_are_taken() -> None:
    module = graphopt.optimize(Net(), example_inputs=X, example_kwargs={"scale": 2.0})
    torch.testing.assert_close(module.eval()(X, scale=2.0), 2 * module(X, scale=2.0) / 2)


def refused(error: type[Exception], says: str, call: Callable[[], Any]) -> errors.GraphoptError:
    with pytest.raises(error, match=says) as caught:
        call()
    assert isinstance(caught.value, errors.GraphoptError)
    return caught.value


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Uncopyable(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds an open socket")


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).exp()
        y.add_(1)  # exp saved its result: autograd refuses this in backward
        return y


class Global(nn.Module):
    """Not a function of its inputs: each call gives something else."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x * type(self).calls


def with_nan(model: Net) -> Net:
    with torch.no_grad():
        model.linear.weight[0, 0] = float("nan")
    return model


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "unknown field": (
        errors.BudgetError,
        "did you mean 'memory'",
        lambda: graphopt.optimize(Net(), "memroy=50%", (X,)),
    ),
    "zero": (errors.BudgetError, "zero", lambda: graphopt.optimize(Net(), "memory=0", (X,))),
    "above all": (
        errors.BudgetError,
        "at most 100%",
        lambda: graphopt.optimize(Net(), {"memory": "150%"}, (X,)),
    ),
    "two scopes": (
        errors.BudgetError,
        "both",
        lambda: graphopt.optimize(
            Net(), "memory=50%,memory_scope=step", (X,), memory_scope="activations"
        ),
    ),
    "unknown pass": (
        errors.PipelineError,
        "did you mean",
        lambda: graphopt.optimize(Net(), example_inputs=(X,), passes="canonicalise"),
    ),
    "no pass": (
        errors.UsageError,
        "takes passes",
        lambda: graphopt.optimize(Net(), example_inputs=(X,), passes=[Canonicalize]),  # type: ignore[list-item]
    ),
    "time": (
        errors.UsageError,
        "time_limit",
        lambda: graphopt.optimize(Net(), example_inputs=(X,), time_limit=0),
    ),
    "cost model": (
        errors.UsageError,
        "cost_model",
        lambda: graphopt.optimize(Net(), example_inputs=(X,), cost_model="guess"),
    ),
    "inputs in a dict": (
        errors.UsageError,
        "example_kwargs",
        lambda: graphopt.optimize(Net(), example_inputs={"x": X}),  # type: ignore[arg-type]
    ),
    "no inputs": (errors.InputMismatch, "x", lambda: graphopt.optimize(Net())),
    "too many inputs": (
        errors.InputMismatch,
        "signature|fit",
        lambda: graphopt.optimize(Net(), example_inputs=(X, 1.0, 2)),
    ),
    "wrong shape": (
        errors.InputMismatch,
        "itself fails",
        lambda: graphopt.optimize(Net(), example_inputs=(X[:, :3],)),
    ),
    "no module": (
        errors.ModelError,
        "torch.nn.Module",
        lambda: graphopt.optimize(lambda x: x, example_inputs=(X,)),  # type: ignore[arg-type]
    ),
    "data-dependent": (
        errors.CaptureError,
        "torch.cond|values of tensors",
        lambda: graphopt.optimize(Branches(), example_inputs=(X,)),
    ),
    "uncopyable": (
        errors.ModelError,
        "open socket",
        lambda: graphopt.optimize(Uncopyable(), example_inputs=(X,)),
    ),
    "fails by itself": (
        errors.ModelError,
        "itself fails",
        lambda: graphopt.optimize(Fails(), example_inputs=(X,)),
    ),
    "not a function": (
        errors.VerificationError,
        "differs from the model",
        lambda: graphopt.optimize(Global(), example_inputs=(X,)),
    ),
    "NaN in a parameter": (
        errors.NonFiniteError,
        "linear.weight",
        lambda: graphopt.optimize(with_nan(Net()), example_inputs=(X,)),
    ),
    "NaN in an input": (
        errors.NonFiniteError,
        "input",
        lambda: graphopt.optimize(Net(), example_inputs=(X * float("nan"),)),
    ),
    "NaN in the output": (
        errors.NonFiniteError,
        "output",
        lambda: graphopt.optimize(Log(), example_inputs=(X,)),
    ),
    "explain": (
        errors.UsageError,
        "cp-lrp",
        lambda: graphopt.explain(Net(), (X,), composite="cp-lpr"),
    ),
    "no file": (errors.GraphoptError, "", lambda: graphopt.load("does-not-exist.graphopt")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_reason(case: str) -> None:
    error, says, call = BAD[case]
    caught = refused(error, says, call)
    assert str(caught).strip()


def test_a_refusal_leaves_the_model_alone() -> None:
    model = Branches()
    model.register_parameter("weight", nn.Parameter(torch.ones(3)))
    model.eval()
    before = state(model)
    refused(errors.CaptureError, "", lambda: graphopt.optimize(model, example_inputs=(X,)))
    assert same(state(model), before)
    assert torch.is_grad_enabled()


def test_nothing_to_train_is_said() -> None:
    model = Net().requires_grad_(False)
    refused(
        errors.NothingToTrainError,
        "",
        lambda: graphopt.optimize(model, "memory=50%", (X,), time_limit=2),
    )


def test_a_hopeless_budget_names_the_smallest_that_would_do() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    caught: Any = refused(
        errors.BudgetInfeasible,
        "smallest budget",
        lambda: graphopt.optimize(model, "memory=1KiB", (torch.randn(128, 64),), time_limit=2),
    )
    assert caught.smallest > 1024
    assert caught.requested == 1024
    assert caught.exit_code == 4


def test_ctrl_c_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Canonicalize, "run", interrupted)
    model = Net()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        graphopt.optimize(model, example_inputs=(X,), inplace=True)
    assert same(state(model), before)


def test_a_loss_on_outputs_is_used_for_checks() -> None:
    seen: list[tuple[int, ...]] = []

    def loss(outputs: Tensor) -> Tensor:
        seen.append(tuple(outputs.shape))
        return outputs.square().mean()

    graphopt.optimize(Net(), example_inputs=(X,), loss=loss)
    assert seen
    assert set(seen) == {(6, 4)}


def test_a_loss_with_targets_takes_them_from_the_data() -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return (outputs - targets).square().mean()

    targets = torch.ones(6, 4)
    data = iter([(X, targets), (X, targets + 1)])  # can be read only once
    graphopt.optimize(Net(), example_inputs=(X,), loss=loss, data=data)
    assert seen
    assert all(t is targets for t in seen)
    with pytest.raises(errors.UsageError, match="no pairs"):
        graphopt.optimize(Net(), example_inputs=(X,), loss=loss)
    with pytest.raises(errors.UsageError, match="no pairs"):
        graphopt.optimize(Net(), example_inputs=(X,), loss=nn.CrossEntropyLoss(), data=[X])


def test_a_deep_copy_of_the_result_is_its_own() -> None:
    module = graphopt.optimize(Net(), example_inputs=(X,))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.linear.weight.zero_()
    assert module.linear.weight.abs().sum() > 0
    assert twin.report.to_dict() == module.report.to_dict()


@pytest.mark.parametrize("call", ["capture", "optimize", "inplace", "frontier"])
def test_the_callers_inference_mode_is_left(call: str) -> None:
    model = Net()
    with torch.inference_mode():
        x = X.clone()  # a tensor that autograd refuses
        if call == "capture":
            module: Any = graphopt.capture(model, (x,)).emit()
        elif call == "frontier":
            assert graphopt.frontier(model, (x,), budgets=2, time_limit=2)
            module = model
        else:
            module = graphopt.optimize(model, example_inputs=(x,), inplace=call == "inplace")
        assert torch.is_inference_mode_enabled()
    module(X).sum().backward()
    assert not any(t.is_inference() for t in (*module.parameters(), *module.buffers()))
    assert all(p.grad is not None for p in module.parameters())


def test_a_model_made_in_inference_mode_is_copied_out_of_it_or_refused() -> None:
    with torch.inference_mode():
        model = Net()
        module = graphopt.optimize(model, example_inputs=(X,))
    module(X).sum().backward()
    for call in (graphopt.capture, lambda m, x: graphopt.optimize(m, None, x, inplace=True)):
        refused(
            errors.ModelError, "norm.weight.*inference_mode", lambda call=call: call(model, (X,))
        )


class Remembers(Branches):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        raise RuntimeError("no")


def test_finding_out_why_a_capture_failed_leaves_the_model_alone() -> None:
    model = Remembers()
    refused(errors.InputMismatch, "itself fails", lambda: graphopt.capture(model, (X,)))
    assert not hasattr(model, "last")


def test_hooks_on_shared_parameters_run_in_training_only() -> None:
    model, seen = Net(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    module = graphopt.optimize(model, "memory=100%", (X,), inplace=True, time_limit=2)
    assert not seen
    module(X).sum().backward()
    assert len(seen) == len(list(model.parameters()))


def test_a_frontier_takes_a_loss_with_targets() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    data = [(X, torch.ones(6, 4))]
    assert graphopt.frontier(Net(), (X,), budgets=2, loss=loss, data=data, time_limit=2)
    with pytest.raises(errors.UsageError, match="no pairs"):
        graphopt.frontier(Net(), (X,), budgets=2, loss=loss)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "file"])
def test_a_copys_report_predicts_with_its_own_planner(how: str, tmp_path: Path) -> None:
    module = graphopt.optimize(Net(), "memory=100%", (X,), time_limit=2)
    if how == "deepcopy":
        twin: Any = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        module.save(tmp_path / "module.gopt")
        twin = graphopt.load(tmp_path / "module.gopt")
    assert twin.report.predictor.planner is twin.program.planner
    assert twin.program.planner is not module.program.planner
    twin(X).sum().backward()  # its planner knows its graphs from the first step on
    assert twin.report.predict_peak(X) == module.report.predict_peak(X)
