"""Recipes that are wrong, and the ways to write one that is right; by the command line (cases R)."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import launch
from tests.reliability.catalogue import case
from tests.reliability.commands import ROWS, contents, inspected, recipe_text, refused


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Path:
    """A folder with rows and ``r.yaml``."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "r.yaml").write_text(recipe_text(tiny_bert))
    return tmp_path


def with_text(folder: Path, *lines: str) -> None:
    """Appends lines to the recipe; its own are 12."""
    path = folder / "r.yaml"
    path.write_text(path.read_text() + "".join(f"{line}\n" for line in lines))


def instead(folder: Path, old: str, new: str) -> None:
    path = folder / "r.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@case("R1")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["optimizer:", "  learnig_rate: 1e-4"], ("r.yaml:14:3 optimizer.learnig_rate: unknown key",)),
        (["optimizer: {lrr: 1e-4}"], ("r.yaml:13:13 optimizer.lrr", "did you mean optimizer.lr?")),
        (["learning_rate: 1e-4"], ("r.yaml:13:1 learning_rate", "here it is called optimizer.lr")),
        (["dim: 4"], ("r.yaml:13:1 dim", "it belongs to ticks.dim")),
        (["checkpoints: {dim: 4}"], ("r.yaml:13:15 checkpoints.dim", "it belongs to ticks.dim")),
    ],
)
def test_an_unknown_or_misplaced_key_is_named_with_place_and_nearest_key(
    folder: Path, lines: list[str], said: tuple[str, ...]
) -> None:
    with_text(folder, *lines)
    assert refused(2, "train", "r.yaml", cwd=folder, said=("error[recipe]: ", *said)).count("error[") == 1
    assert refused(2, "inspect", "r.yaml", cwd=folder, said=said)


@case("R1")
def test_an_unknown_key_is_answered_in_two_seconds_without_torch(folder: Path) -> None:
    with_text(folder, "optimiser: {lr: 1e-4}")
    words = [sys.executable, "-X", "importtime", "-m", "ticktune", "train", "r.yaml"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "did you mean optimizer?" in done.stderr
    assert not {"torch", "transformers"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@case("R2")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["task: causal-lm"], ("r.yaml:13:1 task", "in line 1", "keep one of the two")),
        (["  steps: 3"], ("r.yaml:13:3 training.steps", "in line 9")),
        (["optimizer: {lr: 1e-4,", "  lr: 1e-3}"], ("r.yaml:14:3 optimizer.lr", "in line 13")),
        (["<<: {output: x}", "<<: {output: y}"], ("r.yaml:13:1: a key must be", "r.yaml:14:1: a key must be")),
        (["optimizer: &o {lr: 1e-4}", "loss:", "  <<: *o"], ("r.yaml:13:12: anchors and aliases are not used",)),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(
    folder: Path, lines: list[str], said: tuple[str, ...]
) -> None:
    with_text(folder, *lines)
    refused(2, "train", "r.yaml", cwd=folder, said=said)


@case("R3")
def test_every_spelling_of_a_number_is_the_same_run(folder: Path) -> None:
    adapters = set()
    for number, text in enumerate(("1e-4", "1E-4", "1.0e-4", "0.0001", "100e-6")):
        (folder / f"r{number}.yaml").write_text(
            (folder / "r.yaml").read_text() + f"optimizer: {{lr: {text}, head_lr: {text}}}\n"
        )
        done = launch("train", f"r{number}.yaml", f"output=runs/{number}", cwd=folder)
        assert done.returncode == 0, done.stderr
        adapters.add((folder / f"runs/{number}/adapter/adapter.safetensors").read_bytes())
        assert "lr: 0.0001" in (folder / f"runs/{number}/recipe.yaml").read_text()
    assert len(adapters) == 1


@case("R3")
def test_a_quoted_number_is_refused(folder: Path) -> None:
    with_text(folder, 'optimizer: {lr: "1e-4"}')
    refused(2, "train", "r.yaml", cwd=folder, said=('expected a number, found "1e-4"', "fix: remove the quotes"))


@case("R4")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("head: {train: no}", "expected auto, true or false, found no"),
        ("evaluation: {metric: off}", 'unquoted off is read as true or false by other YAML readers; write "off"'),
        ("evaluation: {metric: on}", 'write "on"'),
        ("evaluation: {metric: true}", 'fix: quote it: "true"'),
        ("loss: {label_smoothing: true}", "expected a number, found true"),
        ("checkpoints: {keep: true}", "expected a whole number, found true"),
        ("checkpoints: {every: true}", "expected a number of optimizer steps"),
    ],
)
def test_words_that_look_like_truth_values_are_none_and_true_is_no_number(folder: Path, line: str, said: str) -> None:
    with_text(folder, line)
    refused(2, "train", "r.yaml", cwd=folder, said=("r.yaml:13:", said))


@case("R4")
def test_a_quoted_no_is_no_truth_value(folder: Path) -> None:
    instead(folder, "{dim: 4}", '{dim: 4, unshare: "no"}')
    refused(2, "train", "r.yaml", cwd=folder, said=('expected true or false, found "no"', "fix: write true or false"))


@case("R5")
@pytest.mark.parametrize("text", ["010", "12:30", "2024-01-01", "0o10", "1_000", "yesterday"])
def test_texts_stay_as_they_are_written(folder: Path, text: str) -> None:
    instead(folder, "base: {", f"base: {{revision: {text}, ")
    assert inspected("r.yaml", cwd=folder)["recipe"]["base"]["revision"] == text


@case("R5")
@pytest.mark.parametrize("text", ["1.10", "7", "1e5", "null"])
def test_a_number_that_stands_for_text_must_be_quoted(folder: Path, text: str) -> None:
    instead(folder, "output: runs/tiny", f"output: {text}")
    fix = (f'fix: quote it: "{text}"',) if text != "null" else ("found null",)
    refused(2, "train", "r.yaml", cwd=folder, said=("r.yaml:6:1 output: expected text", *fix))


@case("R5")
@pytest.mark.parametrize("text", ["010", "12:30", "1_000", "0x10", "1e1"])
def test_only_plain_decimal_numbers_are_whole_numbers(folder: Path, text: str) -> None:
    instead(folder, "max_length: 16", f"max_length: {text}")
    refused(2, "train", "r.yaml", cwd=folder, said=(f"data.max_length: expected a whole number, found {text}",))


@case("R6")
def test_numbers_outside_their_ranges_are_refused_with_the_range(folder: Path) -> None:
    instead(folder, "{dim: 4}", "{dim: -1, dropout: 1.5}")
    instead(folder, "steps: 2", "epochs: 0\n  seed: 18446744073709551616")
    instead(folder, "batch_size: 4", "batch_size: 0")
    with_text(folder, "optimizer: {lr: 0, norm_lr: -1, head_lr: .nan, p_lr_ratio: .inf}", "schedule: {warmup: 1.5}")
    expected = {
        "ticks.dim": "a number of at least 0, found -1",
        "ticks.dropout": "a number below 1.0, found 1.5",
        "training.epochs": "a number of at least 1, found 0",
        "training.seed": "a number below 9223372036854775808, found 18446744073709551616",
        "training.batch_size": "a number of at least 1, found 0",
        "optimizer.lr": "a number above 0.0, found 0",
        "optimizer.norm_lr": "a number above 0.0, found -1",
        "optimizer.head_lr": "a finite number, found .nan",
        "optimizer.p_lr_ratio": "a finite number, found .inf",
        "schedule.warmup": "a number of at most 1.0, found 1.5",
    }
    said = refused(2, "train", "r.yaml", cwd=folder)
    assert said.count("error[recipe]") == len(expected)
    for key, text in expected.items():
        assert f" {key}: expected {text}\n" in said


@case("R7")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "r.yaml: the file is empty"),
        (b"# nothing\n", "r.yaml: the file is empty"),
        (b"- task\n- base\n", "r.yaml:1:1: expected keys and values at the top level, found a list"),
        (b"task: x\n---\ntask: y\n", "r.yaml:2:1: this is not YAML: but found another document"),
        (b"task: x\nbase:\n\tmodel: m\n", "r.yaml:3:1: this is not YAML"),
        (b'task: "x\nbase: {model: m}\n', "r.yaml:3:1: this is not YAML: found unexpected end of stream"),
        (b"[" * 3000, "r.yaml:1:33: more than 32 levels of nesting"),
        (b"{a: " * 3000, "more than 32 levels of nesting"),
        (b"task: !!python/name:os.system\n", "r.yaml:1:7: the tag tag:yaml.org,2002:python/name:os.system"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(folder: Path, content: bytes, said: str) -> None:
    (folder / "r.yaml").write_bytes(content)
    error = refused(2, "train", "r.yaml", cwd=folder, said=(said,))
    assert len([line for line in error.splitlines() if not line.startswith("  fix:")]) == 1


@case("R7")
def test_a_file_that_is_not_there_or_is_a_folder_is_refused(folder: Path) -> None:
    (folder / "sub.yaml").mkdir()
    refused(2, "train", "t.yaml", cwd=folder, said=("t.yaml: there is no such file", "did you mean r.yaml?"))
    refused(2, "train", "sub.yaml", cwd=folder, said=("sub.yaml: this is a directory, not a recipe file",))


@case("R8")
def test_a_byte_order_mark_and_crlf_change_nothing(folder: Path) -> None:
    clean = inspected("r.yaml", cwd=folder)
    data = (folder / "r.yaml").read_bytes()
    for changed in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n")):
        (folder / "r.yaml").write_bytes(changed)
        assert inspected("r.yaml", cwd=folder) == clean


@case("R8")
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("latin-1", "r.yaml: byte 0 is not UTF-8"),
        ("utf-16", "r.yaml: byte 0 is not UTF-8"),
        ("utf-16-le", "r.yaml: byte 0 is not UTF-8"),
    ],
)
def test_another_encoding_is_refused_with_the_byte_in_every_locale(folder: Path, encoding: str, said: str) -> None:
    text = "é: 1\n" + (folder / "r.yaml").read_text()
    (folder / "r.yaml").write_bytes(text.encode(encoding))
    error = refused(2, "train", "r.yaml", cwd=folder, said=(said, "fix: save the file as UTF-8"))
    assert in_locale_c(folder) == error


@case("R8")
def test_nul_is_refused_with_the_byte(folder: Path) -> None:
    (folder / "r.yaml").write_bytes(b"task: x\0y\n")
    error = refused(2, "train", "r.yaml", cwd=folder, said=("r.yaml: byte 7 is NUL",))
    assert in_locale_c(folder) == error


def in_locale_c(folder: Path) -> str:
    """What a process says that knows no other character than ASCII."""
    done = subprocess.run(
        [sys.executable, "-m", "ticktune", "train", "r.yaml"],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    return done.stderr.decode("ascii")


@case("R9")
def test_all_mistakes_are_said_at_once_sorted_by_line(folder: Path) -> None:
    instead(folder, "text-classification", "text-clasification")
    instead(folder, "max_length: 16", "max_length: none")
    instead(folder, "{dim: 4}", "{dimm: 4, dropout: x}")
    with_text(folder, "logging: {every: 0}", "ticks: {}")
    error = refused(2, "train", "r.yaml", cwd=folder)
    lines = [line.split(": ")[1] for line in error.splitlines() if line.startswith("error[recipe]")]
    assert lines == [
        "r.yaml:1:1 task",
        "r.yaml:5:3 data.max_length",
        "r.yaml:7:9 ticks.dimm",
        "r.yaml:7:18 ticks.dropout",
        "r.yaml:13:11 logging.every",
        "r.yaml:14:1 ticks",
    ]


ODD_NAMES = ["with space", "[brackets] (and) {more}", "é漢🙂", "100% 'sure'", "trailing\n", "-dash", "~"]


@case("R10")
def test_odd_paths_work_from_another_directory(tmp_path: Path, tiny_bert: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for number, name in enumerate(ODD_NAMES):
        place = tmp_path / name
        shutil.copytree(tiny_bert, place / "base")
        (place / "rows.jsonl").write_text(ROWS)
        # The paths in it are relative to the recipe, which has the odd name, too.
        (place / f"{name}.yaml").write_text(recipe_text(Path("base")).replace("steps: 2", "steps: 1"))
        path = f"../{name}/{name}.yaml"
        done = launch("train", path, f"output=runs {number} {name.strip()}", cwd=tmp_path / "elsewhere")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "elsewhere" / f"runs {number} {name.strip()}" / "adapter/adapter.json").is_file()
        (place / "rows.jsonl").rename(place / "other.jsonl")
        shown = f"../{name}/rows.jsonl".replace("\n", "\\x0a")
        refused(4, "train", path, f"output=runs {number}b", cwd=tmp_path / "elsewhere", said=(shown, "no such file"))


@case("R10")
def test_home_and_a_leading_dash_are_paths(folder: Path) -> None:
    (folder / "home").mkdir()
    (folder / "rows.jsonl").rename(folder / "home/rows.jsonl")
    instead(folder, "train: rows.jsonl", "train: ~/rows.jsonl")
    (folder / "r.yaml").rename(folder / "-r.yaml")
    done = launch("inspect", "--", "-r.yaml", cwd=folder, env={"HOME": str(folder / "home")})
    assert done.returncode == 0, done.stderr
    refused(2, "inspect", "-r.yaml", cwd=folder, said=("error[usage]",))


@case("R11")
def test_inspect_shows_the_resolved_values_and_writes_nothing(folder: Path) -> None:
    with_text(folder, "optimizer: {lr: 1e-4}")
    before = contents(folder)
    recipe = inspected("r.yaml", "schedule.warmup=1e-1", cwd=folder)["recipe"]
    assert recipe["optimizer"] == {
        "name": "adamw",
        "lr": 0.0001,
        "p_lr_ratio": 4.0,
        "norm_lr": 0.001,
        "head_lr": 0.001,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "clip": 1.0,
    }
    assert recipe["schedule"] == {"name": "linear", "warmup": 0.1}
    assert contents(folder) == before


@case("R12")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.lr=x", "command line: optimizer.lr: expected a number, found x"),
        ("optimizer.lr=0", "command line: optimizer.lr: expected a number above 0.0, found 0"),
        ("optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("optimizer.lr", "command line: expected key=value"),
        ("evaluation.metric=no", 'write "no"'),
        ("ticks={dim: 1, dim: 2}", "command line: ticks: the key stands here and in line 1"),
        ("output=!!python/name:os.system", "command line: output: the tag"),
        ("task.x=1", "a value above it is not a group of keys"),
    ],
)
def test_an_override_is_checked_like_the_file_and_says_command_line(folder: Path, word: str, said: str) -> None:
    error = refused(2, "train", "r.yaml", word, cwd=folder, said=("command line", said))
    assert "r.yaml:" not in error


@case("R13")
def test_a_recipe_of_a_newer_version_is_refused_with_both_versions(folder: Path) -> None:
    with_text(folder, "version: 2", "novelty: {of: later}")
    said = ("r.yaml:13:1 version: the recipe is written for version 2 of the recipe grammar, this ticktune reads 1",)
    refused(2, "train", "r.yaml", cwd=folder, said=said)
