"""What careless hands and bad luck do: nothing of theirs is lost, nothing wrong is said with confidence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.end_to_end.support import classification, write_rows
from tests.launch import Launched
from tests.reliability.catalogue import case
from ticktune.cli import entry


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = classification(folder, tiny_bert, training={"epochs": 1})
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert entry(["train", str(recipe)]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("runs/tiny")


def answers(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, object]]:
    capsys.readouterr()
    assert entry(["--json", "predict", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    capsys.readouterr()
    assert entry([str(word) for word in words]) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "bug" not in error
    return error


@case("C4", "C19")
def test_a_stop_in_an_evaluation_loses_no_evaluation(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classification(tmp_path, tiny_bert, training={"epochs": 2}, logging={"every": 1})
    write_rows(tmp_path, "validation.jsonl", 6000, 2)
    whole = ticktune("train", recipe, "output=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    for step in (12, 24):
        with Launched(["train", str(recipe), f"output=stopped{step}"], tmp_path) as process:
            log = tmp_path / f"stopped{step}/metrics.jsonl"
            deadline = time.monotonic() + 120
            while f'"step": {step},' not in (log.read_text() if log.exists() else ""):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
        done = ticktune("train", recipe, f"output=stopped{step}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        records = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("whole", f"stopped{step}")]
        assert records[1]["history"] == records[0]["history"]
        files = [(tmp_path / n / "adapter/adapter.safetensors").read_bytes() for n in ("whole", f"stopped{step}")]
        assert files[0] == files[1]


@case("C19")
def test_a_run_that_stopped_early_stays_stopped(run: Path, tiny_bert: Path) -> None:
    words = ["train", "recipe.yaml", "output=early", "evaluation.every=1", "evaluation.patience=2", "optimizer.lr=1e-9"]
    words += ["optimizer.norm_lr=1e-9", "optimizer.head_lr=1e-9"]
    assert entry(words) == 0
    record = json.loads(Path("early/run.json").read_text())
    assert record["steps"] < 12
    adapter = Path("early/adapter/adapter.safetensors").read_bytes()
    shutil.rmtree("early/adapter")
    Path("early/run.json").write_text(json.dumps(record | {"status": "running"}))
    assert entry(words) == 0
    assert Path("early/adapter/adapter.safetensors").read_bytes() == adapter


@case("C13")
@pytest.mark.parametrize("place", ["runs/tiny", "runs", ".", "mine"])
def test_force_replaces_only_what_ticktune_wrote(run: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    before = sorted(str(p) for p in Path().rglob("*"))
    error = fails(capsys, 7, "export", run, "--merge", "-o", place, "--force")
    assert "not replaced" in error
    assert sorted(str(p) for p in Path().rglob("*")) == before


@case("C13")
def test_force_touches_no_file_and_no_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("precious")
    Path("real").mkdir()
    Path("link").symlink_to("real")
    for place in ("file", "link"):
        assert "not replaced" in fails(capsys, 7, "export", run, "--merge", "-o", place, "--force")
    assert Path("file").read_text() == "precious"
    assert Path("link").is_symlink()


def test_save_adapter_replaces_no_folder_of_the_user(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    import ticktune
    from ticktune.errors import OutputError

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    model = ticktune.attach(AutoModelForSequenceClassification.from_pretrained(tiny_bert), dim=2)
    with pytest.raises(OutputError, match="not replaced"):
        ticktune.save_adapter(model, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"
    ticktune.save_adapter(model, tmp_path / "ours")
    ticktune.save_adapter(model, tmp_path / "ours")


def test_a_slip_in_a_file_name_is_not_predicted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("w1\n")
    Path("b.txt").write_text("w2\n")
    assert "one file" in fails(capsys, 2, "predict", run, "a.txt", "b.txt")
    assert "no such file" in fails(capsys, 2, "predict", run, "missing.txt")
    assert "no such file or run" in fails(capsys, 2, "predict", "runs/tinyy", "w1")
    assert "one file or -" in fails(capsys, 2, "predict", run, "-", "w1")


def test_every_line_has_an_answer_the_blank_ones_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("w1\n\nw31 w32\n")
    assert len(answers(capsys, run, "a.txt")) == 3
    assert len(answers(capsys, run, "w1 w2", "")) == 2


def test_empty_texts_train_and_predict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "" if i % 2 else f"w{i % 5}", "label": ["small", "large"][i % 2]} for i in range(24)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert entry(["train", "recipe.yaml", "output=empty"]) == 0
    assert len(answers(capsys, "empty", "train.jsonl")) == 24


def test_text_that_is_not_utf8_is_a_data_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.txt").write_bytes(b"w1\n\xff\xfe\n")
    assert "not UTF-8" in fails(capsys, 4, "predict", run, "bad.txt")
    with Path("bad.txt").open("rb") as file:
        words = [sys.executable, "-m", "ticktune", "predict", str(run)]
        done = subprocess.run(words, stdin=file, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "standard input" in done.stderr


def test_restart_forgets_checkpoints_behind_a_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(run / "checkpoints", "elsewhere")
    (run / "checkpoints").symlink_to(Path("elsewhere").absolute())
    capsys.readouterr()
    assert entry(["train", "recipe.yaml", "--restart"]) == 0
    assert "going on" not in capsys.readouterr().err
    assert list(Path("elsewhere").iterdir())


@case("C13")
def test_a_restart_with_a_bad_row_costs_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Path("train.jsonl").read_text()
    Path("train.jsonl").write_text(good + "{}\n")
    assert "train.jsonl:" in fails(capsys, 4, "train", "recipe.yaml", "--restart")
    assert entry(["eval", str(run)]) == 0
    Path("train.jsonl").write_text(good)
    assert entry(["train", "recipe.yaml"]) == 0
    assert "already complete" in capsys.readouterr().err


def test_changed_rows_are_said_in_eval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("validation.jsonl")
    path.write_text(path.read_text() + Path("train.jsonl").read_text())
    capsys.readouterr()
    assert entry(["eval", str(run), "--split", "validation"]) == 0
    assert "has changed" in capsys.readouterr().err


def test_cut_rows_are_said_in_eval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "w1 " * 600, "label": "small"}, {"text": "w2", "label": "large"}]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    assert entry(["eval", str(run), "--data", "long.jsonl"]) == 0
    assert "1 of 2 rows (50.0 %) are longer than" in " ".join(capsys.readouterr().err.split())


def test_eval_and_predict_take_another_precision(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for words in ([], ["--precision", "fp32", "--device", "cpu"], ["--precision", "bf16"]):
        capsys.readouterr()
        assert entry(["--json", "eval", str(run), *words]) == 0
        losses[" ".join(words)] = json.loads(capsys.readouterr().out)["metrics"]["loss"]
    trained, same, rounded = losses.values()
    assert trained == same != rounded == pytest.approx(same, abs=0.05)
    (full,), (half,) = (answers(capsys, run, "w1 w31", "--precision", p) for p in ("fp32", "bf16"))
    assert full["probability"] != half["probability"] == pytest.approx(full["probability"], abs=0.05)


@pytest.mark.parametrize("text", ["[]", '{"status": "complete"}', '{"status": "comp'])
def test_a_damaged_record_is_said_and_hides_no_other_run(
    run: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, "runs/other")
    (run / "run.json").write_text(text)
    assert "damaged" in fails(capsys, 6, "train", "recipe.yaml")
    capsys.readouterr()
    assert entry(["eval"]) == 0
    said = capsys.readouterr().err
    assert "passed over" in said
    assert "using runs/other" in said


def test_garbage_in_the_log_does_not_stop_a_resume(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("5\nnonsense\n")
    assert entry(["train", "recipe.yaml"]) == 0


def test_a_complete_run_without_its_adapter_is_not_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "adapter")
    assert "not an adapter" in fails(capsys, 6, "train", "recipe.yaml")
    assert entry(["train", "recipe.yaml", "--restart"]) == 0


def test_an_output_that_is_a_file_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("afile").write_text("x")
    assert "a file, not a folder" in fails(capsys, 7, "train", "recipe.yaml", "output=afile")


def test_a_run_without_validation_still_merges(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["train", "recipe.yaml", "output=bare", "data.validation=null", "data.test=null"]) == 0
    capsys.readouterr()
    assert entry(["export", "bare", "--merge"]) == 0
    assert "compared on training rows" in capsys.readouterr().err
    assert entry(["export", "bare/adapter", "--merge", "--data", "test.jsonl", "-o", "lone"]) == 0


def test_an_unknown_metric_is_refused_before_anything_is_scored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no metric foo" in fails(capsys, 2, "eval", run, "--min", "foo=1")
    words = ("train", "recipe.yaml", "output=other", "evaluation.metric=pearson")
    assert "evaluation.metric" in fails(capsys, 2, *words)


def test_a_moved_base_can_be_named(run: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("runs/tiny/recipe.yaml")
    recipe.write_text(recipe.read_text().replace(tiny_bert.name, "gone"))
    assert "--base DIR" in fails(capsys, 3, "eval", run)
    assert entry(["eval", str(run), "--base", str(tiny_bert)]) == 0
