"""The choice between the forms of ticks: what is timed, and what counts as faster."""

import pytest
import torch

from tests.training import CPU, classification
from ticktune.patch.attach import attach
from ticktune.patch.wide import Wide
from ticktune.train import ffn
from ticktune.train.ffn import Trial, timed, wide_obstacle


@pytest.mark.parametrize(
    ("ratio", "faster", "rounds", "choice"),
    [
        (0.90, 9, 9, "wide"),
        (0.98, 8, 9, "wide"),
        (0.98, 7, 9, "split"),  # noise
        (0.99, 9, 9, "split"),  # not worth it
        (1.10, 0, 9, "split"),
        (0.90, 3, 3, "wide"),
        (0.90, 2, 3, "split"),
    ],
)
def test_only_what_is_clearly_faster_is_chosen(ratio: float, faster: int, rounds: int, choice: str) -> None:
    assert Trial(1.0, ratio, ratio, faster, rounds).choice == choice


def test_the_forms_take_turns_and_a_long_trial_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[str]()
    monkeypatch.setattr(ffn.time, "perf_counter", lambda: clock[0])

    def takes(name: str, seconds: float) -> None:
        calls.append(name)
        clock[0] += seconds

    trial = timed(lambda: takes("split", 1.0), lambda: takes("wide", 0.5), torch.device("cpu"))
    assert trial == Trial(1.0, 0.5, 0.5, 7, 7)  # the seventh round is the first to end after ten seconds
    assert calls[:2] == ["split", "wide"]  # to warm up
    assert calls[2:6] == ["wide", "split", "split", "wide"]
    clock[0], calls[:] = 0.0, []
    assert timed(lambda: takes("split", 60.0), lambda: takes("wide", 60.0), torch.device("cpu")).rounds == 3
    assert timed(lambda: takes("split", 0.1), lambda: takes("wide", 0.1), torch.device("cpu")).rounds == 9


def test_a_block_that_knows_its_width_or_does_more_is_refused(tiny_bert: object) -> None:
    work = classification(tiny_bert)  # type: ignore[arg-type]
    attach(work.model, 4)
    [[batch]] = work.batches(4)[:1]
    work.model.train()  # dropout must not tell the two apart
    wide = Wide(work.model)
    assert wide_obstacle(work.model, wide, work.task, batch, CPU) is None
    act = work.model.get_submodule("bert.encoder.layer.1.intermediate.intermediate_act_fn")
    handle = act.register_forward_hook(lambda module, args, value: value / value.square().mean(-1, keepdim=True))
    obstacle = wide_obstacle(work.model, wide, work.task, batch, CPU)
    assert obstacle is not None
    assert "with wider blocks the loss of a batch is" in obstacle
    handle.remove()
    width = act.register_forward_hook(
        lambda module, args, value: value * torch.ones(work.model.config.intermediate_size)
    )
    obstacle = wide_obstacle(work.model, wide, work.task, batch, CPU)
    assert obstacle is not None
    assert "the model does not run with wider blocks" in obstacle
    width.remove()
    assert work.model.training
