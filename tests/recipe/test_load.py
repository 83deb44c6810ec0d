"""Reading a recipe: scalars, keys, places, the command line, and files that are not recipes."""

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ticktune.errors import Problem, RecipeError
from ticktune.recipe.load import LoadedRecipe, dump_recipe, load_recipe

BASE = """\
task: text-classification
base:
  model: some-model
data:
  train: train.jsonl
"""


def load(folder: Path, text: str | bytes, *overrides: str) -> LoadedRecipe:
    path = folder / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, overrides)


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[Problem]:
    """The problems, with the folder taken out of their places."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return [
        Problem(p.message, p.where.replace(f"{folder}/", ""), p.fix.replace(f"{folder}/", ""))
        for p in caught.value.problems
    ]


def only_problem(folder: Path, text: str | bytes, *overrides: str) -> Problem:
    found = problems(folder, text, *overrides)
    assert len(found) == 1, found
    return found[0]


# Keys


def test_a_small_recipe_gets_every_default(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE).recipe
    assert (recipe.ticks.dim, recipe.optimizer.p_lr_ratio, recipe.evaluation.every) == (64, 4.0, "epoch")


def test_an_unknown_key_names_its_place_and_the_nearest_key(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + "ticks:\n  dims: 3\n") == Problem(
        "unknown key", "r.yaml:7:3 ticks.dims", "did you mean ticks.dim?"
    )


def test_an_unknown_section_names_the_nearest_section(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + "tick:\n  dim: 3\n").fix == "did you mean ticks?"


def test_an_unknown_key_without_a_near_one_lists_the_known_ones(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + "logging: {colour: 3}\n").fix == "known keys under logging: every"


@pytest.mark.parametrize(
    ("text", "where", "fix"),
    [
        ("lr: 1e-3\n", "r.yaml:6:1 lr", "it belongs to optimizer.lr"),
        ("training:\n  lr: 1e-3\n", "r.yaml:7:3 training.lr", "it belongs to optimizer.lr"),
        (
            "every: 3\n",
            "r.yaml:6:1 every",
            "it belongs to evaluation.every or checkpoints.every or logging.every",
        ),
    ],
)
def test_a_key_at_the_wrong_level_names_where_it_belongs(tmp_path: Path, text: str, where: str, fix: str) -> None:
    assert only_problem(tmp_path, BASE + text) == Problem("unknown key", where, fix)


def test_a_key_of_another_tool_names_what_it_is_called_here(tmp_path: Path) -> None:
    found = only_problem(tmp_path, BASE + "learning_rate: 1e-3\n")
    assert found.fix == "here it is called optimizer.lr"


def test_a_mistyped_key_of_another_section_is_found(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + "batch_sise: 3\n").fix.startswith("did you mean ")


@pytest.mark.parametrize(
    ("text", "where", "first"),
    [
        ("task: causal-lm\n", "r.yaml:6:1 task", 1),
        ("ticks:\n  dim: 3\n  dim: 4\n", "r.yaml:8:3 ticks.dim", 7),
        ("ticks: {dim: 3, dim: 3}\n", "r.yaml:6:17 ticks.dim", 6),
    ],
)
def test_a_duplicate_key_names_both_lines(tmp_path: Path, text: str, where: str, first: int) -> None:
    assert only_problem(tmp_path, BASE + text) == Problem(
        f"the key stands here and in line {first}", where, "keep one of the two"
    )


def test_a_missing_key_says_what_it_is(tmp_path: Path) -> None:
    found = problems(tmp_path, "task: causal-lm\ndata: {}\n")
    assert [(p.where, p.message) for p in found] == [
        ("r.yaml:1:1 base", "this key is needed"),
        ("r.yaml:2:1 data.train", "this key is needed"),
    ]
    assert found[0].fix == "The frozen pretrained model."


def test_a_missing_task_is_reported(tmp_path: Path) -> None:
    found = only_problem(tmp_path, "base: {model: m}\ndata: {train: x}\n")
    assert (found.where, found.message) == ("r.yaml:1:1 task", "this key is needed")


@pytest.mark.parametrize(
    ("text", "found"),
    [("base: m\n", "m"), ("base: [a, b]\n", "[a, b]"), ("base:\n", "nothing")],
)
def test_a_section_that_is_not_a_group_is_refused(tmp_path: Path, text: str, found: str) -> None:
    problem = only_problem(tmp_path, f"task: causal-lm\n{text}data: {{train: x}}\n")
    assert problem.message == f"expected a group of keys and values, found {found}"


@pytest.mark.parametrize("key", ["<<: {a: 1}", "[a, b]: 3"])
def test_a_key_that_is_no_word_is_refused(tmp_path: Path, key: str) -> None:
    assert only_problem(tmp_path, f"{BASE}{key}\n") == Problem("a key must be a plain word", "r.yaml:6:1", "")


def test_several_mistakes_come_at_once_in_the_order_of_their_lines(tmp_path: Path) -> None:
    text = """\
task: text-clasification
base:
  model: 3
  dtyp: x
ticks: {dim: -1, dropout: 1.0}
data: {}
ticks: {}
"""
    assert [(p.where, p.message) for p in problems(tmp_path, text)] == [
        ("r.yaml:1:1 task", "there is no task text-clasification"),
        ("r.yaml:3:3 base.model", "expected text, found 3"),
        ("r.yaml:4:3 base.dtyp", "unknown key"),
        ("r.yaml:5:9 ticks.dim", "expected a number of at least 0, found -1"),
        ("r.yaml:5:18 ticks.dropout", "expected a number below 1.0, found 1.0"),
        ("r.yaml:6:1 data.train", "this key is needed"),
        ("r.yaml:7:1 ticks", "the key stands here and in line 5"),
    ]


# Numbers


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "+1e-4", "1.e-4", "100e-6"])
def test_all_spellings_of_a_float_are_the_same_float(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{BASE}optimizer: {{lr: {text}}}\n").recipe.optimizer.lr == 1e-4


def test_a_float_without_a_point_is_a_float(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "optimizer: {lr: 5e-5}\n").recipe.optimizer.lr == 5e-5


def test_a_whole_number_is_a_float_where_one_is_expected(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "optimizer: {clip: 5}\n").recipe.optimizer.clip == 5.0


@pytest.mark.parametrize(("key", "text"), [("lr", "1e-4"), ("lr", "1")])
def test_a_quoted_number_is_not_a_number(tmp_path: Path, key: str, text: str) -> None:
    assert only_problem(tmp_path, f'{BASE}optimizer: {{{key}: "{text}"}}\n') == Problem(
        f'expected a number, found "{text}"', f"r.yaml:6:13 optimizer.{key}", "remove the quotes"
    )


@pytest.mark.parametrize("text", ["010", "1_000", "12:30", "0x10", "0o7", "1e2", "8.0", "true", "yes", "eight"])
def test_what_is_no_whole_number_in_yaml_1_2_is_refused_as_one(tmp_path: Path, text: str) -> None:
    found = only_problem(tmp_path, f"{BASE}ticks:\n  dim: {text}\n")
    assert found == Problem(
        f"expected a whole number, found {text}",
        "r.yaml:7:3 ticks.dim",
        "write it without a point, quotes or leading zeros, such as 8",
    )


@pytest.mark.parametrize("text", ["true", "1e-4x", "1_000.0", "0x10"])
def test_what_is_no_number_is_refused_as_one(tmp_path: Path, text: str) -> None:
    found = only_problem(tmp_path, f"{BASE}optimizer: {{lr: {text}}}\n")
    assert (found.message, found.fix) == (f"expected a number, found {text}", "write a number such as 1e-4")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", ".NaN", ".Inf", "1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, text: str) -> None:
    found = only_problem(tmp_path, f"{BASE}optimizer: {{lr: {text}}}\n")
    assert found.message == f"expected a finite number, found {text}"


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("ticks", "dim", "-1", "a number of at least 0"),
        ("ticks", "dim", "65537", "a number of at most 65536"),
        ("ticks", "dropout", "1", "a number below 1.0"),
        ("optimizer", "lr", "0", "a number above 0.0"),
        ("optimizer", "p_lr_ratio", "-4", "a number of at least 1e-06"),
        ("optimizer", "weight_decay", "-0.1", "a number of at least 0.0"),
        ("optimizer", "clip", "0", "a number above 0.0"),
        ("schedule", "warmup", "1.01", "a number of at most 1.0"),
        ("training", "epochs", "0", "a number of at least 1"),
        ("training", "batch_size", "0", "a number of at least 1"),
        ("training", "seed", "9223372036854775808", "a number below 9223372036854775808"),
        ("data", "max_length", "1", "a number of at least 2"),
    ],
)
def test_a_number_out_of_its_range_names_the_bound(
    tmp_path: Path, section: str, key: str, value: str, expected: str
) -> None:
    text = BASE + (f"  {key}: {value}\n" if section == "data" else f"{section}:\n  {key}: {value}\n")
    found = only_problem(tmp_path, text)
    assert found.message == f"expected {expected}, found {value}"
    assert found.where == f"r.yaml:{len(text.splitlines())}:3 {section}.{key}"


@pytest.mark.parametrize(
    ("betas", "where", "message"),
    [
        ("[0.9]", "r.yaml:6:13 optimizer.betas", "expected a list of 2, found [0.9]"),
        ("[0.9, 0.9, 0.9]", "r.yaml:6:13 optimizer.betas", "expected a list of 2, found [0.9, 0.9, 0.9]"),
        ("[0.9, 1.0]", "r.yaml:6:26 optimizer.betas[1]", "expected a number below 1.0, found 1.0"),
    ],
)
def test_betas_are_two_numbers_below_one(tmp_path: Path, betas: str, where: str, message: str) -> None:
    found = only_problem(tmp_path, f"{BASE}optimizer: {{betas: {betas}}}\n")
    assert (found.where, found.message) == (where, message)


def test_a_very_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    found = only_problem(tmp_path, f"{BASE}training: {{seed: {'9' * 5000}}}\n")
    assert found.message == f"expected a whole number, found {'9' * 80}…"


# Words


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "No", "OFF", "y", "n"])
def test_an_unquoted_yaml_1_1_word_is_refused_as_text(tmp_path: Path, word: str) -> None:
    assert only_problem(tmp_path, BASE.replace("some-model", word)) == Problem(
        f'unquoted {word} is read as true or false by other YAML readers; write "{word}"',
        "r.yaml:3:3 base.model",
        "",
    )


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_quoted_yaml_1_1_word_is_text(tmp_path: Path, quote: str) -> None:
    recipe = load(tmp_path, f"{BASE}  columns: {{text: {quote}no{quote}, label: {quote}on{quote}}}\n").recipe
    assert recipe.data.columns == {"text": "no", "label": "on"}


def test_unquoted_words_are_refused_as_column_names(tmp_path: Path) -> None:
    found = problems(tmp_path, BASE + "  columns: {text: on, label: no}\n")
    assert [p.where for p in found] == ["r.yaml:6:13 data.columns.text", "r.yaml:6:23 data.columns.label"]
    assert all(p.message.startswith("unquoted ") for p in found)


@pytest.mark.parametrize("text", ["off", '"off"', "'off'"])
def test_dropout_off_needs_no_quotes(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, BASE.replace("some-model", f"m\n  dropout: {text}")).recipe
    assert recipe.base.dropout == "off"


def test_a_word_that_is_not_among_the_choices_names_the_nearest(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE.replace("some-model", "m\n  dropout: of")) == Problem(
        "expected keep or off, found of", "r.yaml:4:3 base.dropout", "did you mean off?"
    )


@pytest.mark.parametrize(
    ("text", "fix"), [("true", "write memory or disk"), ("yes", "write memory or disk"), ("false", "write off")]
)
def test_a_switch_with_names_says_which_to_write(text: str, fix: str, tmp_path: Path) -> None:
    key, message = "training.prefix_cache", f"expected off, memory or disk, found {text}"
    written = BASE + f"training:\n  prefix_cache: {text}\n"
    assert only_problem(tmp_path, written) == Problem(message, f"r.yaml:7:3 {key}", fix)
    assert only_problem(tmp_path, BASE, f"{key}={text}") == Problem(message, f"command line: {key}", fix)
    assert load(tmp_path, BASE + "training:\n  prefix_cache: off\n").recipe.training.prefix_cache == "off"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("packing", "true or false"),
        ("padding_free", "true or false"),
        ("precision", "auto, fp32, bf16 or fp16"),
        ("device", "text"),
        ("seed", "a whole number"),
    ],
)
@pytest.mark.parametrize(("text", "found"), [(" null", "null"), ("", "nothing")])
def test_a_key_without_a_value_can_be_left_out(key: str, expected: str, text: str, found: str, tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + f"training:\n  {key}:{text}\n") == Problem(
        f"expected {expected}, found {found}",
        f"r.yaml:7:3 training.{key}",
        "write a value, or leave the key out: it has a default",
    )


def test_a_key_that_is_needed_cannot_be_left_out(tmp_path: Path) -> None:
    written = BASE.replace("some-model", "null")
    assert only_problem(tmp_path, written) == Problem("expected text, found null", "r.yaml:3:3 base.model")


@pytest.mark.parametrize("text", ["5", "5.5", "true", "1e-4"])
def test_what_is_no_text_is_refused_as_text_with_a_hint_to_quote(tmp_path: Path, text: str) -> None:
    found = only_problem(tmp_path, BASE.replace("some-model", text))
    assert (found.message, found.fix) == (f"expected text, found {text}", f'quote it: "{text}"')


@pytest.mark.parametrize(("text", "shown"), [('""', '""'), ("'  '", '"  "')])
def test_an_empty_text_is_refused(tmp_path: Path, text: str, shown: str) -> None:
    assert only_problem(tmp_path, BASE.replace("some-model", text)).message == (f"expected some text, found {shown}")


def test_a_date_is_text(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE.replace("some-model", "m\n  revision: 2024-01-01")).recipe
    assert recipe.base.revision == "2024-01-01"


@pytest.mark.parametrize("text", ["yes", '"true"', "1"])
def test_only_true_and_false_are_true_or_false(tmp_path: Path, text: str) -> None:
    assert only_problem(tmp_path, f"{BASE}training: {{deterministic: {text}}}\n") == Problem(
        f"expected true or false, found {text}",
        "r.yaml:6:12 training.deterministic",
        "write true or false",
    )


def test_a_device_that_is_none_names_the_choices(tmp_path: Path) -> None:
    found = only_problem(tmp_path, BASE + "training: {device: gpu}\n")
    assert found.message == "expected auto, cpu, cuda or cuda:N, found gpu"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all", "all"),
        ("last:3", "last:3"),
        ("4-11", "4-11"),
        ("[5, 0, 5]", [0, 5]),
        ("7", [7]),
        ("{encoder: all, decoder: last:2}", {"encoder": "all", "decoder": "last:2"}),
    ],
)
def test_layers_may_be_words_ranges_lists_and_stacks(tmp_path: Path, text: str, value: Any) -> None:
    assert load(tmp_path, f"{BASE}ticks:\n  layers: {text}\n").recipe.ticks.layers == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-3", "the range 5-3 is empty, found 5-3"),
        (
            "lst:3",
            "expected all, none, last:3, first:2, 4-11 or a list such as [0, 2, 5], found lst:3",
        ),
        ("off", "expected all, none, last:3, first:2, 4-11 or a list such as [0, 2, 5], found off"),
        ("[0, -1]", "expected a list of layer numbers, 0 or more, found [0, -1]"),
        ("[true]", "expected a list of layer numbers, 0 or more, found [True]"),
        ("same", "expected all, none, last:3, first:2, 4-11 or a list such as [0, 2, 5], found same"),
    ],
)
def test_layers_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert only_problem(tmp_path, f"{BASE}ticks:\n  layers: {text}\n").message == message


def test_norm_layers_may_be_the_same_as_the_ticks(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "norms: {layers: same}\n").recipe.norms.layers == "same"


def test_norm_roles_come_in_one_order(tmp_path: Path) -> None:
    assert load(tmp_path, BASE + "norms: {train: [ffn, embedding]}\n").recipe.norms.train == [
        "embedding",
        "ffn",
    ]


def test_an_unknown_norm_role_lists_the_roles(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE + "norms: {train: [attn]}\n").message == (
        "expected all, none, or a list of embedding, attention, cross_attention, ffn, final, q, k, found [attn]"
    )


@pytest.mark.parametrize("value", ["0", "-3", "epochs", "true", "2.0"])
def test_every_is_a_number_of_steps_or_epoch(tmp_path: Path, value: str) -> None:
    assert only_problem(tmp_path, f"{BASE}checkpoints: {{every: {value}}}\n").message == (
        f"expected a number of optimizer steps, at least 1, or the word epoch, found {value}"
    )


def test_the_head_is_auto_true_or_false(tmp_path: Path) -> None:
    found = only_problem(tmp_path, BASE + "head: {train: yes}\n")
    assert found.message == "expected auto, true or false, found yes"


# Task defaults


def test_the_defaults_of_a_task_replace_those_of_the_schema(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE.replace("text-classification", "causal-lm")).recipe
    figures = (recipe.data.max_length, recipe.optimizer.lr, recipe.schedule.name, recipe.training.batch_size)
    assert figures == (512, 1e-4, "cosine", 16)


def test_a_value_of_the_recipe_beats_the_default_of_its_task(tmp_path: Path) -> None:
    text = BASE.replace("text-classification", "causal-lm") + "  max_length: 99\noptimizer: {clip: 2}\n"
    recipe = load(tmp_path, text).recipe
    assert (recipe.data.max_length, recipe.optimizer.lr, recipe.optimizer.clip) == (99, 1e-4, 2.0)


def test_an_override_beats_the_default_of_its_task(tmp_path: Path) -> None:
    text = BASE.replace("text-classification", "causal-lm")
    assert load(tmp_path, text, "schedule.name=linear").recipe.schedule.name == "linear"


# The command line


def test_an_override_replaces_the_value_of_the_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE + "ticks: {dim: 8}\n", "ticks.dim=32", "optimizer.lr=1e-3")
    assert (loaded.recipe.ticks.dim, loaded.recipe.optimizer.lr) == (32, 1e-3)


def test_the_last_of_two_overrides_counts(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "ticks.dim=1", "ticks.dim=2").recipe.ticks.dim == 2


def test_an_override_may_be_null_a_list_or_a_group(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE, "optimizer.clip=null", "ticks.layers=[0, 2]", "schedule={warmup: 0.5}").recipe
    assert (recipe.optimizer.clip, recipe.ticks.layers, recipe.schedule.warmup) == (None, [0, 2], 0.5)


def test_a_mistake_on_the_command_line_is_placed_there(tmp_path: Path) -> None:
    found = problems(tmp_path, BASE + "ticks: {dim: 8}\n", "ticks.dims=32", "ticks.dim=010", "optimizer.lr=x")
    assert {p.where: (p.message, p.fix) for p in found} == {
        "command line: ticks.dims": ("unknown key", "did you mean ticks.dim?"),
        "command line: ticks.dim": (
            "expected a whole number, found 010",
            "write it without a point, quotes or leading zeros, such as 8",
        ),
        "command line: optimizer.lr": ("expected a number, found x", "write a number such as 1e-4"),
    }


def test_a_group_on_the_command_line_places_its_keys_there(tmp_path: Path) -> None:
    found = only_problem(tmp_path, BASE + "ticks: {dim: 8}\n", "ticks={dim: -5}")
    assert found == Problem("expected a number of at least 0, found -5", "command line: ticks.dim", "")


def test_a_key_below_a_value_on_the_command_line_is_placed_there(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE, "ticks.dim.x=3").where == "command line: ticks.dim"


@pytest.mark.parametrize("text", ["foo", "=3", "a..b=3"])
def test_an_override_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    assert only_problem(tmp_path, BASE, text) == Problem(
        f"expected key=value, found {text!r}", "command line", "write e.g. ticks.dim=32"
    )


def test_an_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    assert only_problem(tmp_path, BASE, "task.x=1") == Problem(
        "a value above it is not a group of keys", "command line: task.x", ""
    )


def test_an_override_that_is_no_yaml_is_placed_by_its_key(tmp_path: Path) -> None:
    found = only_problem(tmp_path, BASE, "ticks.layers=[0,2")
    assert found.where == "command line: ticks.layers"
    assert found.message.startswith("this is not YAML: ")


def test_an_override_under_a_data_path_keeps_the_path(tmp_path: Path) -> None:
    source = load(tmp_path, BASE, "data.train.limit=5").recipe.data.train
    assert (source.path, source.limit) == ("train.jsonl", 5)


@pytest.mark.parametrize("override", ["data.train=x.jsonl", "data.train.path=x.jsonl", "data.train={path: x.jsonl}"])
def test_a_path_on_the_command_line_starts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert load(tmp_path, BASE, override).recipe.data.train.path == str(tmp_path / "work" / "x.jsonl")


@pytest.mark.parametrize("override", ["data.train=${FOLDER}/x.jsonl", "data.train={path: '${FOLDER}/x.jsonl'}"])
def test_a_path_on_the_command_line_that_begins_with_a_variable_stays_as_written(tmp_path: Path, override: str) -> None:
    assert load(tmp_path, BASE, override).recipe.data.train.path == "${FOLDER}/x.jsonl"


def test_a_path_in_the_file_stays_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert load(tmp_path, BASE).recipe.data.train.path == "train.jsonl"


def test_a_model_directory_on_the_command_line_starts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert load(tmp_path, BASE, "base.model=model").recipe.base.model == str(tmp_path / "work" / "model")


def test_a_hub_id_on_the_command_line_stays_as_it_is(tmp_path: Path) -> None:
    assert load(tmp_path, BASE, "base.model=owner/name").recipe.base.model == "owner/name"


# Files


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + BASE.encode()).recipe.task == "text-classification"


def test_windows_line_ends_count_as_one_line_each(tmp_path: Path) -> None:
    text = (BASE + "ticks: {dim: x}\n").replace("\n", "\r\n")
    assert only_problem(tmp_path, text.encode()).where == "r.yaml:6:9 ticks.dim"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            BASE + "ticks:\n\tdim: 3\n",
            Problem(
                "this is not YAML: found character '\\t' that cannot start any token",
                "r.yaml:7:1",
                "indent with spaces, not tabs",
            ),
        ),
        (
            BASE + 'output: "abc\n',
            Problem("this is not YAML: found unexpected end of stream", "r.yaml:7:1"),
        ),
        ("", Problem("the file is empty", "r.yaml")),
        ("# nothing\n", Problem("the file is empty", "r.yaml")),
        ("- a\n", Problem("expected keys and values at the top level, found a list", "r.yaml:1:1")),
        ("hello\n", Problem("expected keys and values at the top level, found 'hello'", "r.yaml:1:1")),
        (f"{BASE}---\n{BASE}", Problem("this is not YAML: but found another document", "r.yaml:6:1")),
        (
            "a: " + "[" * 3000 + "]" * 3000 + "\n",
            Problem("more than 32 levels of nesting", "r.yaml:1:35"),
        ),
        (
            BASE.replace("some-model", "&x m"),
            Problem("anchors and aliases are not used in recipes", "r.yaml:3:10", "write it out"),
        ),
        (
            BASE + "output: *x\n",
            Problem("anchors and aliases are not used in recipes", "r.yaml:6:9", "write it out"),
        ),
        (
            BASE + "output: !!python/object/apply:os.system [x]\n",
            Problem(
                "the tag tag:yaml.org,2002:python/object/apply:os.system is not used in recipes",
                "r.yaml:6:9",
                "remove it",
            ),
        ),
        (
            BASE + "output: !!str 5\n",
            Problem("the tag tag:yaml.org,2002:str is not used in recipes", "r.yaml:6:9", "remove it"),
        ),
        (
            BASE + "output: a\x07b\n",
            Problem("this is not YAML: special characters are not allowed", "r.yaml"),
        ),
        (
            BASE.encode() + "output: café\n".encode("latin-1"),
            Problem(f"byte {len(BASE) + 11} is not UTF-8", "r.yaml", "save the file as UTF-8"),
        ),
        (BASE.encode("utf-16"), Problem("byte 0 is not UTF-8", "r.yaml", "save the file as UTF-8")),
        (
            BASE.encode() + b"\0",
            Problem(f"byte {len(BASE)} is NUL: not a text file", "r.yaml", "save the file as UTF-8"),
        ),
        (BASE + "#" * 1_000_000, Problem("the file is larger than 1 MB: not a recipe", "r.yaml")),
    ],
    ids=[
        "tab",
        "unclosed-quote",
        "empty",
        "only-a-comment",
        "list",
        "word",
        "two-documents",
        "3000-brackets",
        "anchor",
        "alias",
        "object-tag",
        "str-tag",
        "bell",
        "latin-1",
        "utf-16",
        "nul",
        "large",
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, text: str | bytes, problem: Problem) -> None:
    assert only_problem(tmp_path, text) == problem


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a directory, not a recipe file"):
        load_recipe(tmp_path)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "sst2.yaml").write_text(BASE)
    with pytest.raises(RecipeError, match="there is no such file") as caught:
        load_recipe(tmp_path / "sst3.yaml")
    assert caught.value.problems[0].fix == f"did you mean {tmp_path / 'sst2.yaml'}?"


def test_a_missing_file_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no such file") as caught:
        load_recipe(tmp_path / "no" / "sst3.yaml")
    assert caught.value.problems[0].fix == "give the path of a recipe file"


def test_a_nul_in_the_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: .*null"):
        load_recipe(tmp_path / "a\0b.yaml")


# The result


def test_a_dumped_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    text = (
        BASE.replace("some-model", '"no"')
        + """\
  validation: {fraction: 0.1}
  columns: {text: "{a}\\n{b}", label: "1e-4"}
optimizer: {lr: 1e-5, betas: [0.8, 0.99], clip: null}
ticks: {layers: [3, 1], dropout: 1e-7}
norms: {train: [q, ffn]}
head: {train: false}
"""
    )
    recipe = load(tmp_path, text).recipe
    assert load(tmp_path, dump_recipe(recipe)).recipe == recipe


@pytest.mark.parametrize("text", ["1234e56", "1e-4", "y", "no", "010", "1_000", "12:30", "null", "a: b", "#x", "é"])
def test_a_dumped_text_loads_as_the_same_text(tmp_path: Path, text: str) -> None:
    recipe = load(tmp_path, BASE.replace("some-model", f'm\n  revision: "{text}"')).recipe
    assert load(tmp_path, dump_recipe(recipe)).recipe.base.revision == text


def test_a_dumped_recipe_spells_out_the_defaults(tmp_path: Path) -> None:
    assert "p_lr_ratio: 4.0" in dump_recipe(load(tmp_path, BASE).recipe)


def test_a_loaded_recipe_knows_the_place_of_a_key(tmp_path: Path) -> None:
    loaded = load(tmp_path, BASE, "ticks.dim=3")
    assert loaded.where("data.train") == f"{tmp_path / 'r.yaml'}:5:3 data.train"
    assert loaded.where("ticks.dim") == "command line: ticks.dim"


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load(tmp_path, BASE).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.ticks.dim = 3  # type: ignore[misc]


# Speed


@pytest.mark.parametrize("module", ["ticktune", "ticktune.cli", "ticktune.recipe.load", "ticktune.registry"])
def test_nothing_heavy_is_imported_by(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'torchmetrics', 'pyarrow', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BASE + "lr: 3\n")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ticktune.errors import RecipeError\n"
        "from ticktune.recipe.load import load_recipe\n"
        "try:\n"
        "    load_recipe(Path('r.yaml'))\n"
        "except RecipeError as error:\n"
        "    print(error)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "r.yaml:6:1 lr: unknown key\n"), done.stderr


def test_a_hundred_mistakes_are_found_in_a_second(tmp_path: Path) -> None:
    text = BASE + "ticks:\n" + "".join(f"  dim{i}: 3\n" for i in range(100))
    start = time.process_time()
    assert len(problems(tmp_path, text)) == 100
    assert time.process_time() - start < 1


def test_infinity_and_nan_are_read_as_numbers() -> None:
    from ticktune.recipe.load import plain_scalar

    assert plain_scalar("-.inf") == -math.inf
    assert math.isnan(plain_scalar(".NaN"))


def test_the_command_line_answers_a_mistake_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BASE + "lr: 3\n")
    code = (
        "import sys\n"
        "from ticktune.cli import entry\n"
        "assert entry(['train', 'r.yaml']) == 2\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, "error[recipe]: r.yaml:6:1 lr: unknown key")
