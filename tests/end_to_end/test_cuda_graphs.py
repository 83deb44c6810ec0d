"""training.cuda_graphs through whole runs: refused without a CUDA device, and, recorded on a CPU, the same run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.end_to_end.support import classification
from tests.train.test_graphs import Recorder
from ticktune import prepare
from ticktune.console import Console
from ticktune.errors import RecipeError
from ticktune.recipe.load import load_recipe
from ticktune.run import train
from ticktune.train import graphs


def test_without_a_cuda_device_the_recipe_is_refused(ticktune: Run, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = classification(tmp_path, tiny_bert)
    done = ticktune("train", recipe, "training.cuda_graphs=true", "training.device=cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "command line: training.cuda_graphs: CUDA graphs need a CUDA device, found cpu" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Graphs are recorded on the CPU."""
    made = Recorder()
    monkeypatch.setattr(graphs, "_in_one_pool", lambda device: made)
    monkeypatch.setattr(prepare, "check_graphs", lambda device, where: None)
    return made


def _trained(folder: Path, base: Path, *words: str, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    recipe = classification(folder, base, **changes)
    loaded = load_recipe(recipe, [f"output={folder / 'run'}", "base.dropout=off", "logging.every=1", *words])
    train(loaded, Console(quiet=True))
    run = folder / "run" / "run.json"
    record: dict[str, Any] = json.loads(run.read_text(encoding="utf-8"))
    lines = (run.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return record | {"losses": [line["loss"] for line in map(json.loads, lines) if "lr" in line]}


@pytest.mark.parametrize("form", ["split", "wide"])
def test_a_run_by_graphs_is_the_run_without(form: str, tiny_bert: Path, tmp_path: Path, recorder: Recorder) -> None:
    words = [f"training.ffn={form}", "training.precision=fp32"]
    plain = _trained(tmp_path / "plain", tiny_bert, *words)
    assert recorder.replayed == 0
    found = _trained(tmp_path / "graphs", tiny_bert, "training.cuda_graphs=true", *words)
    assert recorder.replayed > 2 * found["steps"]
    assert len(found["losses"]) == found["steps"] > 5
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert found["metrics"] == pytest.approx(plain["metrics"], rel=1e-3)
    assert found["idle"] == plain["idle"] == []


def test_rows_are_not_padded_beyond_the_positions_of_the_model(
    tiny_bert: Path, tmp_path: Path, recorder: Recorder
) -> None:
    found = _trained(tmp_path / "run", tiny_bert, "training.cuda_graphs=true", "data.max_length=1024")
    assert found["status"] == "complete"


def test_a_refusal_leaves_nothing_behind(
    tiny_bert: Path, tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_in_one_pool", lambda device: broken)
    with pytest.raises(RecipeError, match="operation not permitted") as caught:
        _trained(tmp_path / "run", tiny_bert, "training.cuda_graphs=true")
    assert caught.value.problems[0].where == "command line: training.cuda_graphs"
    assert not (tmp_path / "run" / "run").exists()
