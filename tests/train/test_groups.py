"""Learning rates, decay and schedule of each role."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ticktune.recipe.schema import Optimizer, Schedule
from ticktune.train.groups import build_optimizer, lr_factor

OPTIONS = Optimizer(lr=1e-3, p_lr_ratio=5.0, norm_lr=2e-3, head_lr=3e-3, weight_decay=0.1, eps=1e-6, betas=[0.8, 0.95])


def groups_of(*members: tuple[Any, tuple[int, ...]], options: Optimizer = OPTIONS) -> list[dict[str, Any]]:
    named = [(f"p{i}", role, nn.Parameter(torch.ones(shape))) for i, (role, shape) in enumerate(members)]
    return build_optimizer(named, options).param_groups


@pytest.mark.parametrize(
    ("role", "shape", "lr", "decay", "eps"),
    [
        ("Q", (2, 3), 1e-3, 0.1, 1e-6),
        ("U", (2, 3), 1e-3, 0.1, 1e-6),
        ("P", (3, 2), 5e-3, 0.02, 2e-7),
        ("r", (2,), 1e-3, 0.0, 1e-6),
        ("norm", (3,), 2e-3, 0.0, 1e-6),
        ("head", (2, 3), 3e-3, 0.1, 1e-6),
        ("head", (2,), 3e-3, 0.0, 1e-6),
    ],
)
def test_a_role_has_its_rate_decay_and_eps(
    role: str, shape: tuple[int, ...], lr: float, decay: float, eps: float
) -> None:
    (group,) = groups_of((role, shape))
    assert (group["lr"], group["peak_lr"]) == (pytest.approx(lr), pytest.approx(lr))
    assert (group["weight_decay"], group["eps"]) == (pytest.approx(decay), pytest.approx(eps))
    assert group["betas"] == (0.8, 0.95)


def test_the_fused_update_is_that_of_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 5), (5, 7), (3,))]
    ours = [nn.Parameter(value.clone()) for value in start]
    plain = [nn.Parameter(value.clone()) for value in start]
    fast = build_optimizer([(f"p{i}", role, p) for i, (role, p) in enumerate(zip("QPr", ours, strict=True))], OPTIONS)
    groups = [{**group, "params": [p]} for group, p in zip(fast.param_groups, plain, strict=True)]
    slow = torch.optim.AdamW(groups, betas=fast.param_groups[0]["betas"], foreach=False, fused=False)
    assert all(group["fused"] for group in fast.param_groups)
    for group in slow.param_groups:
        group["fused"], group["foreach"] = False, False
    for _ in range(20):
        for a, b in zip(ours, plain, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        fast.step()
        slow.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_every_parameter_is_in_one_group() -> None:
    members = [("Q", (2, 2)), ("P", (2, 2)), ("Q", (2, 3)), ("head", (2, 2)), ("head", (2,)), ("norm", (2,))]
    groups = groups_of(*members)
    assert {group["role"]: len(group["params"]) for group in groups} == {
        "Q": 2,
        "P": 1,
        "norm": 1,
        "head": 1,
        "head bias": 1,
    }


@pytest.mark.parametrize("scale", [1.0, 4.0, 0.5])
def test_the_ratio_of_p_equals_a_forward_scale_under_adamw(scale: float) -> None:
    # P against s P' in the forward pass; eps and decay are large, so that both count.
    options = Optimizer(lr=1e-2, p_lr_ratio=scale, weight_decay=0.3, eps=1e-2)
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    start = torch.randn(3, 5, dtype=torch.float64)
    ours = nn.Parameter(scale * start)
    plain = nn.Parameter(start.clone())
    optimizer = build_optimizer([("P", "P", ours)], options)
    reference = torch.optim.AdamW(
        [plain], lr=options.lr, weight_decay=options.weight_decay, eps=options.eps, foreach=False
    )
    for _ in range(30):
        for parameter, output, step in (
            (ours, x @ ours.T, optimizer),
            (plain, scale * (x @ plain.T), reference),
        ):
            parameter.grad = None
            ((output - y) ** 2).mean().backward()
            step.step()
    torch.testing.assert_close(ours, scale * plain, rtol=1e-10, atol=0)
    assert (plain - start).abs().min() > 1e-3


def test_a_role_without_decay_does_not_shrink_without_gradient() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([("n", "norm", parameter)], OPTIONS)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0, 1.0]


# The schedule


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0.06), (7, 0.3), (1, 0.0), (10, 0.0), (10, 1.0), (3, 0.5)])
def test_the_schedule_equals_its_closed_form(name: Any, total: int, warmup: float) -> None:
    first = next(w for w in range(total + 1) if w >= warmup * total)  # the smallest whole number of steps
    for step in range(total):
        x = (step - first) / (total - first) if step >= first else 0.0
        after = {"linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2, "constant": 1.0}[name]
        expected = (step + 1) / first if step < first else after
        found = lr_factor(step, total, Schedule(name=name, warmup=warmup))
        assert found == pytest.approx(expected, abs=1e-12)
        assert 0 < found <= 1


def test_a_linear_schedule_equals_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)
    for step in range(20):
        assert lr_factor(step, 20, Schedule(warmup=0.0)) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_a_cosine_schedule_equals_torchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    options = Schedule(name="cosine", warmup=0.0)
    for step in range(20):
        assert lr_factor(step, 20, options) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_the_first_update_is_not_wasted_and_the_peak_is_reached() -> None:
    factors = [lr_factor(step, 100, Schedule(warmup=0.06)) for step in range(100)]
    assert factors[:7] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0])
