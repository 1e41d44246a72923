"""The folded view: each rule on a small network, and where folding would be wrong."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError, VerificationError
from graphopt.private import lower, predict
from graphopt.private.folding import fold
from graphopt.private.folding.affine import number
from graphopt.private.folding.verify import inputs_like
from tests.passes.linearize.nets import Net, drawn, linearized, settled

IMAGE = (2, 4, 7, 7)


def captured(model: nn.Module, *inputs: Tensor) -> Any:
    return graphopt.capture(model.double().eval(), tuple(x.double() for x in inputs)).emit()


def ops(module: Any) -> dict[str, int]:
    """How often each op is in a module's graph."""
    names = [str(n.target) for n in module.program.module.graph.nodes if n.op == "call_function"]
    return dict(Counter(name.split(".")[1].rstrip("_") for name in names))


def error(module: Any, view: Any, *inputs: Tensor) -> float:
    with torch.no_grad():
        want, got = module(*inputs), view(*inputs)
    assert want.shape == got.shape
    assert want.dtype == got.dtype
    return float((want - got).abs().max() / want.abs().max())


def folded(function: Callable[..., Any], *shape: int, **layers: Any) -> dict[str, int]:
    """Ops of the view of a network, which computes what the network does in float64."""
    torch.manual_seed(1)
    shape = shape or IMAGE
    module = captured(settled(Net(function, **layers)), drawn(*shape)).eval()
    view = module.folded()
    for batch in (shape[0], 3):
        assert error(module, view, drawn(batch, *shape[1:], seed=8).double()) < 1e-10
    return ops(view)


class Scaled(nn.Module):
    """A scale and shift a channel."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels, *[1] * dims) + 0.5)
        self.shift = nn.Parameter(torch.randn(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Squared(nn.Module):
    """A polynomial of degree two a channel, as linearization writes it."""

    def __init__(self, *terms: list[float]) -> None:
        super().__init__()
        self.terms = nn.Parameter(torch.tensor(terms))

    def forward(self, x: Tensor) -> Tensor:
        a0, a1, a2 = (t.view(-1, 1, 1) for t in self.terms)
        return a2 * x.square() + (a1 * x + a0)


CONVS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 4), (2, 5)),
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2, bias=False), IMAGE),
    "depthwise": (nn.Conv2d(4, 8, 3, 2, padding=1, groups=4), IMAGE),
    "same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), IMAGE),
    "3d": (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1), IMAGE),
    "transposed groups": (nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), IMAGE),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_norm_folds_into_what_is_before_it(name: str) -> None:
    layer, shape = CONVS[name]
    layer = copy.deepcopy(layer)
    channels = getattr(layer, "out_channels", 4)
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    found = folded(lambda s, x: s.n(s.l(x)).relu(), *shape, l=layer, n=norms[len(shape)](channels))
    assert sum(found.values()) == 2
    assert "batch_norm" not in found


def test_a_norm_without_an_operator_is_one_scale_and_one_shift() -> None:
    assert folded(lambda s, x: s.n(x.relu()).relu(), n=nn.BatchNorm2d(4)) == {
        "relu": 2, "mul": 1, "add": 1,
    }  # fmt: skip
    found = folded(lambda s, x: s.n(x.relu()), n=nn.BatchNorm2d(4, affine=False))
    assert found == {"relu": 1, "mul": 1, "add": 1}


def test_two_readers_keep_the_norm() -> None:
    found = folded(
        lambda s, x: (y := s.c(x)).relu() + s.n(y).relu(), c=nn.Conv2d(4, 4, 3), n=nn.BatchNorm2d(4)
    )
    assert found == {"conv2d": 1, "mul": 1, "add": 2, "relu": 2}


def test_scales_and_shifts_of_any_spelling_fold() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        y = 3.0 - s.c(x) * s.a / 0.5
        return (-(y - s.b) + 2.0 * 0.25).relu()

    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.rand(*shape) + 0.5) for shape in ((6, 1, 1), (1, 6, 1, 1)))
    assert folded(function, c=nn.Conv2d(4, 6, 3, padding=1), a=a, b=b) == {"conv2d": 1, "relu": 1}


def test_a_factor_of_each_place_stays() -> None:
    places = nn.Parameter(torch.rand(4, 5, 5))
    found = folded(lambda s, x: s.c(x) * s.p, c=nn.Conv2d(4, 4, 3), p=places)
    assert found == {"conv2d": 1, "mul": 1}


def test_a_factor_that_widens_the_value_stays() -> None:
    found = folded(
        lambda s, x: s.l(x) * s.p, 2, 5, l=nn.Linear(5, 1), p=nn.Parameter(torch.rand(4))
    )
    assert found == {"linear": 1, "mul": 1}


def test_tokens_fold_along_the_last_axis() -> None:
    found = folded(lambda s, x: s.t(s.l(x)).relu(), 2, 3, 5, l=nn.Linear(5, 4), t=Scaled(4, 0))
    assert found == {"linear": 1, "relu": 1}


# through sums and other ops -----------------------------------------------------------------------


def residual(s: Any, x: Tensor) -> Tensor:
    return s.n(s.c(x.relu()) - s.d(x.sigmoid())).relu()


def test_through_a_sum_that_takes_it() -> None:
    found = folded(
        residual, c=nn.Conv2d(4, 4, 3, padding=1), d=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4)
    )
    assert found == {"relu": 2, "sigmoid": 1, "conv2d": 2, "sub": 1}


def test_not_through_a_sum_with_another_term() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return s.n(s.c(x) + x.relu()).relu()

    found = folded(function, c=nn.Conv2d(4, 4, 3, padding=1), n=nn.BatchNorm2d(4))
    assert found == {"conv2d": 1, "relu": 2, "add": 2, "mul": 1}


def test_not_through_a_sum_whose_term_has_another_reader() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        y = s.d(x.sigmoid())
        return s.n(s.c(x.relu()) + y).relu() + y.relu()

    found = folded(
        function, c=nn.Conv2d(4, 4, 3, padding=1), d=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4)
    )
    assert found == {"relu": 3, "sigmoid": 1, "conv2d": 2, "add": 3, "mul": 1}


def test_a_shift_alone_needs_one_term() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return (x.relu() - s.c(x) + s.b).relu()

    found = folded(function, c=nn.Conv2d(4, 4, 3, padding=1), b=nn.Parameter(torch.randn(4, 1, 1)))
    assert found == {"conv2d": 1, "relu": 2, "sub": 1}


def test_through_concatenated_parts() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return s.n(torch.cat([s.c(x), s.d(x)], 1)).relu()

    layers = {"c": nn.Conv2d(4, 2, 3, padding=1), "d": nn.Conv2d(4, 3, 1)}
    found = folded(function, **layers, n=nn.BatchNorm2d(5))
    assert found == {"conv2d": 2, "cat": 1, "relu": 1}


def test_through_a_pool_and_a_new_arrangement() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return s.o(F.avg_pool2d(s.n(x.relu()), 2).flatten(1))

    found = folded(function, o=nn.Linear(36, 3), n=nn.BatchNorm2d(4))
    assert found == {"relu": 1, "avg_pool2d": 1, "flatten": 1, "linear": 1}


def test_a_shift_does_not_pass_a_pool_that_counts_zeros() -> None:
    def function(s: Any, x: Tensor) -> Tensor:
        return s.o(F.avg_pool2d(s.n(x.relu()), 2, padding=1).flatten(1))

    found = folded(function, o=nn.Linear(64, 3), n=nn.BatchNorm2d(4))
    assert found["add"] == 1
    assert "mul" not in found, "the scale does"


# into the following operator ----------------------------------------------------------------------


def test_into_the_following_operator_without_zeros() -> None:
    found = folded(lambda s, x: s.c(s.n(x.relu())), c=nn.Conv2d(4, 6, 3), n=nn.BatchNorm2d(4))
    assert found == {"relu": 1, "conv2d": 1}


def test_a_shift_stays_before_zeros() -> None:
    layers = {"c": nn.Conv2d(4, 6, 3, padding=1), "n": nn.BatchNorm2d(4)}
    found = folded(lambda s, x: s.c(s.n(x.relu())), **layers)
    assert found == {"relu": 1, "add": 1, "conv2d": 1}, "the scale goes on, the shift doesn't"


def test_a_shift_stays_before_a_transposed_convolution() -> None:
    layers = {"c": nn.ConvTranspose2d(4, 6, 3, 2), "n": nn.BatchNorm2d(4)}
    assert folded(lambda s, x: s.c(s.n(x.relu())), **layers)["add"] == 1


def test_all_readers_take_it_or_none() -> None:
    layers = {"c": nn.Conv2d(4, 6, 3), "d": nn.Conv2d(4, 6, 3), "n": nn.BatchNorm2d(4)}
    found = folded(lambda s, x: s.c(y := s.n(x.relu())) * s.d(y), **layers)
    assert found == {"relu": 1, "conv2d": 2, "mul": 1}
    found = folded(
        lambda s, x: s.c(y := s.n(x.relu())).sum() + s.d(y).sum() + y.relu().sum(), **layers
    )
    assert found["mul"] == 1


# polynomials --------------------------------------------------------------------------------------

TERMS = ([0.1, 0.2, 0.3, 0.1], [0.5, 0.4, -0.6, 0.5], [0.2, 0.3, 0.1, 0.25])


def test_a_polynomial_is_one_square() -> None:
    layers = {"c": nn.Conv2d(4, 4, 3), "p": Squared(*TERMS), "d": nn.Conv2d(4, 2, 3)}
    assert folded(lambda s, x: s.d(s.p(s.c(x))), **layers) == {"conv2d": 2, "square": 1}


def test_before_zeros_the_constant_stays() -> None:
    layers = {"c": nn.Conv2d(4, 4, 3), "p": Squared(*TERMS), "d": nn.Conv2d(4, 2, 3, padding=1)}
    found = folded(lambda s, x: s.d(s.p(s.c(x))), **layers)
    assert found == {"conv2d": 2, "square": 1, "add": 1}


def test_signs_go_into_the_following_operator() -> None:
    terms = (TERMS[0], TERMS[1], [0.2, -0.3, 0.1, -0.25])
    layers = {"c": nn.Conv2d(4, 4, 3), "p": Squared(*terms), "d": nn.Conv2d(4, 2, 3, padding=1)}
    found = folded(lambda s, x: s.d(s.p(s.c(x))), **layers)
    assert found == {"conv2d": 2, "square": 1, "add": 1}
    alone = folded(lambda s, x: s.p(s.c(x)).relu(), c=layers["c"], p=layers["p"])
    assert alone == {"conv2d": 1, "square": 1, "mul": 1, "add": 1, "relu": 1}


@pytest.mark.parametrize("small", [0.0, 1e-9, -1e-4])
def test_a_channel_that_is_all_but_affine_keeps_the_polynomial(small: float) -> None:
    terms = (TERMS[0], TERMS[1], [0.2, small, 0.1, 0.25])
    found = folded(lambda s, x: s.p(s.c(x)).relu(), c=nn.Conv2d(4, 4, 3), p=Squared(*terms))
    assert found == {"conv2d": 1, "square": 1, "mul": 2, "add": 2, "relu": 1}


def test_a_dead_channel_is_a_constant() -> None:
    terms = ([0.0, *TERMS[0][1:]], [0.0, *TERMS[1][1:]], [0.0, *TERMS[2][1:]])
    found = folded(lambda s, x: s.p(s.c(x)).relu(), c=nn.Conv2d(4, 4, 3), p=Squared(*terms))
    assert found == {"conv2d": 1, "square": 1, "add": 1, "relu": 1}


@pytest.mark.parametrize(
    "polynomial",
    [
        lambda x: 0.2 * x * x + 0.5 * x + 0.3,
        lambda x: x * (0.2 * x + 0.5) + 0.3,
        lambda x: 0.5 * x - 0.2 * x**2,
        lambda x: (x + 1) * (x - 2),
    ],
)
def test_polynomials_however_they_are_written(polynomial: Callable[[Tensor], Tensor]) -> None:
    found = folded(lambda s, x: s.d(polynomial(s.c(x))), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 2, 3))
    assert found == {"conv2d": 2, "square": 1}


def test_a_square_that_others_read_stays() -> None:
    def cubic(s: Any, x: Tensor) -> Tensor:
        x = s.c(x)
        square = x.square()
        return (0.1 * square * x + (0.2 * square + (0.3 * x + 0.1))).relu()

    found = folded(cubic, c=nn.Conv2d(4, 4, 3))
    assert found["square"] == 1
    assert found["mul"] == 4


# neighbours ---------------------------------------------------------------------------------------


def test_linear_after_linear() -> None:
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 3)}
    assert folded(lambda s, x: s.b(s.a(x)), 2, 5, 6, **layers) == {"linear": 1}
    narrow = {"a": nn.Linear(6, 2), "b": nn.Linear(2, 8)}
    assert folded(lambda s, x: s.b(s.a(x)), 2, 6, **narrow) == {"linear": 2}, "28 products, not 48"


MERGED: dict[str, tuple[nn.Module, nn.Module]] = {
    "1x1 behind": (nn.Conv2d(4, 8, 3, 2, padding=1), nn.Conv2d(8, 4, 1)),
    "1x1 in front, no bias": (nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 3, 3, padding=1)),
    "1x1 in front": (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3)),
    "strides": (nn.Conv2d(4, 9, 1, 2, bias=False), nn.Conv2d(9, 2, 3, 2, padding=1)),
    "wide middle": (nn.Conv2d(4, 30, 2, 1, padding=1), nn.Conv2d(30, 2, 2, 2)),
    "dilated": (nn.Conv2d(4, 30, 2, dilation=2, padding=1), nn.Conv2d(30, 2, 1)),
    "dilated after": (nn.Conv2d(4, 30, 1), nn.Conv2d(30, 2, 2, dilation=3)),
    "groups": (nn.Conv2d(4, 60, 2, groups=2), nn.Conv2d(60, 4, 2, groups=2)),
    "mixed groups": (nn.Conv2d(4, 60, 1, groups=2), nn.Conv2d(60, 2, 1)),
    "after transposed": (nn.ConvTranspose2d(4, 8, 3, 2, padding=1), nn.Conv2d(8, 4, 1)),
}


@pytest.mark.parametrize("name", MERGED)
def test_neighbours_merge(name: str) -> None:
    first, second = MERGED[name]
    found = folded(lambda s, x: s.b(s.a(x)), a=copy.deepcopy(first), b=copy.deepcopy(second))
    assert sum(found.values()) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv2d(4, 30, 1), nn.Conv2d(30, 2, 3, padding=1)),  # a bias, and zeros after it
        (nn.Conv2d(4, 30, 3), nn.Conv2d(30, 2, 3, padding=1)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),  # exact, but 25 products for 18
        (nn.Conv2d(4, 30, 1), nn.ConvTranspose2d(30, 2, 2)),
    ],
)
def test_neighbours_that_would_differ_or_cost_more_stay(
    first: nn.Module, second: nn.Module
) -> None:
    layers = {"a": copy.deepcopy(first), "b": copy.deepcopy(second)}
    assert sum(folded(lambda s, x: s.b(s.a(x)), 2, 4, 20, 20, **layers).values()) == 2


def test_a_protocol_counts_rounds() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    x = drawn(2, 4, 20, 20).double()
    module = captured(model, x)
    assert ops(module.folded()) == {"conv2d": 2}, "1.2 times the products"
    view = module.folded(protocol="crypten")
    assert ops(view) == {"conv2d": 1}
    assert error(module, view, x) < 1e-10
    before, after = (predict(m, "crypten", "wan", (x,)) for m in (module, view))
    assert after.rounds == before.rounds - 1
    assert after.bytes <= before.bytes
    with pytest.raises(UsageError, match="crypton"):
        module.folded(protocol="crypton")


def test_a_residual_becomes_one_convolution() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    assert folded(lambda s, x: (x + s.c(x)).relu(), c=conv) == {"conv2d": 1, "relu": 1}
    assert folded(lambda s, x: (s.n(x) - s.c(x)).relu(), c=conv, n=nn.BatchNorm2d(4)) == {
        "conv2d": 1, "relu": 1,
    }  # fmt: skip
    both = {"c": conv, "d": nn.Conv2d(4, 4, 1, groups=2), "n": nn.BatchNorm2d(4)}
    assert folded(lambda s, x: s.n(x + s.c(x) + s.d(x)).relu(), **both) == {"conv2d": 1, "relu": 1}
    assert folded(lambda s, x: x + s.a(x), 2, 3, 5, a=nn.Linear(5, 5)) == {"linear": 1}


def test_kernels_that_do_not_lie_over_each_other_stay() -> None:
    shifted = nn.Conv2d(4, 4, 2, padding=1)
    found = folded(lambda s, x: s.c(x)[..., 1:, 1:] + x, c=shifted)
    assert found["conv2d"] == 1
    assert found["add"] == 1
    strided = {"c": nn.Conv2d(4, 4, 3, 2, padding=1), "d": nn.Conv2d(4, 4, 1, 2)}
    assert folded(lambda s, x: s.c(x) + s.d(x), **strided) == {"conv2d": 1}
    dilated = {"c": nn.Conv2d(4, 4, 3, padding=2, dilation=2), "d": nn.Conv2d(4, 4, 3, padding=1)}
    assert folded(lambda s, x: s.c(x) + s.d(x), **dilated) == {"conv2d": 2, "add": 1}


# the module and its view --------------------------------------------------------------------------


def test_a_weight_of_two_calls_gets_a_tensor_for_each() -> None:
    conv, first, second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model = settled(Net(lambda s, x: s.n(s.c(s.m(s.c(x)).relu())), c=conv, m=first, n=second))
    module = captured(model, drawn(*IMAGE))
    view = module.folded()
    assert error(module, view, drawn(*IMAGE, seed=9).double()) < 1e-10
    assert set(view.state_dict()) == {"c.weight", "c.bias", "c.weight_1", "c.bias_1"}


def test_the_module_stays_as_it_was() -> None:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    module = captured(settled(nn.Sequential(conv, norm, nn.ReLU())), drawn(*IMAGE)).train()
    module[1].training = False
    before = {k: (v.clone(), v.data_ptr()) for k, v in module.state_dict().items()}
    code, modes = module.code, {n: m.training for n, m in module.named_modules()}
    state = torch.get_rng_state()
    view = module.folded()
    assert torch.equal(state, torch.get_rng_state())
    assert module.code == code
    assert {n: m.training for n, m in module.named_modules()} == modes
    after = module.state_dict()
    assert all(
        torch.equal(v, after[k]) and p == after[k].data_ptr() for k, (v, p) in before.items()
    )
    own = {t.data_ptr() for t in view.state_dict().values()}
    assert not own & {p for _, p in before.values()}
    assert not any(m.training for m in view.modules())


def test_a_view_copies_pickles_exports_and_takes_other_batches() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Squared(*TERMS), nn.Conv2d(4, 2, 3)
    )
    module = graphopt.capture(settled(model), (drawn(*IMAGE),)).emit().eval()
    view = module.folded()
    x = drawn(5, *IMAGE[1:], seed=2)
    assert error(module, view, x) < 1e-5
    for twin in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        assert torch.equal(twin(x), view(x))
    exported = torch.export.export(view, (x,)).module()
    assert torch.equal(exported(x), view(x))
    assert error(copy.deepcopy(module).double(), copy.deepcopy(view).double(), x.double()) < 1e-5
    assert torch.equal(view.train()(x), view.eval()(x))
    view.load_state_dict(copy.deepcopy(view.state_dict()))
    assert ops(view.folded()) == ops(view), "nothing is left to fold"


def test_what_is_written_to_stays() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.register_buffer("factor", torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.factor, Tensor)
            self.factor.add_(1)
            return self.conv(x) * self.factor

    module = captured(Counting(), drawn(*IMAGE))
    view = module.folded()
    x = drawn(*IMAGE).double()
    for _ in range(3):
        assert torch.allclose(module(x), view(x), rtol=1e-12)
    assert torch.equal(module.state_dict()["factor"], view.state_dict()["factor"])


def test_a_wrong_fold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = captured(settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))), drawn(*IMAGE))

    def wrong(sheet: Any) -> int:
        for node in list(sheet.forms):
            linear = sheet.linear(node)
            if linear is not None:
                sheet.change(node, linear.then(number(1.0 + 1e-8)), sheet.data(node))
        return 0

    monkeypatch.setattr(fold, "complete_squares", wrong)
    with pytest.raises(VerificationError, match="differs from the module"):
        module.folded()


def test_public_coefficients_stay_cheap_and_secrets_secret() -> None:
    """A number is public only if all that it is made of is."""
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    module = linearized(model, drawn(8, *IMAGE[1:]), spec="relus=0,replacement=poly2").eval()
    x = drawn(1, *IMAGE[1:])
    for public in ((), ("_graphopt.*",), ("*bias*",)):
        before = predict(module, "crypten", "wan", (x,), public=public)
        after = predict(module, "crypten", "wan", (x,), public=public, folded=True)
        assert after.rounds <= before.rounds
        assert after.bytes <= before.bytes
    circuit = lower(module.folded(), (x,), public=("0.*",))
    assert all(c.secret for c in circuit.constants.values() if c.tensor.dim() > 1), "norms are not"


@pytest.mark.parametrize("protocol", ["crypten", "cheetah"])
@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: (h + net.b) * 0.5,
        lambda net, h: -(h + net.b),
        lambda net, h: h * 0.5 + net.b,
        lambda net, h: (h + net.b) * net.known,
    ],
)
def test_a_public_factor_stays_public_beside_a_secret_shift(
    between: Callable[..., Tensor], protocol: str
) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return F.relu(between(net, F.relu(x)))

    net = Net(forward)
    net.b, net.known = nn.Parameter(torch.randn(8)), nn.Parameter(torch.tensor(0.7))
    given = {"example": (drawn(4, 8),), "public": ("known",)}
    before, after = (
        predict(net.eval(), protocol, "lan", **given, folded=view) for view in (False, True)
    )
    assert (after.rounds, after.bytes) == (before.rounds, before.bytes)


@pytest.mark.parametrize("protocol", ["crypten", "cheetah"])
@pytest.mark.parametrize(
    "between",
    [
        lambda net, h: 0.3 * h * h + (0.5 * h + net.b),
        lambda net, h: (0.3 * h.square() + 0.5 * h + 0.1) + net.b,
    ],
)
def test_public_coefficients_of_a_square_take_no_secret_shift(
    between: Callable[..., Tensor], protocol: str
) -> None:
    net = Net(lambda net, x: F.relu(between(net, F.relu(x))))
    net.b = nn.Parameter(torch.randn(8))
    before, after = (
        predict(net.eval(), protocol, "lan", (drawn(4, 8),), folded=view) for view in (False, True)
    )
    assert after.rounds <= before.rounds
    assert after.bytes <= before.bytes


class Tokens(nn.Module):
    """Two tables, and a mask of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(3, 4)

    def forward(self, ids: Tensor, kinds: Tensor, both: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids.reshape(-1, 6)) + self.kinds(kinds) + self.words(both)
        return (x + self.kinds(both)) * mask[:, :, None]


def test_tokens_are_compared_on_all_of_their_table() -> None:
    """Few tokens alike: attention over equal ones may be nothing but rounding."""
    given = [torch.zeros(40, 6, dtype=torch.int64) for _ in range(4)]
    program = graphopt.capture(Tokens().eval(), tuple(given))
    ids, kinds, both, mask = inputs_like(program.signature, program.module.graph)
    assert ids.unique().numel() > 40
    assert 40 < int(ids.max()) < 50
    assert [int(x.max()) for x in (kinds, both, mask)] == [2, 2, 1]
