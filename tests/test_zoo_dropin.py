"""Optimised modules where the source stood: DDP, torch.compile, scalers, a training loop."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import graphopt
from tests.zoo import ZOO, plain_loss
from tests.zoo.memory import step_footprint
from tests.zoo.plans import feasible


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ddp_worker(rank: int, port: int, name: str, path: str) -> None:
    """Gradients of one step under DDP, of the source and of the planned module."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    entry = ZOO[name]
    args, kwargs = entry.inputs(4)
    half = slice(2 * rank, 2 * rank + 2)
    args = tuple(a[half] for a in args)
    kwargs = {k: v[half] for k, v in kwargs.items()}
    found: list[dict[str, Tensor]] = []
    for module in (entry.model(), feasible(entry, 60)):
        # Small buckets: several reductions, started while backward still runs.
        wrapped = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=0.02)
        torch.manual_seed(rank)
        for _ in range(2):
            wrapped.zero_grad()
            entry.loss(wrapped(*args, **kwargs)).backward()
        found.append({k: p.grad for k, p in module.named_parameters() if p.grad is not None})
    torch.save(found, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_ddp_gives_the_gradients_of_the_source_under_ddp(name: str, tmp_path: Any) -> None:
    mp.spawn(_ddp_worker, args=(_free_port(), name, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for eager, planned in ranks:
        assert eager.keys() == planned.keys()
        scale = max(g.norm() for g in eager.values())
        for key, want in eager.items():
            torch.testing.assert_close(planned[key], want, rtol=1e-4, atol=1e-5 * float(scale))
    for key, gradient in ranks[0][1].items():
        torch.testing.assert_close(gradient, ranks[1][1][key])


def test_the_peak_stays_within_the_budget_inside_torch_compile() -> None:
    entry = ZOO["cnn"]
    planned = feasible(entry, 60)
    args, kwargs = entry.inputs()
    budget = planned.report.to_dict()["memory"]["budget"]
    torch._dynamo.reset()
    compiled = torch.compile(planned, backend="aot_eager")
    outer = torch.compile(nn.Sequential(planned, nn.Tanh()), backend="aot_eager")
    try:
        assert step_footprint(compiled, args, kwargs, plain_loss).peak <= budget
        assert step_footprint(outer, args, kwargs, plain_loss).peak <= 1.01 * budget
        source = entry.model()
        torch.testing.assert_close(compiled(*args), source(*args))
    finally:
        torch._dynamo.reset()


def test_fullgraph_compilation_is_refused_by_name() -> None:
    entry = ZOO["mlp"]
    planned = feasible(entry, 60)
    args, kwargs = entry.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(planned, backend="aot_eager", fullgraph=True)
    try:
        with pytest.raises(Exception, match=r"(?i)fullgraph|graph break|graphopt"):
            compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()


def test_micro_batches_accumulate() -> None:
    entry = ZOO["gpt2"]
    gradients = []
    for module in (feasible(entry, 60).eval(), entry.model().eval()):
        for batch in (4, 2, 4):
            args, kwargs = entry.inputs(batch)
            (entry.loss(module(*args, **kwargs)) / 3).backward()
        gradients.append({k: p.grad for k, p in module.named_parameters()})
    scale = float(max(g.norm() for g in gradients[1].values()))
    for key, want in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], want, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_autocast_and_grad_scaler(name: str) -> None:
    """A mixed-precision loop gives the source's losses, and the scaler sees its gradients."""
    entry = ZOO[name]
    losses = []
    args, kwargs = entry.inputs()
    for module in (entry.model(), feasible(entry, 70)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        torch.manual_seed(2)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = entry.loss(module(*args, **kwargs))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2, abs=1e-3)


def test_a_training_loop_as_users_write_it() -> None:
    """AdamW with parameter groups by name, a scheduler, clipping, checkpoints, eval between."""
    entry = ZOO["bert"]
    args, kwargs = entry.inputs()
    curves = []
    for module in (entry.model(), feasible(entry, 60)):
        decay = [p for n, p in module.named_parameters() if "bias" not in n]
        plain = [p for n, p in module.named_parameters() if "bias" in n]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-3,
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        torch.manual_seed(0)
        curve = []
        for _ in range(4):
            module.train()
            loss = module(*args, **kwargs).loss
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            module.eval()
            with torch.no_grad():
                curve += [loss.item(), module(*args, **kwargs).loss.item()]
        module.load_state_dict(entry.model().state_dict())
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("counted", [False, True])
def test_the_trainer_of_transformers_runs_on_it(tmp_path: Any, counted: bool) -> None:
    """It hands `num_items_in_batch` to models that take any keyword; ours take what they know."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    entry = ZOO["gpt2"]
    ids = entry.inputs(8)[1]["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids]
    kwargs = {"input_ids": ids[:4], "labels": ids[:4]}
    if counted:
        kwargs["num_items_in_batch"] = torch.tensor(ids[:4].numel())
    source = entry.model()
    planned = graphopt.optimize(source, "memory=60%", example_kwargs=kwargs, time_limit=4)
    source.accepts_loss_kwargs = counted
    losses = []
    for module in (source, planned):
        # Its checkpoints are for its own classes: tied weights of any other module are refused.
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            seed=0,
            save_strategy="no",
        )
        result = transformers.Trainer(module, arguments, train_dataset=data).train()
        losses.append(result.training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_half_precision_keeps_the_plan() -> None:
    entry = ZOO["cnn"]
    planned = feasible(entry, 60).to(torch.bfloat16)
    args, _ = entry.inputs()
    x = args[0].to(torch.bfloat16)
    eager = step_footprint(entry.model().to(torch.bfloat16), (x,), {}, plain_loss).peak
    assert step_footprint(planned, (x,), {}, plain_loss).peak <= 0.75 * eager
    with pytest.raises((graphopt.GraphoptError, RuntimeError)):
        planned(args[0])
