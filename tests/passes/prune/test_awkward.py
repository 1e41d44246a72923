"""`prune` on awkward forms: what works, and what is known not to (strictly expected to fail)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from tests.passes.prune.models import GatedMLP, TiedAutoencoder, mlp, randomise


class Net(nn.Module):
    """Some layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def pruned(model: nn.Module, *args: Tensor, budget: str = "params=60%") -> Any:
    torch.manual_seed(0)
    randomise(model)
    return graphopt.optimize(model.eval(), budget, example_inputs=args).eval()


def assert_exact(module: Any, *args: Tensor, tolerance: float = 1e-5) -> None:
    twin = module.report.masked_module().eval()
    with torch.no_grad():
        got, want = module(*args), twin(*args)
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


def free(module: Any, parameter: str, axis: int) -> bool:
    frozen = module.report.to_dict()["prune"]["frozen"]
    return not any(f["parameter"] == parameter and f["axis"] == axis for f in frozen)


vectors, sequences = torch.randn(2, 16), torch.randn(2, 6, 16)


def gram() -> Net:
    """The products of all pairs of channels, as one long vector."""
    pairs = lambda y: (y[:, :, None] * y[:, None, :]).flatten(1)  # noqa: E731
    return Net(lambda s, x: s.o(pairs(s.a(x))), a=nn.Linear(16, 12), o=nn.Linear(144, 4))


def overlapping() -> Net:
    return Net(
        lambda s, x: s.o((lambda y: y[:, :20] * y[:, 4:])(s.a(x))),
        a=nn.Linear(16, 24), o=nn.Linear(20, 3),
    )  # fmt: skip


def hypernetwork() -> Net:
    def forward(s: Any, x: Tensor) -> Tensor:
        weights = s.g(x).view(-1, 24, 12)
        return s.o(torch.bmm(weights, s.a(x)[:, :, None])[:, :, 0].relu())

    return Net(forward, a=nn.Linear(16, 12), g=nn.Linear(16, 24 * 12), o=nn.Linear(24, 3))


def groups_in_the_batch() -> Net:
    """Heads are folded into the batch and come out again."""

    def forward(s: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = s.a(x).view(b, t, 4, 8).transpose(1, 2).reshape(b * 4, t, 8)
        y = torch.bmm((y @ y.transpose(1, 2)).softmax(-1), y)
        return s.o(y.view(b, 4, t, 8).transpose(1, 2).reshape(b, t, 32))

    return Net(forward, a=nn.Linear(16, 32), o=nn.Linear(32, 3))


def stacked_weights() -> Net:
    def forward(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([s.a.weight, s.b.weight])
        return s.o(torch.einsum("bi,koi->bko", x, both).tanh().sum(1))

    layers = {name: nn.Linear(16, 20, bias=False) for name in "ab"}
    return Net(forward, **layers, o=nn.Linear(20, 3))


@pytest.mark.parametrize(
    ("make", "x"),
    [(gram, vectors), (overlapping, vectors), (hypernetwork, vectors),
     (groups_in_the_batch, sequences), (stacked_weights, vectors)],
)  # fmt: skip
def test_awkward_forms(make: Callable[[], Net], x: Tensor) -> None:
    module = pruned(make().double(), x.double())
    report = module.report.to_dict()["prune"]
    assert report["params_after"] <= 0.6 * report["params_before"]
    assert_exact(module, x.double(), tolerance=1e-10)
    assert_exact(module, torch.cat([x, x + 1, x * 2])[:5].double(), tolerance=1e-10)


@pytest.mark.parametrize("allocation", ["uniform", "solver"])
def test_parameters_that_nothing_reads_count_too(allocation: str) -> None:
    model = Net(
        lambda s, x: s.b(s.a(x).relu()),
        a=nn.Linear(16, 64), b=nn.Linear(64, 4), unused=nn.Linear(8, 8),
    )  # fmt: skip
    randomise(model)
    passes = f"prune{{params=60%,allocation={allocation}}}"
    module = graphopt.optimize(model, passes=passes, example_inputs=(vectors,))
    have, had = (sum(p.numel() for p in m.parameters()) for m in (module, model))
    assert have <= 0.6 * had


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_written_out_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 8).to(dtype)
    assert_exact(pruned(GatedMLP().to(dtype), x, budget="flops=50%"), x, tolerance=0.05)


def ratio(s: Any, x: Tensor) -> Tensor:
    return s.o(s.a(x) / s.b(x))


def logarithm(s: Any, x: Tensor) -> Tensor:
    return s.o(s.a(x).abs().log() + s.b(x))


def standardised(s: Any, x: Tensor) -> Tensor:
    y = s.a(x) + s.b(x)
    return s.o((y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True))


@pytest.mark.parametrize("function", [ratio, logarithm, standardised])
def test_what_is_not_finite_for_zeros_is_kept(function: Callable[..., Tensor]) -> None:
    wide = {"a": mlp(16, 48, 32), "b": mlp(16, 48, 32)}
    model = Net(function, **wide, o=nn.Linear(32, 3)).double()
    module = pruned(model, sequences.double(), budget="params=80%")
    assert_exact(module, sequences.double(), tolerance=1e-8)


def test_tied_parameters_are_reported_as_pytorch_names_them() -> None:
    model = Net(lambda s, i: s.b(s.a(i)), a=nn.Embedding(16, 32), b=nn.Linear(32, 16, bias=False))
    model.b.weight = model.a.weight
    report = pruned(model, torch.randint(0, 16, (2, 5))).report.to_dict()["prune"]
    assert {f["parameter"] for f in report["frozen"]} | set(report["kept"]) == {"a.weight"}


def test_transposed_weights_stay_tied() -> None:
    module = pruned(TiedAutoencoder(), torch.randn(3, 20), budget="flops=50%")
    assert len(list(module.parameters())) == len(list(TiedAutoencoder().parameters()))


def ellipsis(s: Any, x: Tensor) -> Tensor:
    return s.o(torch.einsum("...i,oi->...o", x, s.a[0].weight) + s.a[0].bias)


def spectrum(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.o(y + torch.fft.fft(y, dim=1).real)


def rolled(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    return s.o(y.roll((1, 4), (1, -1)) + y.roll(-8, 2))


def varied(s: Any, x: Tensor) -> Tensor:
    y = s.a(x)
    variance, mean = torch.var_mean(y, -1, keepdim=True)
    return s.o((y - mean) / (variance + y.std((1, 2), keepdim=True) + 0.1)) + y.var(-1)[..., None]


def permuted(s: Any, x: Tensor) -> Tensor:
    return s.o(s.a(x)[..., torch.arange(31, -1, -1)])


NO_RULE = pytest.mark.xfail(strict=True, reason="no rule for this form", raises=AssertionError)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [ellipsis, spectrum, rolled, varied, pytest.param(permuted, marks=NO_RULE)]
)
def test_axes_that_could_go(function: Callable[..., Tensor]) -> None:
    model = Net(function, a=mlp(16, 32), o=nn.Linear(32, 3), c=mlp(16, 48, 3)).double()
    body = Net(lambda s, x: s.net(x) + s.net.c(x), net=model)
    x = sequences.double()
    module = pruned(body, x, budget="params=60%")
    assert_exact(module, x, tolerance=1e-10)
    assert_exact(module, torch.cat([x, x + 1]), tolerance=1e-10)
    assert free(module, "net.a.0.weight", 0)
    assert module.get_parameter("net.a.0.weight").shape[0] < 32


def one_place(s: Any, x: Tensor) -> Tensor:
    """A place that is cut out is broadcast."""
    y = s.a(x)
    return s.o(y * y.narrow(-1, 3, 1))


def parts(s: Any, x: Tensor) -> Tensor:
    """Means of parts, one of which could lose all of its places."""
    a, b = s.a(x).split([2, 30], -1)
    return s.o(torch.cat([a.mean(-1, keepdim=True), b.mean(-1, keepdim=True)], -1))


@pytest.mark.parametrize(("function", "width"), [(one_place, 32), (parts, 2)])
@pytest.mark.parametrize("first", [0.0, 9.0])
def test_no_part_of_an_axis_loses_all(
    function: Callable[..., Tensor], width: int, first: float
) -> None:
    model = Net(function, a=nn.Linear(16, 32), o=nn.Linear(width, 3)).double().eval()
    randomise(model)
    with torch.no_grad():
        model.a.weight[:4] *= first  # they go first, or last
    passes = "prune{params=20%,criterion=l2}"
    module = graphopt.optimize(model, passes=passes, example_inputs=(vectors.double(),))
    assert_exact(module, vectors.double(), tolerance=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_width_of_an_embedding_bag(mode: str) -> None:
    model = Net(lambda s, i: s.o(s.e(i)), e=nn.EmbeddingBag(20, 24, mode=mode), o=mlp(24, 32, 3))
    ids = torch.randint(0, 20, (2, 6))
    module = pruned(model, ids)
    assert_exact(module, ids)
    assert module.get_parameter("e.weight").shape[1] < 24


@pytest.mark.slow
def test_copies_that_promise_their_number() -> None:
    model = Net(
        lambda s, x: s.o(torch.repeat_interleave(s.a(x), 2, dim=1, output_size=48)),
        a=nn.Linear(16, 24), o=nn.Linear(48, 3),
    )  # fmt: skip
    module = pruned(model.double(), vectors.double())
    assert_exact(module, vectors.double(), tolerance=1e-10)


@pytest.mark.slow
def test_a_recurrent_layer_with_projections() -> None:
    layer = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True, proj_size=10)
    model = Net(lambda s, x: s.o(s.r(s.a(x))[0]), a=mlp(16, 16), r=layer, o=nn.Linear(20, 3))
    module = pruned(model.double(), sequences.double(), budget="params=80%")
    assert_exact(module, sequences.double(), tolerance=1e-10)
    assert module.get_parameter("r.weight_hr_l0").shape[0] < 10


def rotated(s: Any, x: Tensor) -> Tensor:
    q = s.inner(x).view(x.shape[0], 2, 6, 2)
    turn = torch.polar(torch.ones(6), torch.arange(6.0))
    turned = torch.view_as_real(torch.view_as_complex(q) * turn)
    return s.last(torch.relu(s.outer(turned.flatten(1))))


def test_real_and_imaginary_parts_stay_together() -> None:
    layers = {"inner": nn.Linear(8, 24), "outer": nn.Linear(24, 20), "last": nn.Linear(20, 4)}
    x = torch.randn(3, 8)
    small = pruned(Net(rotated, **layers), x)
    assert small.inner.weight.shape[0] % 2 == 0
    assert_exact(small, x)
