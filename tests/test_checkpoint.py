"""Checkpoints: whole or refused, the newest that is whole, and a continuation that is bitwise the same."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tests.models as models
from tests.reliability.catalogue import case
from tests.training import bits, classification, optimizer_of, same, snapshot, steps
from ticktune.checkpoint import Progress, find_checkpoints, newest_valid, restore_checkpoint, save_checkpoint
from ticktune.errors import CheckpointError, NumericsError
from ticktune.files import MANIFEST, verify_directory
from ticktune.patch.attach import adapter_parameters, adapter_state, attach


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return attach(models.families()["bert"](), 4, seed=seed)


def _stepped(model: nn.Module) -> torch.optim.AdamW:
    optimizer = optimizer_of(model)
    for _ in range(2):
        for _, _, parameter in adapter_parameters(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _off() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def _save(directory: Path, *numbers: int, keep: int = 99) -> list[Path]:
    model = _model()
    optimizer = _stepped(model)
    return [save_checkpoint(directory, model, optimizer, _off(), Progress(step=n), None, keep=keep) for n in numbers]


PROGRESS = Progress(
    step=400,
    best_step=300,
    best_score=0.1 + 0.2,
    bad_evaluations=2,
    skipped=3,
    seconds=12.5,
    rows=12800,
    history=[{"step": 300, "split": "validation", "metrics": {"accuracy": 1 / 3}}],
)


@case("C19")
def test_every_field_comes_back(tmp_path: Path) -> None:
    model = _model()
    optimizer = _stepped(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=7)
    scaler.scale(torch.ones(1))
    best = {key: torch.randn_like(tensor) for key, tensor in adapter_state(model).items()}
    path = save_checkpoint(tmp_path, model, optimizer, scaler, PROGRESS, best, keep=2)
    assert path == tmp_path / "step-00000400"

    other = _model(seed=1)
    fresh = optimizer_of(other)
    fresh_scaler = torch.amp.GradScaler("cpu")
    progress, found_best = restore_checkpoint(path, other, fresh, fresh_scaler)
    assert progress == PROGRESS
    assert found_best is not None
    assert same(found_best, best)
    assert same(snapshot(other), snapshot(model))
    assert fresh_scaler.state_dict() == scaler.state_dict()
    pairs = list(zip(adapter_parameters(model), adapter_parameters(other), strict=True))
    for (_, _, a), (key, _, b) in pairs:
        assert optimizer.state[a].keys() == fresh.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer.state[a].items():
            assert value.dtype == fresh.state[b][name].dtype
            assert value.shape == fresh.state[b][name].shape
            assert bits(value) == bits(fresh.state[b][name]), (key, name)


def test_without_a_best_adapter_there_is_none(tmp_path: Path) -> None:
    [path] = _save(tmp_path, 1)
    model = _model()
    assert restore_checkpoint(path, model, optimizer_of(model), _off()) == (Progress(step=1), None)


def test_the_state_of_an_optimizer_that_has_not_stepped_is_empty(tmp_path: Path) -> None:
    model = _model()
    path = save_checkpoint(tmp_path, model, optimizer_of(model), _off(), Progress(), None, keep=1)
    fresh = optimizer_of(model)
    restore_checkpoint(path, model, fresh, _off())
    assert not fresh.state


@case("N3")
@pytest.mark.parametrize("kind", ["parameter", "state"])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, tiny_bert: Path, kind: str) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4)
    optimizer = optimizer_of(work.model)
    for _ in steps(work, work.batches(8)[:1], optimizer):
        key, _, parameter = next(iter(adapter_parameters(work.model)))
        damaged = parameter if kind == "parameter" else optimizer.state[parameter]["exp_avg_sq"]
        damaged.data.view(-1)[3] = math.inf
    with pytest.raises(NumericsError) as caught:
        save_checkpoint(tmp_path, work.model, optimizer, _off(), Progress(step=1), None, keep=1)
    said = key if kind == "parameter" else f"{key}, the optimizer state exp_avg_sq"
    assert caught.value.problems[0].message.startswith(f"{said} holds NaN or infinity after the update")
    assert not list(tmp_path.iterdir())


def test_training_goes_on_bit_for_bit(tiny_bert: Path, tmp_path: Path) -> None:
    work = classification(tiny_bert)
    attach(work.model, 4, dropout=0.1)
    optimizer = optimizer_of(work.model)
    batches = work.batches(4, 2)
    losses = []
    for report in steps(work, batches, optimizer):
        losses.append(report.loss)
        if report.step == 3:
            save_checkpoint(tmp_path, work.model, optimizer, _off(), Progress(step=3), None, keep=1)

    torch.manual_seed(77)  # another head, other ticks, another global state
    again = classification(tiny_bert)
    attach(again.model, 4, dropout=0.1, seed=77)
    optimizer = optimizer_of(again.model)
    path = newest_valid(tmp_path)
    assert path is not None
    progress, _ = restore_checkpoint(path, again.model, optimizer, _off())
    rest = [r.loss for r in steps(again, batches[3:], optimizer, first_step=progress.step)]
    assert rest == losses[3:]
    assert same(snapshot(again.model), snapshot(work.model))


def _flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _truncate(path: Path) -> None:
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _empty_state(path: Path) -> None:
    (path / "state.json").write_text("")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": _flip,
    "truncated": _truncate,
    "empty": _empty_state,
    "missing file": lambda path: (path / "optimizer.safetensors").unlink(),
    "missing manifest": lambda path: (path / MANIFEST).unlink(),
    "cut manifest": lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:40]),
    "empty manifest": lambda path: (path / MANIFEST).write_text("{}"),
}


@case("C6")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_put_aside_and_an_older_one_used(
    damage: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newest = _save(tmp_path, 2, 3)
    damage(newest)
    assert newest_valid(tmp_path) == older
    assert not newest.exists()
    assert (tmp_path / "damaged-step-00000003").is_dir()
    assert "put aside as damaged-step-00000003" in capsys.readouterr().err
    # The same step, saved and damaged again, does not overwrite what was put aside.
    [newest] = _save(tmp_path, 3)
    damage(newest)
    assert newest_valid(tmp_path) == older
    assert (tmp_path / "damaged-step-00000003-2").is_dir()


@case("C11")
def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for path in _save(tmp_path, 1, 2):
        _flip(path)
    with pytest.raises(CheckpointError, match="all checkpoints are damaged") as error:
        newest_valid(tmp_path)
    assert error.value.exit_code == 6
    assert error.value.problems[0].fix


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None


@case("C14")
def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 10, 9, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


@case("C14")
def test_the_oldest_stays_until_the_new_one_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [old] = _save(tmp_path, 1)

    def worn_out(path: Path) -> None:
        raise CheckpointError("the file is damaged", where=str(path))

    monkeypatch.setattr("ticktune.checkpoint.verify_directory", worn_out)
    with pytest.raises(CheckpointError):
        _save(tmp_path, 2, keep=1)
    verify_directory(old)


@case("C21")
def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    # By name, 9 digits sort before 8.
    _save(tmp_path, 99_999_999, 100_000_000, 5)
    assert [p.name for p in find_checkpoints(tmp_path)] == [
        "step-100000000",
        "step-99999999",
        "step-00000005",
    ]
    assert newest_valid(tmp_path) == tmp_path / "step-100000000"


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-7", "damaged-step-00000009", "step-00000009-old", ".tmp-step-00000001", "step-x"):
        (tmp_path / name).mkdir()
    assert find_checkpoints(tmp_path) == []


def test_the_same_step_is_saved_again(tmp_path: Path) -> None:
    model = _model()
    optimizer = _stepped(model)
    for rows in (1, 2):
        path = save_checkpoint(tmp_path, model, optimizer, _off(), Progress(step=1, rows=rows), None, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert restore_checkpoint(path, model, optimizer, _off())[0].rows == 2


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    [path] = _save(tmp_path, 1)
    names = {p.name for p in path.iterdir()}
    assert names == {"adapter.safetensors", "optimizer.safetensors", "state.json", MANIFEST}
    recorded = json.loads((path / MANIFEST).read_text())["files"]
    assert recorded.keys() == names - {MANIFEST}


@case("C18")
def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    [path] = _save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 2}))
    model = _model()
    with pytest.raises(CheckpointError, match="the format 2, this version reads 1"):
        restore_checkpoint(path, model, optimizer_of(model), _off())


def test_checkpoint_of_other_ticks_is_refused_and_moves_nothing(tmp_path: Path) -> None:
    [path] = _save(tmp_path, 1)
    model = attach(models.families()["bert"](), 5)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"does not fit .* \(48, 4\), expected \(48, 5\)"):
        restore_checkpoint(path, model, optimizer_of(model), _off())
    assert same(snapshot(model), before)
