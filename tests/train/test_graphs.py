"""Recorded steps are those of the plain loop, one record for each shape; flat AdamW's state is the optimizer's."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.training import CPU, Work, causal_lm, classification, optimizer_of, same, snapshot, steps
from ticktune.checkpoint import Progress, restore_checkpoint, save_checkpoint
from ticktune.device import Compute
from ticktune.errors import RecipeError
from ticktune.patch.attach import attach, set_training
from ticktune.tasks.task import IGNORED
from ticktune.train import graphs as graphs_module
from ticktune.train.graphs import Graphs, flatten, in_eighths
from ticktune.train.head_loss import plain_loss
from ticktune.train.padding import padding_obstacle
from ticktune.train.steps import gradients_of

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device")


class Recorder:
    """Records the operations of a computation and no Python, as a CUDA graph does; transformers is told so."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.recorded += 1
        run()  # to warm up: its gradients must not count
        with mock.patch("transformers.utils.import_utils.is_cuda_stream_capturing", return_value=True):
            recorded = make_fx(lambda: run(), tracing_mode="real")()
        loss = torch.zeros(())

        def replay() -> None:
            self.replayed += 1
            with torch.no_grad():
                loss.copy_(recorded())

        return replay, loss


def _work(folder: Path, kind: str = "classes", seed: int = 1) -> Work:
    torch.manual_seed(seed)
    work = classification(folder) if kind == "classes" else causal_lm(folder)
    attach(work.model, 4)
    return work


def _graphs(
    work: Work, optimizer: torch.optim.AdamW, compute: Compute = CPU, scaler: Any = None, **options: Any
) -> Graphs:
    set_training(work.model, True)
    scaler = scaler or compute.scaler()
    run = gradients_of(work.model, plain_loss(work.task), scaler, compute, nullcontext)
    return Graphs(run, optimizer, compute, work.batches(4)[0][0], **options)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
@pytest.mark.parametrize("micro", [8, 3])
def test_steps_are_those_without_graphs(kind: str, micro: int, tiny_bert: Path, tiny_llama: Path) -> None:
    """With dropout, whose numbers must be drawn alike, micro-batches of several shapes, and accumulation."""
    folder = tiny_bert if kind == "classes" else tiny_llama
    found = []
    for recorded in (False, True):
        work = _work(folder, kind)
        optimizer, recorder = optimizer_of(work.model, lr=1e-2, eps=1e-2), Recorder()
        graphs = _graphs(work, optimizer, record=recorder) if recorded else None
        batches = work.batches(8, micro) * 2
        reports = list(steps(work, batches, optimizer, graphs=graphs))
        found.append(([r.loss for r in reports], [r.grad_norm for r in reports], snapshot(work.model)))
    shapes = {tuple(sorted((n, v.shape) for n, v in m.items())) for batch in batches for m in batch}
    assert graphs is not None
    assert graphs.shapes == len(shapes) > 1
    # Each micro-batch, and of each batch its norm and its step.
    assert recorder.recorded == len(shapes) + 2
    assert recorder.replayed == sum(map(len, batches)) + 2 * len(batches)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for key, tensor in found[0][2].items():
        torch.testing.assert_close(found[1][2][key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_what_is_trained_and_its_moments_are_parts_of_one_buffer_for_each_role(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    optimizer = optimizer_of(work.model)
    graphs = _graphs(work, optimizer, record=Recorder())
    list(steps(work, work.batches(8), optimizer, graphs=graphs))
    assert len(graphs.parameters) == len(optimizer.param_groups)
    for group, [flat] in zip(optimizer.param_groups, [g["params"] for g in graphs.optimizer.param_groups], strict=True):
        assert flat.numel() == sum(p.numel() for p in group["params"])
        for whole, name in ((flat, None), (graphs.optimizer.state[flat]["exp_avg"], "exp_avg")):
            parts = [p if name is None else optimizer.state[p][name] for p in group["params"]]
            assert torch.equal(torch.cat([part.detach().flatten() for part in parts]), whole.detach())
            assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tiny_bert: Path, tmp_path: Path) -> None:
    whole = _work(tiny_bert)
    optimizer = optimizer_of(whole.model, lr=1e-2)
    batches = whole.batches(8) * 2
    list(steps(whole, batches, optimizer, graphs=_graphs(whole, optimizer, record=Recorder())))

    begun = _work(tiny_bert)
    optimizer = optimizer_of(begun.model, lr=1e-2)
    list(steps(begun, batches[:2], optimizer, graphs=_graphs(begun, optimizer, record=Recorder())))
    saved = save_checkpoint(tmp_path, begun.model, optimizer, CPU.scaler(), Progress(step=2), None, keep=1)

    again = _work(tiny_bert, seed=2)
    optimizer = optimizer_of(again.model, lr=1e-2)
    restore_checkpoint(saved, again.model, optimizer, CPU.scaler())
    graphs = _graphs(again, optimizer, record=Recorder())
    list(steps(again, batches[2:], optimizer, graphs=graphs, first_step=2))
    assert same(snapshot(again.model), snapshot(whole.model))


def test_more_shapes_than_there_may_be_graphs_are_computed_without(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MOST_GRAPHS", 1)
    work = _work(tiny_bert)
    optimizer, recorder = optimizer_of(work.model), Recorder()
    batches = work.batches(4)
    assert len({batch[0]["input_ids"].shape for batch in batches}) > 1
    graphs = _graphs(work, optimizer, record=recorder)
    reports = list(steps(work, batches, optimizer, graphs=graphs))
    assert graphs.shapes == 1
    plain = _work(tiny_bert)
    expected = list(steps(plain, batches, optimizer_of(plain.model)))
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in expected], rel=1e-6)


def test_the_proof_leaves_no_gradient_and_no_random_number_behind(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    graphs = _graphs(work, optimizer_of(work.model), record=Recorder())
    trained = snapshot(work.model)
    torch.manual_seed(9)
    before = torch.random.get_rng_state()
    batch = work.batches(4)[0][0]
    assert graphs.obstacle(batch | {"numbers": [1, 2]}, 4.0) is None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.grad.any() for p in graphs.parameters if p.grad is not None)
    assert same(snapshot(work.model), trained)


def test_what_a_loss_reads_that_is_no_tensor_is_named(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    loss, batch = plain_loss(work.task), work.batches(4)[0][0] | {"boxes": [[1, 2]], "texts": ["a"]}
    run = gradients_of(
        work.model, lambda model, batch: loss(model, batch) * len(batch["boxes"]), CPU.scaler(), CPU, nullcontext
    )
    found = Graphs(run, optimizer_of(work.model), CPU, batch, record=Recorder()).obstacle(batch, 4.0)
    assert found == "a step cannot be recorded as a CUDA graph: its loss reads what is no tensor: boxes"


def test_what_a_loss_does_not_read_makes_no_new_shape(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    graphs, batch = _graphs(work, optimizer_of(work.model), record=Recorder()), work.batches(4)[0][0]
    for length in (1, 2, 3):
        graphs.backward(batch | {"prior": torch.ones(4, length), "texts": ["a"]}, 4.0, 0)
    assert graphs.shapes == 1


@pytest.mark.parametrize("baked", ["number", "weight"])
def test_what_a_record_keeps_of_a_batch_is_noticed(baked: str, tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    plain = gradients_of(work.model, plain_loss(work.task), CPU.scaler(), CPU, nullcontext)

    def run(batch: Any, weight: Any) -> Tensor:
        kept = float(batch["input_ids"][0, 1]) if baked == "number" else float(weight)
        return plain(batch, weight * kept if baked == "number" else kept)

    batch = work.batches(4)[0][0]
    graphs = Graphs(run, optimizer_of(work.model), CPU, batch, record=Recorder())
    assert graphs.obstacle(batch, 4.0) is not None


@pytest.mark.parametrize("role", ["Q", "r", "P", "norm", "head"])
def test_a_replay_that_forgets_the_gradients_of_one_role_is_noticed(role: str, tiny_bert: Path) -> None:
    """Also those of Q and r, which are zero while P is, and those that are small beside the head's."""
    work = _work(tiny_bert)
    optimizer = optimizer_of(work.model)

    def forgetful(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        replay, loss = Recorder()(run)

        def forgets() -> None:
            replay()
            for group in graphs.optimizer.param_groups:
                if group["role"] == role:
                    group["params"][0].grad.zero_()

        return forgets, loss

    graphs = _graphs(work, optimizer, record=forgetful)
    assert {group["role"] for group in graphs.optimizer.param_groups} >= {"Q", "r", "P", "norm", "head"}
    assert graphs.obstacle(work.batches(4)[0][0], 4.0) == "a replayed step has other gradients"


def test_what_has_no_gradient_is_not_decayed(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    work.model.unused = nn.Parameter(torch.ones(3, 2))
    optimizer = optimizer_of(work.model, lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]["params"].append(work.model.unused)
    list(steps(work, work.batches(8), optimizer, graphs=_graphs(work, optimizer, record=Recorder())))
    assert torch.equal(work.model.unused, torch.ones(3, 2))
    assert work.model.unused not in optimizer.state


def test_a_later_shape_that_cannot_be_recorded_is_an_error_for_people(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    recorder = Recorder()

    def once(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        if recorder.recorded == 3:  # a shape, the norm and the step
            raise RuntimeError("operation not permitted when stream is capturing")
        return recorder(run)

    optimizer = optimizer_of(work.model)
    with pytest.raises(RecipeError, match="cannot be recorded as a CUDA graph: operation not permitted") as caught:
        list(steps(work, work.batches(4), optimizer, graphs=_graphs(work, optimizer, record=once)))
    assert caught.value.problems[0].fix.startswith("set training.cuda_graphs: false; ")


def test_what_is_replayed_with_other_gradients_is_refused(tiny_bert: Path) -> None:
    work = _work(tiny_bert)

    def forgetful(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        return (lambda: None), run()

    graphs = _graphs(work, optimizer_of(work.model), record=forgetful)
    assert graphs.obstacle(work.batches(4)[0][0], 4.0) == "a replayed step has other gradients"

    def broken(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs = _graphs(work, optimizer_of(work.model), record=broken)
    assert graphs.obstacle(work.batches(4)[0][0], 4.0) == (
        "a step cannot be recorded as a CUDA graph: operation not permitted when stream is capturing"
    )


def test_what_is_left_out_at_random_is_noticed(tiny_bert: Path) -> None:
    """By a choice that Python makes, as layer drop does: a record keeps that of one seed."""
    work = _work(tiny_bert)

    def halved(module: nn.Module, args: Any, output: Any) -> None:
        if torch.initial_seed() % 2:
            output.logits = output.logits * 0.5

    work.model.register_forward_hook(halved)
    graphs = _graphs(work, optimizer_of(work.model), record=Recorder())
    assert graphs.obstacle(work.batches(4)[0][0], 4.0) == "a replayed step has other gradients"


def test_the_proof_holds_where_fp16_overflows(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    scaler, batch = torch.amp.GradScaler("cpu", init_scale=2.0**127), work.batches(24)[0][0]
    graphs = _graphs(work, optimizer_of(work.model), scaler=scaler, record=Recorder())
    graphs.backward(batch, 0.6, 0)
    finite = torch.cat([p.grad.isfinite() for p in graphs.parameters if p.grad is not None])
    assert finite.any()
    assert not finite.all()
    graphs._zero()
    assert graphs.obstacle(batch, 0.6) is None


def test_flat_adamw_takes_over_moments_and_steps() -> None:
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    expected = [nn.Parameter(p.detach().clone()) for p in parameters]
    plain, own = (torch.optim.AdamW(list(each), lr=0.1, fused=True) for each in (expected, parameters))
    slopes = [[torch.randn_like(p) for p in parameters] for _ in range(4)]
    for number, slope in enumerate(slopes):
        for each in (expected, parameters):
            for p, g in zip(each, slope, strict=True):
                p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
        plain.step()
        if number == 2:
            own = flatten(own)
            for p, g in zip(parameters, slope, strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
        own.step()
    for p, q in zip(expected, parameters, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("length", "padded"), [(1, 8), (8, 8), (9, 16), (57, 60), (60, 60), (70, 70)])
def test_rows_are_padded_to_eighths_of_the_longest(length: int, padded: int) -> None:
    ids = torch.ones(2, length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids.clone(), "target": torch.ones(2)}
    found = in_eighths(batch, 60, 7)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "input_ids": (2, padded),
        "attention_mask": (2, padded),
        "labels": (2, padded),
        "target": (2,),
    }
    for name, filler in (("input_ids", 7), ("attention_mask", 0), ("labels", IGNORED)):
        assert found[name][:, length:].eq(filler).all()
        assert found[name][:, :length].eq(1).all()


def test_what_is_no_text_is_not_padded() -> None:
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3), "labels": torch.ones(2, 4)}
    found = in_eighths(batch, 64, 0)
    assert (found["input_ids"].shape, found["labels"].shape) == ((2, 8), (2, 4))
    assert in_eighths({"pixel_values": torch.ones(2, 3, 4, 4)}, 64, 0).keys() == {"pixel_values"}


@needs_cuda
@pytest.mark.parametrize("kind", ["classes", "tokens"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_of_cuda_graphs_are_those_without(kind: str, precision: Any, tiny_bert: Path, tiny_llama: Path) -> None:
    compute = Compute(torch.device("cuda"), precision)
    found = []
    for recorded in (False, True):
        work = _work(tiny_bert if kind == "classes" else tiny_llama, kind)
        work.model.to("cuda")
        optimizer, scaler = optimizer_of(work.model, lr=1e-2, eps=1e-2), compute.scaler()
        graphs = _graphs(work, optimizer, compute, scaler) if recorded else None
        batches = work.batches(8, 3)
        if graphs is not None:
            assert graphs.obstacle(batches[0][0], 4.0) is None
        reports = list(steps(work, batches * 3, optimizer, compute=compute, scaler=scaler, graphs=graphs))
        found.append(([r.loss for r in reports], {key: t.cpu() for key, t in snapshot(work.model).items()}))
    assert graphs is not None
    assert graphs.shapes > 1
    allowed = 1e-4 if precision == "fp32" else 2e-2
    assert found[1][0] == pytest.approx(found[0][0], rel=allowed)
    for key, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], tensor, rtol=allowed, atol=allowed, msg=key)


@needs_cuda
def test_a_forward_pass_that_waits_for_the_device_is_refused(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    work.model.to("cuda")
    compute = Compute(torch.device("cuda"), "bf16")
    work.model.register_forward_hook(lambda module, args, output: output.logits.detach().sum().item() and None)
    graphs = _graphs(work, optimizer_of(work.model), compute)
    obstacle = graphs.obstacle(work.batches(4)[0][0], 4.0)
    assert obstacle is not None
    assert obstacle.startswith("a step cannot be recorded as a CUDA graph: ")


@needs_cuda
def test_numbers_that_are_drawn_on_the_cpu_are_noticed(tiny_bert: Path) -> None:
    work = _work(tiny_bert)
    work.model.to("cuda")
    work.model.register_forward_hook(lambda module, args, output: torch.rand([]).item() and None)
    graphs = _graphs(work, optimizer_of(work.model), Compute(torch.device("cuda"), "bf16"))
    assert "draws random numbers on the CPU" in str(graphs.obstacle(work.batches(4)[0][0], 4.0))


@pytest.mark.parametrize("family", ["bert", "convbert"])
def test_more_padding_is_refused_where_it_changes_the_loss(family: str, tiny_bert: Path) -> None:
    """ConvBERT's convolutions and its head look at padding too."""
    import transformers as t

    work = classification(tiny_bert)
    if family == "convbert":
        torch.manual_seed(1)
        work.model = t.ConvBertForSequenceClassification(
            t.ConvBertConfig(
                vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
            )
        )
        with torch.no_grad():
            for parameter in work.model.parameters():
                parameter.mul_(5 if parameter.dim() == 2 else 1)
    batch = work.batches(4)[0][0]
    found = padding_obstacle(work.model, work.task, batch, in_eighths(batch, 512, 0), CPU)
    assert (found is None) == (family == "bert"), found
