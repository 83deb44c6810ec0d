"""The loop: accumulation, clipping, fp16, NaN, and randomness that depends on nothing but the seed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability.catalogue import case
from tests.training import CPU, CPU_FP16, Work, causal_lm, classification, optimizer_of, same, snapshot, steps
from ticktune.checkpoint import Progress, restore_checkpoint, save_checkpoint
from ticktune.errors import NumericsError
from ticktune.evaluate import score
from ticktune.patch.attach import adapter_parameters, attach, set_training
from ticktune.train.steps import StepReport


def _sgd(work: Work, lr: float = 1.0) -> torch.optim.SGD:
    """An optimizer whose update is the gradient, so that its size can be read off."""
    groups = [{"params": [p for _, _, p in adapter_parameters(work.model)], "lr": lr, "peak_lr": lr}]
    return torch.optim.SGD(groups)


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[key].double() - b[key].double()).square().sum()) for key in a))


def _after_one_step(folder: Path, micro: int) -> tuple[StepReport, float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    work = causal_lm(folder, rows=8)
    attach(work.model, 4)
    before = snapshot(work.model)
    # A large eps: with the usual one, AdamW's first step is the sign even of rounding errors.
    optimizer = optimizer_of(work.model, lr=0.1, norm_lr=0.1, eps=1e-2)
    [report] = steps(work, work.batches(8, micro), optimizer)
    after = snapshot(work.model)
    return report, _distance(before, after), after


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_micro_batches_give_the_step_of_the_whole_batch(tiny_llama: Path, micro: int) -> None:
    whole, moved, expected = _after_one_step(tiny_llama, 8)
    parts, _, found = _after_one_step(tiny_llama, micro)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-6)
    assert parts.rows == whole.rows == 8
    assert _distance(expected, found) <= 1e-6 * moved


def test_fast_steps_have_the_losses_of_autograds_steps(tiny_llama: Path) -> None:
    found = []
    for fast in (False, True):
        work = causal_lm(tiny_llama)
        attach(work.model, 4, fast=fast)
        found.append(list(steps(work, work.batches(8), optimizer_of(work.model, lr=1e-2, eps=1e-2))))
    assert len(found[0]) == 3
    for plain, fast in zip(*found, strict=True):
        assert fast.loss == pytest.approx(plain.loss, rel=1e-6)
        assert fast.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


def test_rows_of_the_accumulation_test_are_ragged(tiny_llama: Path) -> None:
    """Were they not, a mean of the micro-batches' means would pass it."""
    work = causal_lm(tiny_llama, rows=8)
    weights = [work.task.weight(micro) for micro in work.batches(8, 2)[0]]
    assert len(set(weights)) > 2


def test_loss_is_the_mean_over_the_learned_tokens(tiny_llama: Path) -> None:
    work = causal_lm(tiny_llama, rows=6)
    attach(work.model, 4)
    [batch] = work.batches(6, 6)
    with torch.no_grad():
        logits = work.model(**work.task.inputs(batch[0])).logits
    losses = []
    for row, labels in zip(logits, batch[0]["labels"], strict=True):
        for t in range(1, len(labels)):
            if labels[t] != -100:
                losses.append(-float(row[t - 1].double().log_softmax(-1)[labels[t]]))
    [report] = steps(work, work.batches(6, 2), _sgd(work))
    assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_clipping_bounds_the_whole_gradient(tiny_bert: Path) -> None:
    work = classification(tiny_bert, rows=8)
    attach(work.model, 4)
    before = snapshot(work.model)
    [report] = steps(work, work.batches(8, 4), _sgd(work), clip=1e-3, first_step=2)
    assert report.grad_norm > 1e-2
    lr = report.lr
    assert _distance(before, snapshot(work.model)) == pytest.approx(lr * 1e-3, rel=1e-3)


def test_without_clipping_the_update_is_the_gradient(tiny_bert: Path) -> None:
    work = classification(tiny_bert, rows=8)
    attach(work.model, 4)
    before = snapshot(work.model)
    [report] = steps(work, work.batches(8, 4), _sgd(work), clip=None)
    assert _distance(before, snapshot(work.model)) == pytest.approx(report.lr * report.grad_norm, rel=1e-4)


@pytest.mark.parametrize("scale", [2.0**4, 2.0**10])
def test_fp16_gradients_are_unscaled_before_they_are_clipped(tiny_bert: Path, scale: float) -> None:
    found = {}
    for name in ("fp16", "fp32"):
        torch.manual_seed(0)
        work = classification(tiny_bert, rows=8)
        attach(work.model, 4)
        before = snapshot(work.model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        fp16: dict[str, Any] = {"compute": CPU_FP16, "scaler": scaler} if name == "fp16" else {}
        # The gradient's norm is under this limit, and scaled it would be far over it.
        [report] = steps(work, work.batches(8), _sgd(work), clip=10.0, base_dropout=False, **fp16)
        found[name] = (report.grad_norm, _distance(before, snapshot(work.model)))
    assert found["fp32"][0] < 10.0
    assert found["fp16"] == pytest.approx(found["fp32"], rel=2e-2)


def _fp16_work(folder: Path) -> tuple[Work, torch.optim.Optimizer, torch.amp.GradScaler]:
    torch.manual_seed(0)
    work = causal_lm(folder, rows=32)
    attach(work.model, 4, dropout=0.1)
    # The scale doubles after two good steps, so its growth tracker matters, too.
    return work, optimizer_of(work.model), torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)


@case("N5")
def test_fp16_overflow_skips_the_step_and_the_schedule_goes_on(tiny_llama: Path) -> None:
    work, optimizer, scaler = _fp16_work(tiny_llama)
    before = snapshot(work.model)
    reports = []
    for report in steps(work, work.batches(4), optimizer, scaler=scaler, compute=CPU_FP16):
        reports.append(report)
        if all(r.skipped for r in reports):
            assert same(snapshot(work.model), before)
            assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    assert reports[0].skipped
    assert not math.isfinite(reports[0].grad_norm)
    assert math.isfinite(reports[0].loss)
    assert any(not r.skipped for r in reports)
    assert not same(snapshot(work.model), before)
    assert [r.step for r in reports] == list(range(1, 9))
    # Warm-up of 0.06 x 20 steps: 1/2, then the peak, then linear to zero.
    rates = [r.lr / 2e-4 for r in reports]
    assert rates == pytest.approx([1 / 2, 1, *(1 - i / 18 for i in range(6))])
    for one, two in zip(reports, reports[1:], strict=False):
        if one.skipped:
            assert two.scale == one.scale / 2


@pytest.mark.parametrize("done", [1, 4, 5])
@case("N5")
def test_fp16_run_goes_on_bit_for_bit_after_a_restore(tiny_llama: Path, tmp_path: Path, done: int) -> None:
    work, optimizer, scaler = _fp16_work(tiny_llama)
    whole = []
    for report in steps(work, work.batches(4), optimizer, scaler=scaler, compute=CPU_FP16):
        whole.append((report.loss, report.skipped, report.scale, report.lr, report.grad_norm))
        if report.step == done:
            progress = Progress(step=done)
            save_checkpoint(tmp_path, work.model, optimizer, scaler, progress, None, keep=2)
    final = snapshot(work.model)

    torch.manual_seed(99)
    again = causal_lm(tiny_llama, rows=32)
    attach(again.model, 4, dropout=0.1, seed=5)
    optimizer = optimizer_of(again.model)
    scaler = torch.amp.GradScaler("cpu")
    restore_checkpoint(tmp_path / f"step-{done:08d}", again.model, optimizer, scaler)
    rest = [
        (r.loss, r.skipped, r.scale, r.lr, r.grad_norm)
        for r in steps(again, work.batches(4)[done:], optimizer, scaler=scaler, compute=CPU_FP16, first_step=done)
    ]
    assert any(skipped for _, skipped, *_ in whole)
    assert repr(rest) == repr(whole[done:])  # as text, because an infinite norm may be NaN
    assert same(snapshot(again.model), final)


@case("N5")
def test_seventeen_overflows_in_a_row_are_an_error(tiny_llama: Path) -> None:
    work, optimizer, _ = _fp16_work(tiny_llama)
    before = snapshot(work.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**70)
    loop = steps(work, work.batches(4) * 3, optimizer, scaler=scaler, compute=CPU_FP16)
    assert [next(loop).skipped for _ in range(16)] == [True] * 16
    with pytest.raises(NumericsError, match="step 17: fp16 overflowed in 17 steps in a row"):
        next(loop)
    assert same(snapshot(work.model), before)


@case("N3")
def test_nan_loss_is_an_error_and_moves_nothing(tiny_bert: Path) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4)
    loop = steps(work, work.batches(8), optimizer_of(work.model))
    next(loop)
    before = snapshot(work.model)
    with torch.no_grad():
        work.model.bert.embeddings.position_embeddings.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="step 2: the loss is nan") as error:
        next(loop)
    assert error.value.exit_code == 5
    assert same(snapshot(work.model), before)


@case("N3")
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_gradient_that_is_not_finite_is_an_error_that_names_it(
    tiny_bert: Path, factor: float, clip: float | None
) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4)
    before = snapshot(work.model)
    named = {key: p for key, _, p in adapter_parameters(work.model)}
    named["encoder.1.ffn.P"].register_hook(lambda grad: grad * factor)
    with pytest.raises(NumericsError, match="the gradient of encoder.1.ffn.P is not finite"):
        next(steps(work, work.batches(8), optimizer_of(work.model), clip=clip))
    assert same(snapshot(work.model), before)


def _trained(folder: Path, *, between: Any = lambda work: None, seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    work = classification(folder)
    attach(work.model, 4, dropout=0.2)
    for _ in steps(work, work.batches(8, 4), optimizer_of(work.model), seed=seed):
        between(work)
    return snapshot(work.model)


def test_evaluation_between_steps_changes_nothing(tiny_bert: Path) -> None:
    scores = []

    def evaluate(work: Work) -> None:
        modes = [module.training for module in work.model.modules()]
        state = torch.get_rng_state()
        scores.append(score(work.model, work.task, work.examples, CPU, 5))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in work.model.modules()] == modes
        assert any(modes)

    alone = _trained(tiny_bert)
    assert same(_trained(tiny_bert, between=evaluate), alone)
    assert len(scores) == 3
    assert scores[0]["loss"] != scores[2]["loss"]


@pytest.mark.parametrize("base_dropout", [False, True])
def test_evaluation_gives_every_module_its_mode_back(tiny_bert: Path, base_dropout: bool) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4, dropout=0.1)
    set_training(work.model, True, base_dropout=base_dropout)
    modes = [module.training for module in work.model.modules()]
    assert len(set(modes)) == (1 if base_dropout else 2)
    score(work.model, work.task, work.examples, CPU, 5)
    assert [module.training for module in work.model.modules()] == modes


def test_random_numbers_drawn_elsewhere_change_nothing(tiny_bert: Path) -> None:
    alone = _trained(tiny_bert)
    assert same(_trained(tiny_bert, between=lambda work: torch.manual_seed(1234)), alone)
    assert not same(_trained(tiny_bert, seed=8), alone)


def test_each_micro_batch_has_a_dropout_seed_of_its_own(tiny_bert: Path) -> None:
    def seeds(seed: int, first_step: int) -> list[int]:
        work = classification(tiny_bert)
        attach(work.model, 4)
        found = []
        work.model.register_forward_pre_hook(lambda m, args: found.append(torch.initial_seed()))
        batches = work.batches(8, 4)[first_step:]
        list(steps(work, batches, optimizer_of(work.model), seed=seed, first_step=first_step))
        return found

    whole = seeds(7, 0)
    assert len(set(whole)) == len(whole) == 6
    assert seeds(7, 1) == whole[2:]
    assert not set(seeds(8, 0)) & set(whole)


def test_base_dropout_off_makes_the_loss_that_of_evaluation(tiny_bert: Path) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4)
    expected = score(work.model, work.task, work.examples, CPU, 24)["loss"]
    [off] = steps(work, work.batches(24), _sgd(work, 1e-9), base_dropout=False)
    [on] = steps(work, work.batches(24), _sgd(work, 1e-9), base_dropout=True)
    assert off.loss == pytest.approx(expected, rel=1e-6)
    assert on.loss != pytest.approx(expected, rel=1e-6)
