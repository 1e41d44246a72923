from __future__ import annotations

import copy
import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.cost.saved import saved_table
from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture
from graphopt.measure import measure_step
from tests.zoo import ZOO

ALIKE = [
    *("mlp", "cnn", "resnet", "groupnorm", "lstm", "sdpa_dropout", "transformer_encoder"),
    *("tied_weights", "dict_kwargs", "fft", "shared_batchnorm", "inplace_chain", "weight_norm"),
    *("spectral_norm", "buffer_update", "integer_outputs", "frozen", "double_dropout"),
    *("dtype_mix", "moe_dense", "autocast", "no_grad_region", "noise", "training_branch"),
]
SLOW = [
    *(
        "bert",
        "gpt2",
        "llama",
        "vit",
        "unet",
        "depthwise",
        "conv_transpose",
        "channels_last",
        "gru",
    ),
    *("rnn_tanh", "multihead_attention", "einsum", "inplace_shared_base", "unused_parameters"),
]
SIZES = ["mlp", "cnn", "transformer_encoder"]


@functools.cache
def captured(name):
    """A zoo model with its inputs and its program; the model may be used but not changed."""
    model, args, kwargs = ZOO[name]()
    return model, args, kwargs, capture(model, args, kwargs)


class Held:
    def __init__(self, tensor):
        self.storage = tensor.untyped_storage()._cdata
        self.bytes = tensor.untyped_storage().nbytes()


def eager_saved(model, args, kwargs):
    """Sizes of all storages that eager autograd keeps, but parameters, buffers and inputs."""
    held, storages = [], []

    def pack(tensor):
        storages.append(tensor.untyped_storage())  # so that no address is used twice
        packed = Held(tensor)
        held.append(weakref.ref(packed))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: None):
        outputs = model(*args, **kwargs)
    given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    own = [*model.parameters(), *model.buffers(), *given]
    known = {t.untyped_storage()._cdata for t in own}
    alive = {p.storage: p.bytes for ref in held if (p := ref()) is not None}
    del outputs
    return sorted(size for storage, size in alive.items() if storage not in known)


@pytest.mark.parametrize("name", [*ALIKE, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_saved_is_what_eager_autograd_saves(name):
    model, args, kwargs, program = captured(name)
    table = saved_table(program)
    assert sorted(v.extra for v in table.values if v.extra) == [
        size for size in eager_saved(model, args, kwargs) if size
    ]


@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer_encoder", "double_dropout"])
def test_saved_in_eval_mode(name):
    model, args, kwargs, program = captured(name)
    model = copy.deepcopy(model)
    table = saved_table(program, training=False)
    assert table.total == sum(eager_saved(model.eval(), args, kwargs))


@pytest.mark.parametrize("name", SIZES)
def test_saved_agrees_with_the_allocator(name):
    model, args, kwargs, program = captured(name)
    table = saved_table(program)
    live = measure_step(model, args, kwargs).saved
    assert table.total == pytest.approx(live, rel=0.01, abs=256)  # scalars, the loss


@pytest.mark.parametrize("name", SIZES)
def test_another_batch_size(name):
    model, args, kwargs, program = captured(name)
    symbol = next(t.shape[0].node.expr for t in program.fake_inputs())
    args, kwargs = ZOO[name].inputs(ZOO[name].second)
    table = saved_table(program, symbols={symbol: ZOO[name].second})
    assert table.total == sum(eager_saved(model, args, kwargs))


def table_of(model, *args):
    return saved_table(capture(model, args))


def test_a_chain_by_hand():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 16)

        def forward(self, x):
            return torch.tanh(torch.relu(self.layer(x)).view(-1))

    table = table_of(Chain(), torch.rand(4, 8))
    size = 4 * 16 * 4
    assert [(v.name, v.kind, v.extra, v.savers) for v in table.values] == [
        ("x", "input", 0, ("linear",)),
        ("relu", "activation", size, ("relu",)),
        ("tanh", "activation", size, ("tanh",)),
    ]
    assert table.total == 2 * size
    assert table.of("view") is table.of("relu")
    assert table.of("relu").shares == ("view",)
    assert table.of("linear") is None
    assert [v.name for v in table.saved_by("linear")] == ["x"]


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.b = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        y = torch.sigmoid(x)
        return self.a(y) + self.b(y.t().t())


def test_one_storage_with_several_savers_counts_once():
    table = table_of(Shared(), torch.rand(4, 8))
    assert table.total == 4 * 8 * 4
    value = table.of("sigmoid")
    assert value.savers == ("linear", "linear_1")
    assert set(value.shares) == {"t", "t_1"}


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("a", "b"), {"sigmoid"}),
        (("a",), {"sigmoid"}),
        ((), set()),
    ],
)
def test_requires_grad_counts(needs, expected):
    model = Shared()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in needs)
    table = table_of(model, torch.rand(4, 8))
    assert {v.name for v in table.values if v.extra} == expected


def test_an_input_that_requires_a_gradient_counts():
    model = Shared().requires_grad_(False)
    table = table_of(model, torch.rand(4, 8, requires_grad=True))
    # The weights give no gradient, so only sigmoid saves its own result.
    assert table.of("sigmoid").savers == ("sigmoid",)
    assert {v.name for v in table.values if v.kind == "parameter"} == {"a.weight", "b.weight"}


def test_what_hangs_on_an_unused_result_is_not_kept():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = torch.exp(self.layer(x))
            return y.detach() + self.layer(x)

    table = table_of(Detached(), torch.rand(4, 8))
    assert table.total == 0


def test_values_inside_an_op_are_internal():
    class Drop(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training)

    table = table_of(Drop(), torch.rand(4, 8, requires_grad=True))
    (value,) = [v for v in table.values if v.extra]
    assert value.kind == "internal"
    assert value.savers == ("dropout",)
    assert value.bytes == 4 * 8 or value.bytes == 4 * 8 * 4  # the mask


def test_in_place_results_share_the_storage():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return F.relu_(self.layer(x))

    table = table_of(InPlace(), torch.rand(4, 8))
    value = table.of("relu_")
    assert value.name == "linear"
    assert value.savers == ("relu_",)
    assert value.shares == ("relu_",)


def test_a_branch_counts_the_larger_side():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            def big(x):
                return torch.tanh(torch.exp(self.a(x)))

            return torch.cond(x.sum() > 0, big, lambda x: self.a(x), (x,))

    program = capture(Branch(), (torch.rand(4, 8),))
    assert saved_table(program).total == 2 * 4 * 8 * 4
    assert saved_table(program, inputs=[torch.rand(4, 8)]).total == 2 * 4 * 8 * 4
    assert saved_table(program, inputs=[-torch.rand(4, 8)]).total == 0


def test_sizes_that_depend_on_the_data_need_real_inputs():
    model, args, kwargs = ZOO["moe_sparse"]()
    program = capture(model, args, kwargs)
    with pytest.raises(UnsupportedError, match="depend on the data"):
        saved_table(program)
    table = saved_table(program, inputs=program.signature.flatten_inputs(args, kwargs))
    assert table.total == sum(eager_saved(program.emit(), args, kwargs))


def test_real_inputs_leave_buffers_alone():
    model, args, kwargs, program = captured("resnet")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = saved_table(program, inputs=program.signature.flatten_inputs(args, kwargs))
    assert table.total == saved_table(program).total
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_json_form():
    data = table_of(Shared(), torch.rand(4, 8)).to_dict()
    assert data["total"] == sum(
        v["bytes"] for v in data["values"] if v["kind"] in ("activation", "internal")
    )
