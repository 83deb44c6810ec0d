"""Rules between keys."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ticktune.errors import Problem, RecipeError
from ticktune.recipe.load import dump_recipe, load_recipe
from ticktune.recipe.schema import Recipe
from ticktune.registry import TASKS

HEAD = "task: text-classification\nbase: {model: m}\n"


def problems(folder: Path, text: str) -> list[Problem]:
    (folder / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "r.yaml")
    return [Problem(p.message, p.where.replace(f"{folder}/", ""), p.fix) for p in caught.value.problems]


def accepted(folder: Path, text: str) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load_recipe(folder / "r.yaml").recipe


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            HEAD.replace("text-", "txt-") + "data: {train: a}\n",
            Problem(
                "there is no task txt-classification",
                "r.yaml:1:1 task",
                "did you mean text-classification?",
            ),
        ),
        (
            HEAD + "data: {train: {}}\n",
            Problem("expected one of path, hub or fraction, found none of them", "r.yaml:3:8 data.train"),
        ),
        (
            HEAD + "data: {train: {path: a, hub: b}}\n",
            Problem("expected one of path, hub or fraction, found path and hub", "r.yaml:3:8 data.train"),
        ),
        (
            HEAD + "data: {train: {fraction: 0.5}}\n",
            Problem(
                "only validation and test can be a share of the training rows",
                "r.yaml:3:16 data.train.fraction",
            ),
        ),
        (
            HEAD + "data: {train: a, validation: {fraction: 0.5, limit: 2}}\n",
            Problem(
                "a share of the training rows makes no use of it", "r.yaml:3:46 data.validation.limit", "remove it"
            ),
        ),
        (
            HEAD + "data: {train: a, test: {fraction: 0.5, sample_by: line}}\n",
            Problem("a share of the training rows makes no use of it", "r.yaml:3:40 data.test.sample_by", "remove it"),
        ),
        (
            HEAD + "data: {train: {path: a, split: train}}\n",
            Problem("config, split and revision are only for hub data sets", "r.yaml:3:8 data.train"),
        ),
        (
            HEAD + "data: {train: a, validation: {path: a}}\n",
            Problem(
                "these are the training rows",
                "r.yaml:3:18 data.validation",
                "name other rows, or {fraction: 0.1}; or set data.allow_training_rows: true",
            ),
        ),
        (
            HEAD + "data: {train: {hub: a}, test: {hub: a, split: train}}\n",
            Problem(
                "these are the training rows",
                "r.yaml:3:25 data.test",
                "name other rows, or {fraction: 0.1}; or set data.allow_training_rows: true",
            ),
        ),
        (
            HEAD + "data: {train: a, validation: {fraction: 0.5}, test: {fraction: 0.5}}\n",
            Problem("the fractions leave no rows to train on", "r.yaml:3:1 data"),
        ),
        (
            HEAD + "data: {train: a, columns: {text: a, label: b, text_pare: c}}\n",
            Problem(
                "text-classification has no such column; it knows label, text, text_pair",
                "r.yaml:3:47 data.columns.text_pare",
                "did you mean text_pair?",
            ),
        ),
        (
            HEAD + "data: {train: a, columns: {text: '{a!r}', label: b}}\n",
            Problem(
                "only plain {column} names can stand in a template, found {a!r}",
                "r.yaml:3:28 data.columns.text",
            ),
        ),
        (
            HEAD.replace("text-classification", "causal-lm") + "data: {train: a, columns: {text: a, prompt: b}}\n",
            Problem("expected text or prompt+response or messages, found prompt+text", "r.yaml:3:18 data.columns"),
        ),
        (
            HEAD + "data: {train: a, classes: {x: 1, y: [2]}}\n",
            Problem(
                "text-classification makes no use of it, only semantic-segmentation and object-detection",
                "r.yaml:3:18 data.classes",
                "remove it",
            ),
        ),
        (
            HEAD.replace("text-classification", "semantic-segmentation") + "data: {train: a, classes: {x: [1]}}\n",
            Problem("expected 2 to 255 classes, found 1", "r.yaml:3:18 data.classes"),
        ),
        (
            HEAD.replace("text-classification", "semantic-segmentation")
            + "data: {train: a, classes: {x: [1, 2], y: 2}}\n",
            Problem("the number 2 is in the class x already", "r.yaml:3:39 data.classes.y"),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {epochs: 1, steps: 5}\n",
            Problem("give epochs or steps, not both", "r.yaml:4:23 training.steps"),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {micro_batch_size: 64}\n",
            Problem("expected at most batch_size = 32, found 64", "r.yaml:4:12 training.micro_batch_size"),
        ),
        (
            HEAD + "data: {train: a}\nticks: {dim: 0}\nnorms: {train: none}\nhead: {train: false}\n",
            Problem("nothing would be trained: no ticks, no norms, no head", "r.yaml:4:9 ticks.dim"),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {prefix_cache: disk}\n",
            Problem(
                "ticks.layers is all: no layer is frozen whose result could be kept",
                "r.yaml:4:12 training.prefix_cache",
                "set ticks.layers: last:N",
            ),
        ),
        (
            HEAD.replace("text-", "image-")
            + "data: {train: a, augment: {flip: 0.5}}\nticks: {layers: last:1}\ntraining: {prefix_cache: memory}\n",
            Problem(
                "data.augment changes the rows in every epoch, so nothing can be kept",
                "r.yaml:5:12 training.prefix_cache",
                "set training.prefix_cache: off",
            ),
        ),
        (
            HEAD.replace("text-classification", "causal-lm")
            + "data: {train: a}\nticks: {layers: last:1}\ntraining: {prefix_cache: disk, packing: true}\n",
            Problem(
                "what is kept of a row is not that of a packed row",
                "r.yaml:5:12 training.prefix_cache",
                "switch one of them off",
            ),
        ),
        (
            HEAD + "data: {train: a}\nticks: {layers: last:1}\ntraining: {prefix_cache: disk, padding_free: true}\n",
            Problem(
                "what is kept is of padded rows",
                "r.yaml:5:12 training.prefix_cache",
                "switch one of them off",
            ),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {cuda_graphs: true, padding_free: true}\n",
            Problem(
                "with training.padding_free, every batch has a shape of its own",
                "r.yaml:4:12 training.cuda_graphs",
                "switch one of them off",
            ),
        ),
        *(
            (
                HEAD.replace("text-classification", "causal-lm")
                + f"data: {{train: a}}\nticks: {{layers: last:1}}\ntraining: {{cuda_graphs: true, {key}: {value}}}\n",
                Problem(
                    f"with training.{key.rpartition(' ')[2]}, {why}",
                    "r.yaml:5:12 training.cuda_graphs",
                    "switch one of them off",
                ),
            )
            for key, value, why in (
                ("batch_size: null, batch_tokens", "512", "every batch has a shape of its own"),
                ("packing", "true", "where the examples of a row end is read on the CPU"),
                ("prefix_cache", "disk", "what is kept of a row is read by its number"),
                (
                    "gradient_checkpointing",
                    "true",
                    "a layer that is computed again reads the state of a random generator",
                ),
            )
        ),
        (
            HEAD + "data: {train: a}\ntraining: {cuda_graphs: true, ffn: auto}\n",
            Problem(
                "with training.ffn auto, its trial would time steps that are not recorded",
                "r.yaml:4:12 training.cuda_graphs",
                "set training.ffn: split, or wide",
            ),
        ),
        (
            HEAD + "data: {train: a}\nevaluation: {metric: acuracy}\n",
            Problem(
                f"text-classification has the metrics {', '.join(TASKS['text-classification'].metrics)}, found acuracy",
                "r.yaml:4:14 evaluation.metric",
                "did you mean accuracy?",
            ),
        ),
        (
            HEAD.replace("text-classification", "causal-lm") + "data: {train: a}\nproblem: multi\n",
            Problem("causal-lm makes no use of it, only text-classification", "r.yaml:4:1 problem", "remove it"),
        ),
        (
            HEAD + "data: {train: a, augment: {flip: 0.5}}\n",
            Problem(
                "text-classification makes no use of it, only image-classification, semantic-segmentation and "
                "object-detection",
                "r.yaml:3:28 data.augment.flip",
                "remove it",
            ),
        ),
        (
            HEAD.replace("text-classification", "causal-lm") + 'data: {train: a, separator: "|"}\n',
            Problem(
                "causal-lm makes no use of it, only text-classification", "r.yaml:3:18 data.separator", "remove it"
            ),
        ),
        (
            HEAD + 'data: {train: a, separator: "|"}\nproblem: single\n',
            Problem("expected problem: multi or auto beside it, found single", "r.yaml:3:18 data.separator"),
        ),
        (
            HEAD + "data: {train: {path: a.jsonl, sample_by: line}}\n",
            Problem("only a txt file is cut into rows", "r.yaml:3:31 data.train.sample_by", "remove it"),
        ),
        (
            HEAD + "data: {train: a}\nevaluation: {patience: 2}\n",
            Problem("early stopping needs data.validation", "r.yaml:4:14 evaluation.patience"),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {batch_size: 8, batch_tokens: 512}\n",
            Problem(
                "give batch_size or batch_tokens, not both",
                "r.yaml:4:27 training.batch_tokens",
                "set training.batch_size: null",
            ),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {batch_size: null}\n",
            Problem("expected a number, or batch_tokens beside it, found null", "r.yaml:4:12 training.batch_size"),
        ),
        (
            HEAD + "data: {train: a}\ntraining: {batch_tokens: 100}\n",
            Problem(
                "expected at least data.max_length = 128, found 100",
                "r.yaml:4:12 training.batch_tokens",
                "raise it to 128 or more, or lower data.max_length",
            ),
        ),
        (
            HEAD.replace("text-classification", "causal-lm")
            + "data: {train: a}\ntraining: {packing: true, fast: false}\n",
            Problem(
                "it is one of the ways that training.fast: false switches off",
                "r.yaml:4:12 training.packing",
                "remove it",
            ),
        ),
        *(
            (
                HEAD + f"data: {{train: a}}\nticks: {{layers: last:1}}\ntraining: {{{key}: {value}, fast: false}}\n",
                Problem(
                    "it is one of the ways that training.fast: false switches off",
                    f"r.yaml:5:12 training.{key}",
                    "remove it",
                ),
            )
            for key, value in (
                ("padding_free", "true"),
                ("prefix_cache", "memory"),
                ("ffn", "auto"),
                ("compile", "true"),
                ("cuda_graphs", "true"),
            )
        ),
        (
            HEAD + 'data: {train: a}\noutput: "a\\nb"\n',
            Problem("the path holds a control character or a name of more than 255 bytes", "r.yaml:4:1 output"),
        ),
        (
            HEAD + f"data: {{train: a}}\noutput: runs/{'é' * 128}\n",
            Problem("the path holds a control character or a name of more than 255 bytes", "r.yaml:4:1 output"),
        ),
    ],
)
def test_a_broken_rule_is_the_only_problem(tmp_path: Path, text: str, problem: Problem) -> None:
    assert problems(tmp_path, text) == [problem]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_the_keys_that_it_looks_at_and_no_others(tmp_path: Path, task: str) -> None:
    values = {
        "problem": "multi",
        "loss": {"weights": "balanced", "label_smoothing": 0.1},
        "data.separator": "|",
        "data.overlap": 8,
        "data.max_seconds": 3,
        "data.vocabulary": "rows",
        "data.language": "german",
        "data.classes": {"a": [1], "b": [2]},
        "data.augment": {"flip": 0.1, "crop": 0.1, "jitter": 0.1, "time_mask": 0.1, "noise": 0.1},
        "training": {"batch_tokens": 4096, "packing": True, "padding_free": True},
        "evaluation": {"threshold": 0.3, "generate": {"max_new_tokens": 3, "num_beams": 2, "answer": "(a)"}},
    }
    recipe: dict[str, Any] = {"task": task, "base": {"model": "m"}, "data": {"train": "a"}}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (recipe[section] if section else recipe)[name] = value
    refused = {p.where.split()[-1] for p in problems(tmp_path, yaml.safe_dump(recipe))}
    assert refused == frozenset().union(*(row.keys for row in TASKS.values())) - TASKS[task].keys


def test_batches_of_tokens_are_no_batches_of_rows_and_stay_so_when_written_out(tmp_path: Path) -> None:
    text = HEAD.replace("text-classification", "causal-lm") + "data: {train: a}\ntraining: {batch_tokens: 4096}\n"
    recipe = accepted(tmp_path, text)
    assert (recipe.training.batch_size, recipe.training.batch_tokens) == (None, 4096)
    assert accepted(tmp_path, dump_recipe(recipe)) == recipe


def test_a_task_that_resembles_none_is_answered_with_all(tmp_path: Path) -> None:
    text = HEAD.replace("text-classification", "juggling") + "data: {train: a}\n"
    assert [p.message for p in problems(tmp_path, text)] == [f"expected one of {', '.join(TASKS)}, found juggling"]


def test_every_broken_rule_is_reported_at_once(tmp_path: Path) -> None:
    text = HEAD + "data: {train: {}}\ntraining: {epochs: 1, steps: 5}\nevaluation: {metric: bleu}\n"
    assert [p.where for p in problems(tmp_path, text)] == [
        "r.yaml:3:8 data.train",
        "r.yaml:4:23 training.steps",
        "r.yaml:5:14 evaluation.metric",
    ]


def test_an_unknown_task_is_reported_beside_a_wrong_value(tmp_path: Path) -> None:
    text = HEAD.replace("text-", "txt-") + "data: {train: a}\nticks: {dim: x}\n"
    assert [p.where for p in problems(tmp_path, text)] == ["r.yaml:1:1 task", "r.yaml:4:9 ticks.dim"]


def test_a_hub_set_without_a_split_has_the_split_of_its_name(tmp_path: Path) -> None:
    recipe = accepted(tmp_path, HEAD + "data: {train: {hub: a}, validation: {hub: a}}\n")
    assert recipe.data.validation is not None


def test_fractions_that_leave_rows_are_accepted(tmp_path: Path) -> None:
    text = HEAD + "data: {train: a, validation: {fraction: 0.4}, test: {fraction: 0.4}}\n"
    assert accepted(tmp_path, text).data.train.path == "a"


def test_a_template_of_plain_names_is_accepted(tmp_path: Path) -> None:
    text = HEAD + "data: {train: a, columns: {text: '{my question}: {an-swer}', label: b}}\n"
    assert accepted(tmp_path, text).data.columns["text"] == "{my question}: {an-swer}"


def test_norms_alone_are_enough_to_train(tmp_path: Path) -> None:
    assert accepted(tmp_path, HEAD + "data: {train: a}\nticks: {dim: 0}\nhead: {train: false}\n").ticks.dim == 0


def test_a_metric_of_the_task_is_accepted(tmp_path: Path) -> None:
    text = HEAD.replace("text-classification", "causal-lm") + "data: {train: a}\nevaluation: {metric: perplexity}\n"
    assert accepted(tmp_path, text).evaluation.metric == "perplexity"


@pytest.mark.parametrize(
    ("task", "pattern", "message"),
    [
        ("causal-lm", '"####"', "expected a group, in parentheses, for the answer itself"),
        ("causal-lm", '"(a"', "this is no regular expression"),
        ("text-classification", '"(a)"', "text-classification makes no use of it, only causal-lm"),
    ],
)
def test_a_pattern_of_answers_that_cannot_be_used_is_refused(
    tmp_path: Path, task: str, pattern: str, message: str
) -> None:
    text = f"task: {task}\nbase: {{model: m}}\ndata: {{train: a}}\nevaluation: {{generate: {{answer: {pattern}}}}}\n"
    (problem,) = problems(tmp_path, text)
    assert message in problem.message
    assert "evaluation.generate.answer" in problem.where


def test_a_pattern_of_answers_is_kept(tmp_path: Path) -> None:
    text = "task: causal-lm\nbase: {model: m}\ndata: {train: a}\nevaluation: {generate: {answer: 'x(.)'}}\n"
    assert accepted(tmp_path, text).evaluation.generate.answer == "x(.)"
