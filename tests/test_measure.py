from __future__ import annotations

import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.comparison import observe
from graphopt.errors import ModelError, NothingToTrainError, UnsupportedError, UsageError
from graphopt.measure import (
    default_loss,
    measure_loss,
    measure_step,
    step_flops,
    step_seconds,
    trace_memory,
)
from tests.cost.joint_graphs import SmallCnn
from tests.zoo.memory import footprint, step_footprint

KB = 1024


def test_trace_by_hand():
    def region(mark):
        a = torch.empty(KB)
        mark("one")
        b = torch.empty(2 * KB)
        del a
        mark("two")
        c = torch.empty(KB // 2)
        del c
        return b

    trace = trace_memory(region)
    assert trace.peak == 12 * KB
    assert trace.live == 8 * KB
    assert trace.live_at("one") == 4 * KB
    assert trace.live_at("two") == 8 * KB
    assert trace.peak_between(None, "one") == 4 * KB
    assert trace.peak_between("one", "two") == 12 * KB
    assert trace.peak_between("two") == 10 * KB
    assert [live // KB for _, live in trace.timeline] == [4, 12, 8, 10, 8]
    assert trace.segments() == [
        ("one", 4 * KB, 12 * KB, 8 * KB),
        ("two", 8 * KB, 10 * KB, 8 * KB),
    ]
    with pytest.raises(KeyError):
        trace.live_at("three")


def test_garbage_from_before_does_not_count():
    class Node:
        pass

    first, second = Node(), Node()
    first.other, second.other, first.tensor = second, first, torch.empty(KB)
    del first, second
    assert trace_memory(lambda: None).live == 0


def test_a_running_profiler_is_named():
    with torch.profiler.profile(), pytest.raises(UnsupportedError, match="profiler is running"):
        trace_memory(lambda: None)


def test_an_exception_closes_the_session_and_leaves_the_collector_on():
    import gc

    with pytest.raises(ZeroDivisionError):
        trace_memory(lambda: 1 // 0)
    assert gc.isenabled()
    assert trace_memory(lambda: torch.empty(KB)).live == 4 * KB  # the session was closed


def test_step_agrees_with_an_independent_measurement():
    model, x = SmallCnn(), torch.rand(4, 3, 16, 16)
    expected = step_footprint(model, (x,), {}, lambda out: out.sum())
    found = measure_step(model, (x,))
    assert found.peak == expected.peak
    # The independent one still holds the outputs (4 x 10 floats) in the loss's frame or not.
    assert found.saved == pytest.approx(expected.saved, abs=4 * 10 * 4)
    assert found.live == 0
    assert found.forward_peak <= found.peak
    assert found.peak == max(found.forward_peak, found.backward_peak)
    assert found.timeline[-1][1] == 0


def test_saved_bytes_of_a_chain_by_hand():
    # Each tanh saves its output; the sum saves nothing; the loss is one float.
    model = nn.Sequential(*[nn.Tanh() for _ in range(3)])
    x = torch.rand(KB, requires_grad=True)
    found = measure_step(model, (x,))
    assert found.saved == 3 * 4 * KB + 4
    assert x.grad is None


def test_outputs_are_let_go_unless_held():
    model, x = nn.Linear(8, KB), torch.rand(1, 8)
    held = measure_step(model, (x,), hold_outputs=True)
    assert held.saved - measure_step(model, (x,)).saved == 4 * KB


def test_forward_only_counts_no_saved_values():
    model, x = nn.Sequential(*[nn.Tanh() for _ in range(5)]), torch.rand(KB)
    found = measure_step(model, (x,), forward_only=True)
    assert found.peak == 2 * 4 * KB  # an input and an output of one op
    assert found.loss is None
    with torch.no_grad():
        assert footprint(lambda: model(x)).peak == found.peak


class Untidy(nn.Module):
    """Changes all the state that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean(0)  # another tensor under the same name
        return F.dropout(self.norm(x) * self.frozen, 0.5 + 0.1 * random.random(), self.training)


@pytest.mark.parametrize("fails", [False, True])
def test_all_state_is_as_before(fails):
    model, x = Untidy(), torch.rand(3, 4, requires_grad=True)
    model(x).sum().backward()
    model.norm.eval()
    x.grad = marker = torch.full((3, 4), 7.0)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    buffers = dict(model.named_buffers())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    seeds = torch.get_rng_state(), random.getstate()

    def failing(outputs):
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure_step(model, (x,), loss=failing)
    else:
        with torch.no_grad():
            measure_step(model, (x,))
            assert not torch.is_grad_enabled()
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert all(torch.equal(model.get_parameter(n).grad, g) for n, g in values.items())
    assert all(t is buffers[n] for n, t in model.named_buffers())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert x.grad is marker
    assert bool((marker == 7).all())
    assert (model.training, model.norm.training) == (True, False)


def test_autocast_counts_as_it_is():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.rand(256, 64)
    plain = measure_step(model, (x,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = measure_step(model, (x,))
        assert torch.is_autocast_enabled("cpu")
    assert plain.saved == 256 * 64 * 4 + 4  # the second layer's input, and the loss
    # In bfloat16 that is half as large, but the casts of the input and of one weight are saved too.
    assert mixed.saved == 256 * 64 * 2 + (256 * 64 * 2 + 64 * 64 * 2) + 2


def test_default_loss_prefers_the_models_own():
    own, x = torch.tensor(3.0), torch.ones(2, 2)
    assert default_loss({"loss": own, "logits": x}) is own
    assert default_loss(own) is own
    assert default_loss((own,)) is own
    assert float(default_loss({"loss": None, "logits": x})) == 4
    assert float(default_loss((x, {"a": 2 * x, "ids": torch.ones(2, dtype=torch.long)}))) == 12
    assert float(default_loss([x, torch.complex(x, x)])) == 8
    with pytest.raises(NothingToTrainError):
        default_loss((torch.ones(2, dtype=torch.long), None))


def test_nothing_to_train_is_an_error():
    model, x = nn.Linear(4, 4).requires_grad_(False), torch.rand(2, 4)
    with pytest.raises(NothingToTrainError, match="requires a gradient"):
        measure_step(model, (x,))


def test_a_loss_that_is_none_is_named():
    model, x = nn.Linear(4, 4), torch.rand(2, 4)
    with pytest.raises(UsageError, match="one number"):
        measure_step(model, (x,), loss=lambda out: out)
    with pytest.raises(UsageError, match="but it is int"):
        measure_step(model, (x,), loss=lambda out: 3)
    with pytest.raises(ModelError, match=r"the loss fails .* 'nothing'") as caught:
        measure_step(model, (x,), loss=lambda out: out.nothing)
    assert "test_measure.py" in str(caught.value)


def test_loss_by_hand():
    out = torch.rand(8, 32)
    size = 8 * 32 * 4
    plain = measure_loss(out)
    assert plain.kept == 4
    assert plain.tangents[0].stride == (0, 0)  # a sum hands back an expanded one
    assert plain.tangent_bytes == 4
    assert plain.saves == (False,)
    square = measure_loss(out, lambda o: (o * o).sum())
    assert square.kept == 4
    assert square.forward_peak == size + 4
    assert square.tangent_bytes == size
    assert square.saves == (True,)
    target = torch.zeros(8, dtype=torch.long)
    entropy = measure_loss(out, lambda o: F.cross_entropy(o, target))
    assert size < entropy.kept < size + 64  # log-probabilities and scalars
    assert entropy.saves == (False,)
    assert entropy.backward_peak > entropy.kept + size


def test_loss_of_fake_outputs_and_partial_gradients():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        outputs = {"a": torch.empty(4, 4).t(), "b": torch.empty(3), "n": 5}
    found = measure_loss(outputs, lambda out: out["a"].exp().sum())
    assert [t and t.shape for t in found.tangents] == [(4, 4), None, None]
    own = measure_loss({"loss": torch.rand(()), "logits": torch.rand(3)})
    assert own.kept == 0
    assert own.tangents[1] is None


def test_flops_of_a_step():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.rand(3, 8)
    first, second = 2 * 3 * 8 * 16, 2 * 3 * 16 * 4
    assert step_flops(model, (x,), forward_only=True) == first + second
    # Backward: weights of both layers, and the input of the second one only.
    assert step_flops(model, (x,)) == first + second + first + 2 * second
    assert all(p.grad is None for p in model.parameters())


def test_seconds_are_paired():
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.3)
            return super().forward(x)

    torch.manual_seed(0)
    fast, slow, x = nn.Linear(128, 128), Slow(128, 128), torch.rand(256, 128)
    seen = []
    found = step_seconds(
        slow, (x,), reference=fast, repeats=3, progress=lambda done, total: seen.append(done)
    )
    assert len(found.ratios) == 3
    assert found.ratio > 2
    assert found.seconds > found.reference_seconds > 0
    assert seen == [1, 2, 3, 4]
    assert step_seconds(fast, (x,), repeats=1).ratio is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_the_caching_allocators():
    model, x = SmallCnn().cuda(), torch.rand(4, 3, 16, 16, device="cuda")
    found = measure_step(model, (x,))
    assert found.live == 0
    assert found.peak >= found.saved > 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(x).sum().backward()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(x).sum().backward()
    torch.cuda.synchronize()
    assert found.peak == torch.cuda.max_memory_allocated() - base


def test_hooks_on_parameters_are_off_and_back_on():
    model, x = nn.Linear(4, 4), torch.rand(2, 4)
    optimizer = torch.optim.Adam(model.parameters())

    def step(parameter):
        optimizer.step()
        optimizer.zero_grad()

    scaled = model.bias.register_hook(lambda gradient: 2 * gradient)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    measure_step(model, (x,))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not optimizer.state
    model(x).sum().backward()
    assert optimizer.state
    assert not torch.equal(model.weight, before["weight"])
    scaled.remove()


def test_attributes_are_as_before():
    class Keeps(nn.Linear):
        def forward(self, x):
            self.seen.append(len(self.seen))
            self.last = super().forward(x)
            return self.last

    model = Keeps(4, 4)
    model.seen, model.last = [], None
    measure_step(model, (torch.rand(2, 4),))
    assert model.seen == []
    assert model.last is None


def test_every_cuda_device_is_seeded_and_restored(monkeypatch):
    states = [1, 2]  # of two devices, neither of which holds a parameter

    def restore(kept):
        states[:] = kept

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restore)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: states.append(seed))
    observed = observe(nn.Linear(2, 2), (torch.rand(1, 2),), {}, training=True, seed=7)
    assert observed.gradients
    assert states == [1, 2]


def test_no_seed_waits_for_a_cuda_that_is_not_initialised():
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is initialised")
    waiting = torch.cuda._lazy_seed_tracker.get_calls()
    observe(nn.Linear(2, 2), (torch.rand(1, 2),), {}, training=True, seed=7)
    assert torch.cuda._lazy_seed_tracker.get_calls() == waiting
