"""The main job through the real command line: train, eval, predict, export, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ticktune as ticktune_package
from tests.conftest import Run
from tests.end_to_end.support import classification
from tests.reliability.catalogue import case

PIPELINE = "from transformers import pipeline; import sys, json; p = pipeline('text-classification', sys.argv[1]); "
PIPELINE += "print(json.dumps(p(sys.argv[2]))); assert 'ticktune' not in sys.modules"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A working directory with a complete run of a recipe that lies elsewhere."""
    recipes, work = tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("work")
    recipe = classification(recipes, tiny_bert)
    words = f"{sys.executable} -m ticktune"
    script = (
        f"{words} train {recipe} && {words} eval --min accuracy=0.7 > eval.json && {words} export --merge > export.json"
    )
    done = subprocess.run(["sh", "-c", script + " | cat"], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (work / "train.json").write_text(done.stdout)
    (work / "train.err").write_text(done.stderr)
    return work


def test_the_pipeline_runs_from_another_directory_with_piped_output(trained: Path) -> None:
    document = json.loads((trained / "train.json").read_text())
    assert document["status"] == "complete"
    assert document["metrics"]["accuracy"] > document["base_metrics"]["accuracy"]
    assert "step" in (trained / "train.err").read_text()


def test_the_version_is_printed(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ticktune", "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ticktune {ticktune_package.__version__}\n", "")


def test_eval_prints_split_rows_and_metrics(trained: Path) -> None:
    document = json.loads((trained / "eval.json").read_text())
    assert set(document) == {"split", "rows", "metrics"}
    assert (document["split"], document["rows"]) == ("test", 50)
    assert document["metrics"]["accuracy"] >= 0.7


def test_a_run_folder_holds_what_is_documented(trained: Path) -> None:
    run = trained / "runs/tiny"
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "report.html",
        "checkpoints",
        "adapter",
        "merged",
    } <= names
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["finished_at"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["step"] for line in lines if "split" in line]
    assert evaluations == [0, 12, 24, 36]


@case("X1")
def test_the_merged_folder_is_equal_and_says_so(trained: Path) -> None:
    found = json.loads((trained / "export.json").read_text())["verification"]
    assert found["max_difference"] <= found["tolerance"]
    assert found["is_conclusive"]
    assert found["changed"] == 0
    assert found["rows"] == 50


@case("X1", "X11")
def test_plain_transformers_opens_the_merged_folder(trained: Path, ticktune: Run) -> None:
    text = "w1 w2 w31 w3"
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(trained / "runs/tiny/merged"), text],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    [stock] = json.loads(done.stdout)
    ours = json.loads(ticktune("predict", "runs/tiny", text, cwd=trained).stdout)
    assert stock["label"] == ours["label"]
    assert stock["score"] == pytest.approx(ours["probability"], abs=1e-5)


@case("X1")
def test_adapter_run_and_merged_folder_have_the_same_metrics(trained: Path, ticktune: Run) -> None:
    documents = [
        json.loads(ticktune("eval", target, cwd=trained).stdout)
        for target in ("runs/tiny", "runs/tiny/adapter", "runs/tiny/merged")
    ]
    for document in documents[1:]:
        assert document["metrics"] == pytest.approx(documents[0]["metrics"], abs=1e-4)


def test_predict_reads_texts_files_and_standard_input(trained: Path, ticktune: Run, tmp_path: Path) -> None:
    texts = ["w1 w2", "w31 w33"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(texts) + "\n")
    answers = [
        ticktune("predict", "runs/tiny", *texts, cwd=trained).stdout,
        ticktune("predict", "runs/tiny", tmp_path / "texts.txt", cwd=trained).stdout,
        ticktune("predict", "runs/tiny", tmp_path / "rows.jsonl", cwd=trained).stdout,
        ticktune("predict", "runs/tiny", tmp_path / "rows.csv", cwd=trained).stdout,
        ticktune("predict", "runs/tiny", "-", cwd=trained, input="\n".join(texts)).stdout,
    ]
    rows = [json.loads(line) for line in answers[0].splitlines()]
    assert [row["label"] for row in rows] == ["small", "large"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1) for row in rows)
    assert all(answer == answers[0] for answer in answers[1:])


def test_the_same_export_again_says_so_and_another_is_refused(trained: Path, ticktune: Run) -> None:
    again = ticktune("export", "--merge", cwd=trained)
    assert again.returncode == 0
    assert "already a verified export" in again.stderr
    other = ticktune("export", "--merge", "--dtype", "bfloat16", cwd=trained)
    assert other.returncode == 7
    assert "--force" in other.stderr


@case("X1")
def test_a_cast_export_reports_its_drift(trained: Path, ticktune: Run, tmp_path: Path) -> None:
    done = ticktune("export", "runs/tiny", "--merge", "--dtype", "bfloat16", "-o", tmp_path / "half", cwd=trained)
    document = json.loads(done.stdout)
    assert document["cast"]["max_difference"] > document["verification"]["max_difference"]
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert set(document["cast"]["metrics_after"]) == set(document["cast"]["metrics_before"])


def test_the_adapter_can_be_copied_out_and_used_with_a_base_and_data(
    trained: Path, ticktune: Run, tmp_path: Path, tiny_bert: Path
) -> None:
    assert ticktune("export", "runs/tiny", "-o", tmp_path / "copy", cwd=trained).returncode == 0
    rows = trained / "runs/tiny/recipe.yaml"
    test = Path(json.loads((trained / "runs/tiny/run.json").read_text())["recipe"]["data.test.path"])
    assert rows.exists()
    done = ticktune(
        "eval",
        tmp_path / "copy",
        "--base",
        tiny_bert,
        "--data",
        (trained / "runs/tiny" / test).resolve(),
        cwd=tmp_path,
    )
    assert json.loads(done.stdout)["metrics"]["accuracy"] >= 0.7, done.stderr


@case("C12")
def test_training_again_says_that_it_is_complete_and_touches_nothing(trained: Path, ticktune: Run) -> None:
    run = trained / "runs/tiny"
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    recipe = next(trained.parent.glob("recipes*/recipe.yaml"))
    done = ticktune("train", recipe, cwd=trained)
    assert done.returncode == 0
    assert "already complete" in done.stderr
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert before == after


@case("X11")
def test_no_file_of_a_run_names_the_home_folder(trained: Path) -> None:
    home = str(Path.home()).encode()
    for path in (trained / "runs/tiny").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml", ".html", ".md"):
            assert home not in path.read_bytes(), path
