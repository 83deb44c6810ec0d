"""Causal language modelling: windows, masks, cuts, conversations, loss and metrics."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from tests.models import word_tokenizer
from ticktune.errors import BaseModelError, DataError, RecipeError
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import IGNORED, EncodingReport, Example, Row, TaskOptions, build_task, restore_task, room

EOS, USER, ASSISTANT, SYSTEM = 3, 54, 55, 56
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w50', 'assistant': 'w51', 'system': 'w52'}[m.role] }} "
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
)


def ids(*words: int) -> list[int]:
    """Token ids of the words w0, w1, …"""
    return [4 + word for word in words]


def task_of(columns: tuple[str, ...], max_length: int = 16, tokenizer: Any = None) -> CausalLm:
    return CausalLm(TaskOptions(columns, max_length), tokenizer or word_tokenizer())


def chat_task(max_length: int = 32, template: str = TEMPLATE) -> CausalLm:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return task_of(("messages",), max_length, tokenizer)


def chat(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def encode(task: CausalLm, *rows: Row, labelled: bool = True) -> tuple[list[Example], EncodingReport]:
    report = EncodingReport()
    return task.encode(rows, 0, report, labelled=labelled), report


def tokenizer_with_ends() -> Any:
    """A tokenizer that puts <s> before and </s> after a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return tokenizer


# Plain text


def test_the_end_of_a_text_is_learned() -> None:
    (example,), _ = encode(task_of(("text",)), {"text": "w1 w2"})
    assert example == {"row": 0, "length": 3, "input_ids": [*ids(1, 2), EOS], "labels": [*ids(1, 2), EOS]}


def test_a_text_is_cut_into_windows_that_share_one_token_so_that_each_token_is_predicted_once() -> None:
    examples, report = encode(task_of(("text",), 4), {"text": "w0"}, {"text": "w1 w2 w3 w4 w5 w6"})
    assert [(e["row"], e["input_ids"]) for e in examples] == [
        (0, [*ids(0), EOS]),
        (1, ids(1, 2, 3, 4)),
        (1, [*ids(4, 5, 6), EOS]),
    ]
    assert report == EncodingReport(ends=2)


def test_the_end_token_is_predicted_even_when_the_windows_come_out_even() -> None:
    examples, _ = encode(task_of(("text",), 3), {"text": "w1 w2 w3"})
    assert [e["input_ids"] for e in examples] == [ids(1, 2, 3), [*ids(3), EOS]]


def test_an_empty_text_is_counted_as_unsupervised() -> None:
    examples, report = encode(task_of(("text",)), {"text": "w1"}, {"text": ""})
    assert [e["row"] for e in examples] == [0]
    assert report.unsupervised == [1]


def test_a_text_begins_with_the_token_that_the_tokenizer_puts_there_and_ends_once() -> None:
    (example,), _ = encode(task_of(("text",), tokenizer=tokenizer_with_ends()), {"text": "w1"})
    assert example["input_ids"] == [2, *ids(1), EOS]


def test_a_text_to_continue_has_no_end_and_no_labels() -> None:
    task = task_of(("text",), tokenizer=tokenizer_with_ends())
    (example,), _ = encode(task, {"text": "w1 w2"}, labelled=False)
    assert example == {"row": 0, "length": 3, "input_ids": [2, *ids(1, 2)]}


# Prompt and response


def test_the_prompt_carries_no_loss_and_the_end_does() -> None:
    (example,), _ = encode(task_of(("prompt", "response")), {"prompt": "w1 w2", "response": "w3"})
    assert example["input_ids"] == [*ids(1, 2, 3), EOS]
    assert example["labels"] == [IGNORED, IGNORED, *ids(3), EOS]


def test_the_response_gets_no_token_before_it() -> None:
    task = task_of(("prompt", "response"), tokenizer=tokenizer_with_ends())
    (example,), _ = encode(task, {"prompt": "w1", "response": "w3"})
    assert example["input_ids"] == [2, *ids(1, 3), EOS]


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    task = task_of(("prompt", "response"), 4)
    (example,), report = encode(task, {"prompt": "w1 w2 w3 w4", "response": "w5"})
    assert example["input_ids"] == [*ids(3, 4, 5), EOS]
    assert example["labels"] == [IGNORED, IGNORED, *ids(5), EOS]
    assert report == EncodingReport(truncated=[0], cut_ends=0, ends=1)


def test_a_response_that_is_too_long_loses_its_end_and_keeps_one_token_before() -> None:
    task = task_of(("prompt", "response"), 3)
    (example,), report = encode(task, {"prompt": "w1 w2", "response": "w3 w4 w5 w6"})
    assert example["input_ids"] == ids(2, 3, 4)
    assert example["labels"] == [IGNORED, *ids(3, 4)]
    assert report == EncodingReport(truncated=[0], cut_ends=1, ends=0)


def test_a_response_of_just_max_length_loses_its_end() -> None:
    task = task_of(("prompt", "response"), 3)
    (example,), report = encode(task, {"prompt": "w1", "response": "w3 w4"})
    assert example["input_ids"] == ids(1, 3, 4)
    assert report.cut_ends == 1


def test_a_long_response_to_an_empty_prompt_keeps_its_beginning() -> None:
    (example,), _ = encode(task_of(("prompt", "response"), 3), {"prompt": "", "response": "w3 w4 w5 w6"})
    assert example["input_ids"] == example["labels"] == ids(3, 4, 5)


def test_a_prompt_to_answer_keeps_its_end() -> None:
    task = task_of(("prompt",), 2)
    (example,), _ = encode(task, {"prompt": "w1 w2 w3"}, labelled=False)
    assert example == {"row": 0, "length": 2, "input_ids": ids(2, 3)}


# Conversations


def test_only_the_turns_of_the_assistant_are_learned_each_with_its_end() -> None:
    row = chat(("system", "w1"), ("user", "w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6"))
    (example,), _ = encode(chat_task(), row)
    assert example["input_ids"] == [
        *[SYSTEM, *ids(1), EOS, USER, *ids(2), EOS, ASSISTANT, *ids(3), EOS],
        *[USER, *ids(4), EOS, ASSISTANT, *ids(5, 6), EOS],
    ]
    learned = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
    assert learned == [7, 8, 13, 14, 15]
    assert all(example["labels"][i] == example["input_ids"][i] for i in learned)


def test_a_conversation_to_answer_ends_with_the_prompt_for_the_assistant() -> None:
    row = chat(("user", "w1"), ("assistant", "w2"))
    (example,), _ = encode(chat_task(), row, labelled=False)
    assert example["input_ids"] == [USER, *ids(1), EOS, ASSISTANT]


def test_a_conversation_that_is_too_long_loses_its_end() -> None:
    row = chat(("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    (example,), report = encode(chat_task(max_length=7), row)
    assert example["input_ids"] == [USER, *ids(1), EOS, ASSISTANT, *ids(2), EOS, USER]
    assert report == EncodingReport(truncated=[0], cut_ends=1, ends=1)


def test_a_conversation_without_an_assistant_is_counted_as_unsupervised() -> None:
    examples, report = encode(chat_task(), chat(("user", "w1")), chat(("user", "w1"), ("assistant", "w2")))
    assert [e["row"] for e in examples] == [1]
    assert report.unsupervised == [0]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = "w{{ messages | length }} " + TEMPLATE
    with pytest.raises(DataError, match="does not render a conversation as its beginning and a rest") as caught:
        encode(chat_task(template=template), chat(("user", "w1"), ("assistant", "w2")))
    assert caught.value.problems[0].fix == (
        "use prompt and response columns, or a tokenizer with a plain chat template"
    )


def test_a_template_that_refuses_a_conversation_says_why() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="chat template refuses a conversation: roles must alternate"):
        encode(chat_task(template=template), chat(("user", "w1"), ("assistant", "w2")))


def test_a_template_that_makes_an_endless_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ticktune.tasks.causal_lm._MAX_RENDERED", 1000)
    template = "{% for i in range(1000) %}w1 {% endfor %}"
    with pytest.raises(DataError, match="the chat template makes 3000 characters of one conversation"):
        encode(chat_task(template=template), chat(("user", "w1")), labelled=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "expected messages to be a list of {role, content}"),
        ([], "expected messages to be a list of {role, content}"),
        ([{"role": "user"}], "expected messages to be a list of {role, content}"),
        ([{"role": "user", "content": None}], "expected role and content to be text"),
        ([{"role": "user", "content": ["x"]}], "expected role and content to be text"),
    ],
)
def test_rows_that_are_no_conversation_are_refused(messages: Any, message: str) -> None:
    rows = [chat(("user", "w1")), {"messages": messages}]
    with pytest.raises(DataError) as caught:
        chat_task().check(rows, lambda i: f"a.jsonl:{i + 1}")
    assert str(caught.value) == f"a.jsonl:2: {message}"


def test_conversations_to_continue_are_refused_too() -> None:
    with pytest.raises(DataError, match="row 2: expected messages to be a list of {role, content}"):
        encode(chat_task(), chat(("user", "w1")), {"messages": "hi"}, labelled=False)


def test_rows_without_responses_are_refused_where_answers_are_looked_for() -> None:
    task = CausalLm(TaskOptions(("prompt", "response"), 16, answer="(w[0-9]+)"), word_tokenizer())
    with pytest.raises(DataError, match="a.jsonl:1: evaluation.generate.answer looks in responses to prompts"):
        task.check([{"text": "w1"}], lambda i: f"a.jsonl:{i + 1}")


# Building


def build(tokenizer: Any, columns: tuple[str, ...] = ("text",), max_length: int = 16, **config: Any) -> Any:
    options = TaskOptions(columns, max_length)
    return build_task("causal-lm", options, [], lambda i: "", tokenizer, SimpleNamespace(**config))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BaseModelError, match="its tokenizer has no end-of-text token"):
        build(tokenizer)


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template for the column messages"):
        build(word_tokenizer(), ("messages",))


def test_max_length_is_at_most_the_number_of_positions() -> None:
    assert build(word_tokenizer(), max_length=16, max_position_embeddings=16).options.max_length == 16
    with pytest.raises(DataError, match="max_length is 17, but the model has 16 positions") as caught:
        build(word_tokenizer(), max_length=17, max_position_embeddings=16)
    assert caught.value.problems[0].fix == "set data.max_length: 16"


def test_a_restored_task_is_the_same_task() -> None:
    task = build(word_tokenizer())
    assert restore_task("causal-lm", task.options, task.state(), task.tokenizer) == task


# Batches, loss, metrics

PAIRS = [
    {"prompt": "w1 w2 w3", "response": "w4"},
    {"prompt": "w5", "response": "w6 w7"},
    {"prompt": "w8", "response": ""},
]


def test_learning_pads_on_the_right_with_a_mask_and_without_loss() -> None:
    task = task_of(("prompt", "response"))
    batch = task.collate(encode(task, *PAIRS)[0])
    assert batch["input_ids"][2].tolist() == [*ids(8), EOS, 0, 0, 0]
    assert batch["attention_mask"][2].tolist() == [1, 1, 0, 0, 0]
    assert batch["labels"][2].tolist() == [IGNORED, EOS, IGNORED, IGNORED, IGNORED]


def test_generating_pads_on_the_left() -> None:
    task = task_of(("prompt",))
    batch = task.collate(encode(task, *PAIRS, labelled=False)[0])
    assert batch["input_ids"].tolist() == [ids(1, 2, 3), [0, 0, *ids(5)], [0, 0, *ids(8)]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert "labels" not in batch


def test_a_batch_weighs_its_learned_tokens() -> None:
    task = task_of(("prompt", "response"))
    assert task.weight(task.collate(encode(task, *PAIRS)[0])) == 2 + 3 + 1


def by_hand(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, int]:
    """Summed loss, hits and count of the learned tokens, each predicted from the position before."""
    loss, hits, count = 0.0, 0, 0
    for row in range(labels.shape[0]):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != IGNORED:
                loss -= log_softmax(logits[row, at - 1])[labels[row, at]]
                hits += int(logits[row, at - 1].argmax() == labels[row, at])
                count += 1
    return loss, hits, count


def test_the_loss_is_that_of_the_next_token_summed() -> None:
    task = task_of(("prompt", "response"))
    batch = task.collate(encode(task, *PAIRS)[0])
    logits = torch.randn(*batch["input_ids"].shape, 64)
    expected, _, _ = by_hand(logits.double().numpy(), batch["labels"].numpy())
    loss = task.loss(SimpleNamespace(logits=logits), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # float32 sums of six terms


def test_smoothed_labels_count_in_the_loss_and_not_in_the_metrics() -> None:
    smooth = CausalLm(TaskOptions(("prompt", "response"), 16, label_smoothing=0.2), word_tokenizer())
    batch = smooth.collate(encode(smooth, *PAIRS)[0])
    logits = torch.randn(*batch["input_ids"].shape, 64)
    plain, _, count = by_hand(logits.double().numpy(), batch["labels"].numpy())
    learned = (batch["labels"][:, 1:] != IGNORED).numpy()
    even = -log_softmax(logits[:, :-1].double().numpy()[learned], axis=-1).mean(-1).sum()
    loss = smooth.loss(SimpleNamespace(logits=logits), batch).item()
    assert loss == pytest.approx(0.8 * plain + 0.2 * even, rel=1e-6)
    metrics = smooth.metrics()
    smooth.update(metrics, logits, batch)
    assert float(metrics["loss"].compute()) == pytest.approx(plain / count, rel=1e-6)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    task = task_of(("prompt", "response"))
    batch = task.collate(encode(task, *PAIRS)[0])
    logits = torch.randn(*batch["input_ids"].shape, 64).bfloat16()
    expected, _, _ = by_hand(logits.double().numpy(), batch["labels"].numpy())
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == pytest.approx(expected, rel=1e-6)


def test_metrics_over_uneven_batches_are_those_of_all_learned_tokens() -> None:
    task = task_of(("prompt", "response"))
    rows = [{"prompt": "w1", "response": " ".join(f"w{i}" for i in range(2, 2 + n))} for n in range(7)]
    examples, _ = encode(task, *rows)
    metrics, loss, hits, count = task.metrics(), 0.0, 0, 0
    for part in (examples[:4], examples[4:]):
        batch = task.collate(part)
        logits = torch.randn(*batch["input_ids"].shape, 64)
        targets = torch.nn.functional.one_hot(batch["labels"].clamp(0).roll(-1, 1), 64)
        logits += 4 * targets * (torch.rand(*targets.shape[:2], 1) < 0.5)  # about half the answers are right
        task.update(metrics, logits, batch)
        more = by_hand(logits.double().numpy(), batch["labels"].numpy())
        loss, hits, count = loss + more[0], hits + more[1], count + more[2]
    assert 0 < hits < count == 7 + sum(range(7))
    found = {name: float(metric.compute()) for name, metric in metrics.items()}
    assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits / count, rel=1e-6)


def test_a_batch_without_learned_tokens_changes_no_metric() -> None:
    task = task_of(("prompt", "response"))
    batch = task.collate(encode(task, *PAIRS)[0])
    logits = torch.randn(*batch["input_ids"].shape, 64)
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    before = {name: float(metric.compute()) for name, metric in metrics.items()}
    task.update(metrics, logits, batch | {"labels": torch.full((3, 5), IGNORED)})
    assert {name: float(metric.compute()) for name, metric in metrics.items()} == before


def test_a_decision_is_the_best_token_and_its_lead() -> None:
    decisions, gaps = task_of(("text",)).decide(torch.tensor([[[1.0, 4.0, 2.5], [0.0, -1.0, -1.0]]]))
    assert decisions.tolist() == [[1, 0]]
    assert gaps.tolist() == [[1.5, 1.0]]


def test_a_prediction_is_the_continuation_alone() -> None:
    task = task_of(("prompt",))
    batch = task.collate(encode(task, *PAIRS, labelled=False)[0])
    asked: dict[str, Any] = {}

    def generate(**arguments: Any) -> torch.Tensor:
        asked.update(arguments)
        new = torch.tensor([[*ids(9), EOS, 0], [*ids(9, 10), EOS], [EOS, 0, 0]])
        return torch.cat([arguments["input_ids"], new], 1)

    answers = task.predict(SimpleNamespace(generate=generate), batch)  # type: ignore[arg-type]
    assert answers == [{"text": "w9"}, {"text": "w9 w10"}, {"text": ""}]
    assert (asked["max_new_tokens"], asked["num_beams"], asked["do_sample"]) == (128, 1, False)


# Answers

QUESTIONS = [{"prompt": f"w{i} w{i + 1}", "response": f"w40 w{i}"} for i in range(7)]
PATTERN = r"w40 (w\d+)"


def answering(**options: Any) -> CausalLm:
    return CausalLm(TaskOptions(("prompt", "response"), 16, answer=PATTERN, **options), word_tokenizer())


def test_prompts_are_continued_apart_from_their_responses() -> None:
    task = answering()
    rows = [{"prompt": "w1 w2 w3", "response": "w40 w9"}, {"prompt": "", "response": "w40 w8"}]
    batch = task.collate(encode(task, *rows)[0])
    assert batch["prompt_ids"].tolist() == [ids(1, 2, 3), [0, 0, 2]]  # nothing is continued from <s>
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["answers"] == ["w9", "w8"]
    assert batch["input_ids"][0].tolist() == [*ids(1, 2, 3, 40, 9), EOS]
    assert task.inputs(batch).keys() == {"input_ids", "attention_mask"}


class Parrot(torch.nn.Module):
    """Writes w40 and then the last word of the prompt minus one for even words, and no answer for odd ones."""

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **asked: Any) -> torch.Tensor:
        assert not asked["do_sample"]
        first = input_ids[:, -2:-1]
        marker = torch.where(first % 2 == 0, ids(40)[0], ids(41)[0])
        return torch.cat([input_ids, marker, first], 1)


def test_exact_match_counts_each_row_once_over_uneven_batches() -> None:
    task = answering()
    examples, _ = encode(task, *QUESTIONS)
    metrics = task.metrics()
    for part in (examples[:4], examples[4:]):
        task.update_by_generation(metrics, Parrot(), task.collate(part))
    assert float(metrics["exact_match"].compute()) == pytest.approx(4 / 7)  # w0, w2, w4, w6


def test_without_a_pattern_nothing_is_generated_and_there_is_no_such_metric() -> None:
    task = task_of(("prompt", "response"))
    batch = task.collate(encode(task, *QUESTIONS)[0])
    assert "prompt_ids" not in batch
    task.update_by_generation(task.metrics(), torch.nn.Module(), batch)
    assert "exact_match" not in task.metrics()
    assert "exact_match" in answering().metrics()


def test_a_prediction_has_the_text_and_the_answer_in_it() -> None:
    task = answering()
    examples, _ = encode(task, QUESTIONS[0], QUESTIONS[1], labelled=False)
    assert task.predict(Parrot(), task.collate(examples)) == [
        {"text": "w40 w0", "answer": "w0"},
        {"text": "w41 w1", "answer": None},
    ]


def test_a_response_without_an_answer_is_named() -> None:
    rows = [*QUESTIONS[:2], {"prompt": "w1", "response": "w2"}]
    with pytest.raises(DataError, match="expected a match of evaluation.generate.answer") as caught:
        answering().check(rows, lambda i: f"a.jsonl:{i + 1}")
    assert caught.value.problems[0].where == "a.jsonl:3"
    answering().check([{"prompt": "w1"}], lambda i: "")


def test_answers_need_prompts() -> None:
    options = TaskOptions(("text",), 16, answer=PATTERN)
    with pytest.raises(RecipeError, match="answers are looked for in responses to prompts, found the columns text"):
        build_task("causal-lm", options, [], lambda i: "", word_tokenizer(), SimpleNamespace())


@pytest.mark.parametrize(("asked", "used", "found"), [(128, 10, 54), (20, 10, 20), (1, 63, 1)])
def test_no_more_is_written_than_the_model_has_positions(asked: int, used: int, found: int) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    assert room(model, asked, used) == found
    assert room(SimpleNamespace(config=SimpleNamespace()), asked, used) == asked  # type: ignore[arg-type]


def test_a_prompt_that_takes_all_positions_is_refused() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    with pytest.raises(DataError, match="a prompt of 64 tokens takes all of the model's 64 positions"):
        room(model, 5, 64)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_model_of_few_positions_writes_up_to_its_last(family: str) -> None:
    """Their learned positions end there: one more is an index out of range."""
    import transformers

    common: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model: Any
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24, **common)
        )
    else:
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=24, decoder_start_token_id=2,
                forced_eos_token_id=None, **common,
            )
        )  # fmt: skip
    ids = torch.randint(4, 64, (2, 20))
    used = 20 if family == "gpt2" else 1
    written = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=room(model, 128, used)
    )
    assert written.shape[1] == 24
