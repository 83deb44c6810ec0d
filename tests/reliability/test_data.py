"""What is wrong with rows is named by file and line, or counted; nothing of it is trained on in silence."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.launch import Launched
from tests.reliability.catalogue import case
from tests.reliability.faults import plan
from tests.reliability.recipes import (
    CHAT,
    classifier,
    done_well,
    files,
    jsonl,
    labelled,
    record,
    refused,
    tokenizer_base,
    weights,
    writer,
)


def evaluated(ticktune: Run, folder: Path, *words: object) -> Any:
    done = ticktune("--json", "eval", *words, cwd=folder)
    done_well(done)
    return json.loads(done.stdout)


@case("D1")
def test_a_column_that_is_not_there(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    words = ["data.columns={text: txet, label: label}", "base.model=./not-looked-for"]
    done = ticktune("train", recipe, *words, cwd=tmp_path)
    error = refused(done, 4, "train.jsonl:1", "recipe.yaml:", "no column txet", "found text, label")
    assert "did you mean text?" in error
    assert not (tmp_path / "run/run.json").exists()


def conversations(silent: int, count: int = 40) -> list[dict[str, Any]]:
    """The assistant's turn of the first ones lies behind data.max_length."""
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(["w1"] * (16 if i < silent else 1 + i % 3))},
                {"role": "assistant", "content": f"w{i % 40}"},
            ]
        }
        for i in range(count)
    ]


@case("D2")
def test_rows_without_anything_to_learn(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    base = tokenizer_base(tmp_path, tiny_llama, chat_template=CHAT)
    recipe = writer(tmp_path, base, conversations(2), training={"batch_size": 2})
    said = done_well(
        ticktune("train", recipe, cwd=tmp_path),
        "train: 2 of 40 rows (5.0 %) have nothing to learn from after cutting to data.max_length = 16 tokens",
        "train.jsonl:1, ",
        "train.jsonl:2",
    )
    assert "train.jsonl:3" not in said
    found = record(tmp_path / "run")
    assert found["steps"] == 19  # 38 rows, two in a step
    assert found["rows_report"]["train"]["unsupervised"] == 2
    for silent, share in ((3, "8 %"), (40, "100 %")):
        jsonl(tmp_path / "train.jsonl", conversations(silent))
        done = ticktune("train", recipe, "output=other", cwd=tmp_path)
        refused(done, 4, f"{silent} of 40 rows ({share})", "train.jsonl:1, ", "raise data.max_length")
        assert not (tmp_path / "other/run.json").exists()


def prompts(lengths: list[int]) -> list[dict[str, str]]:
    return [{"prompt": f"w1 w{i}", "response": " ".join(["w7"] * n)} for i, n in enumerate(lengths)]


@case("D3", "D12")
def test_the_end_token_is_learned_where_it_pads_too(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    base = tokenizer_base(tmp_path, tiny_llama, pad_token="</s>")
    recipe = writer(tmp_path, base, prompts([5, 2, 6]), data={"max_length": 8})
    shown = json.loads(done_json(ticktune("--json", "inspect", recipe, cwd=tmp_path)))
    assert shown["example"] == [
        {"kind": "context", "text": "w1 w0"},
        {"kind": "learned", "text": " ".join(["w7"] * 5) + " </s>"},
    ]
    # The third row is one token too long, and loses the beginning of its prompt.
    done_well(ticktune("train", recipe, cwd=tmp_path), "1 of 3 rows (33.3 %) are longer than data.max_length = 8")
    losses = {}
    for rows in ([5], [2], [5, 2]):
        name = jsonl(tmp_path / "few.jsonl", [row for row in prompts([5, 2]) if row["response"].count("w7") in rows])
        losses[tuple(rows)] = evaluated(ticktune, tmp_path, "run", "--data", name)["metrics"]["loss"]
    # Six and three learned tokens, the end among them, whether or not the shorter one is padded.
    assert losses[5, 2] == pytest.approx((6 * losses[5,] + 3 * losses[2,]) / 9, rel=1e-6)
    jsonl(tmp_path / "train.jsonl", prompts([9, 12]))
    done = ticktune("train", recipe, "output=endless", cwd=tmp_path)
    refused(done, 4, "no row shows the model where to stop", "raise data.max_length", "train.jsonl")


@case("D3")
def test_a_template_without_an_end_is_refused(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    base = tokenizer_base(tmp_path, tiny_llama, chat_template=CHAT.replace(" </s>", ""))
    done = ticktune("train", writer(tmp_path, base, conversations(0)), cwd=tmp_path)
    refused(done, 4, "no row shows the model where to stop", "chat template", "prompt and response")


BAD_LINES = {
    '{"text": "w1", "label"': "this is not JSON",
    '["w1", "small"]': "expected an object",
    '{"text": "w1"}': "the column label is missing",
    '{"text": null, "label": "small"}': "expected text in the column text, found nothing",
    '{"text": ["w1"], "label": "small"}': "expected text in the column text",
    '{"text": "w1", "label": NaN}': "NaN is not a JSON number",
    '{"text": "w1", "text": "w2", "label": "small"}': "the key 'text' stands twice",
    '{"text": "w1", "label": null}': "expected a label, found None",
    '{"text": "w1", "label": 5}': "values of several kinds: 5 here, 'small' in line 1",
}


@pytest.mark.parametrize("line", BAD_LINES)
@case("D4")
def test_a_broken_row_is_named(tmp_path: Path, tiny_bert: Path, ticktune: Run, line: str) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    path = tmp_path / "train.jsonl"
    good = path.read_text().splitlines()
    path.write_text("\n".join([*good[:6], line, *good[6:]]) + "\n")
    done = ticktune("train", recipe, cwd=tmp_path)
    refused(done, 4, "train.jsonl:7", BAD_LINES[line])
    assert not (tmp_path / "run/run.json").exists()


@case("D4", "D7")
def test_broken_rows_are_skipped_and_counted(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    done_well(ticktune("train", recipe, "output=clean", cwd=tmp_path))
    path = tmp_path / "train.jsonl"
    good, bad = path.read_text().splitlines(), list(BAD_LINES)
    path.write_text("\n".join([good[0], *bad[:4], *good[1:20], *bad[4:], *good[20:]]) + "\n")
    (tmp_path / "validation.jsonl").write_text(
        '{"text": "w1", "label": "medium"}\n' + (tmp_path / "validation.jsonl").read_text()
    )
    words = ["train", recipe, "data.on_bad_row=skip"]
    said = done_well(
        ticktune(*words, cwd=tmp_path),
        "train: 9 of 33 rows (27.3 %) cannot be used, left out: ",
        "train.jsonl:2: this is not JSON",
        "validation: 1 of 11 rows (9.1 %) cannot be used",
        "validation.jsonl:1: 1 label does not occur in the training rows: 'medium'",
    )
    assert said.count("cannot be used") == 2
    found = record(tmp_path / "run")
    assert {name: counts["left_out"] for name, counts in found["rows_report"].items()} == {"train": 9, "validation": 1}
    assert found["rows"] == {"train": 24, "validation": 10}
    assert weights(tmp_path / "run") == weights(tmp_path / "clean")
    assert evaluated(ticktune, tmp_path, "run")["rows"] == 10
    done = ticktune(*words, "data.max_bad_rows=8", "output=other", cwd=tmp_path)
    refused(done, 4, "9 rows cannot be used, data.max_bad_rows allows 8", "train.jsonl:")
    path.write_text("\n".join(bad) + "\n")
    refused(ticktune(*words, "output=other", cwd=tmp_path), 4, "train.jsonl:")
    assert not (tmp_path / "other/run.json").exists()


def layouts(rows: list[dict[str, str]]) -> dict[str, tuple[str, bytes, int]]:
    """Kind -> name of the file, the same rows in it, and the line that comes after them."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    clean = "\n".join(lines).encode() + b"\n"
    cells = "text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in rows)
    after = len(rows) + 1
    return {
        "clean": ("rows.jsonl", clean, after),
        "bom": ("rows.jsonl", b"\xef\xbb\xbf" + clean, after),
        "crlf": ("rows.jsonl", clean.replace(b"\n", b"\r\n"), after),
        "blank lines": ("rows.jsonl", b"\n\n" + clean.replace(b"\n", b"\n  \n"), 2 * len(rows) + 3),
        "escaped": ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode(), after),
        "csv": ("rows.csv", cells.encode(), cells.count("\n") + 1),
    }


@case("D5")
def test_bytes_around_the_rows_change_nothing(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    rows = labelled(10)
    rows[3]["text"] = "w1\u2028w2\u0085w3"
    rows[5]["text"] = "w4\nw5"
    recipe = classifier(tmp_path, tiny_bert)
    found = {}
    for kind, (name, content, after) in layouts(rows).items():
        (tmp_path / name).write_bytes(content.rstrip(b"\n") if kind == "clean" else content)  # without a last line end
        words = ["train", recipe, f"data.train={name}", f"output={kind}"]
        done_well(ticktune(*words, cwd=tmp_path))
        found[kind] = weights(tmp_path / kind)
        broken = b'"w1\n' if name.endswith("csv") else b"{\n"
        (tmp_path / name).write_bytes(content + broken)
        refused(ticktune(*words, "output=broken", cwd=tmp_path), 4, f"{name}:{after}")
    assert len(found) == 6
    assert set(found.values()) == {found["clean"]}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "deep": (
        b"[" * 100_000 + b"\n",
        "train.jsonl:25 (",
    ),
    "not UTF-8": (b'{"text": "w1 \xe9", "label": "small"}\n', "byte 1221 is not UTF-8"),
    "surrogate": (b'{"text": "w1 \\ud800", "label": "small"}\n', "half of a surrogate pair"),
    "NUL": (b'{"text": "w1 \x00", "label": "small"}\n', "is NUL: not a text file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@case("D6")
def test_hostile_bytes(tmp_path: Path, tiny_bert: Path, ticktune: Run, kind: str) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    content, said = HOSTILE[kind]
    path = tmp_path / "train.jsonl"
    place = len(path.read_bytes()) + 13
    path.write_bytes(path.read_bytes() + content)
    refused(ticktune("train", recipe, cwd=tmp_path), 4, "train.jsonl:25", said.replace("1221", str(place)))


@case("D6")
def test_a_huge_line_is_refused_in_bounded_memory(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    with (tmp_path / "train.jsonl").open("ab") as file:
        file.write(b'{"text": "')
        file.truncate(300 << 20)  # sparse
    done = ticktune("train", recipe, cwd=tmp_path, env=plan(f"memory={250 << 20}"))
    refused(done, 4, "train.jsonl:25", "longer than 64 MiB")


@case("D7")
def test_no_rows_and_few_rows(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    for content in ("", "\n \n"):
        (tmp_path / "train.jsonl").write_text(content)
        refused(ticktune("train", recipe, cwd=tmp_path), 4, "train.jsonl", "there are no rows")
    jsonl(tmp_path / "train.jsonl", labelled(2))
    done_well(ticktune("train", recipe, "training.batch_size=32", cwd=tmp_path))
    assert record(tmp_path / "run")["steps"] == 1


@case("D8")
def test_training_rows_are_no_evaluation(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert, data={"test": "train.jsonl"})
    refused(ticktune("train", recipe, cwd=tmp_path), 2, "data.test: these are the training rows")
    recipe = classifier(tmp_path, tiny_bert)
    shutil.copyfile(tmp_path / "train.jsonl", tmp_path / "copy.jsonl")
    (tmp_path / "link.jsonl").symlink_to("train.jsonl")
    for name in ("./train.jsonl", "copy.jsonl", "link.jsonl"):
        done = ticktune("train", recipe, f"data.validation={name}", cwd=tmp_path)
        refused(done, 4, "data.validation", "these are the training rows", "allow_training_rows: true")
    jsonl(tmp_path / "some.jsonl", [*labelled(3), *labelled(9, start=600)])
    said = "3 of the 12 validation rows (25.0 %) are training rows too"
    done_well(ticktune("train", recipe, "data.validation=some.jsonl", cwd=tmp_path), said)
    assert record(tmp_path / "run")["rows_report"]["validation"]["training"] == 3
    words = ["eval", "run", "--data", "train.jsonl"]
    refused(ticktune(*words, cwd=tmp_path), 4, "these are the training rows", "--split train")
    assert evaluated(ticktune, tmp_path, *words[1:], "--split", "train")["rows"] == 24
    words = ["data.validation=train.jsonl", "data.allow_training_rows=true", "output=allowed"]
    done_well(ticktune("train", recipe, *words, cwd=tmp_path), "24 of the 24 validation rows (100.0 %)")


@case("D9")
def test_labels_of_other_rows(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    with (tmp_path / "validation.jsonl").open("a") as file:
        file.write('{"text": "w1", "label": "medium"}\n')
    refused(ticktune("train", recipe, cwd=tmp_path), 4, "validation.jsonl:11", "'medium'", "have: large, small")
    numbers = {"small": 1, "large": 2}
    jsonl(tmp_path / "train.jsonl", [{**row, "label": numbers[row["label"]]} for row in labelled(24)])
    texts = [{**row, "label": f"{numbers[row['label']]} "} for row in labelled(10, start=500)]
    jsonl(tmp_path / "validation.jsonl", texts)
    done_well(ticktune("train", recipe, cwd=tmp_path))
    answer = json.loads(done_json(ticktune("--json", "predict", "run", "w1 w2", cwd=tmp_path)))
    assert sorted(answer["probabilities"]) == ["1", "2"]
    jsonl(tmp_path / "train.jsonl", [{**row, "label": "small"} for row in labelled(24)])
    refused(ticktune("train", recipe, "output=one", cwd=tmp_path), 4, "all rows have the same label, small")


def done_json(done: Any) -> str:
    done_well(done)
    return str(done.stdout)


@case("D10")
def test_long_texts_are_counted(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    rows = labelled(24)
    rows[4]["text"] += " w1" * 30
    recipe = classifier(tmp_path, tiny_bert, rows)
    said = "train: 1 of 24 rows (4.2 %) are longer than data.max_length = 16 tokens and lost their end: "
    done_well(ticktune("train", recipe, cwd=tmp_path), said, "train.jsonl:5")
    assert record(tmp_path / "run")["rows_report"]["train"]["cut"] == 1
    shown = json.loads(done_json(ticktune("--json", "inspect", recipe, cwd=tmp_path)))
    assert shown["example"][0]["text"] == f"{rows[0]['text']}"


@case("D11")
def test_prompts_are_the_same_in_training_and_prediction(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    from ticktune.folder import find_target
    from ticktune.prepare import load_target
    from ticktune.tasks.task import EncodingReport

    base = tokenizer_base(tmp_path, tiny_llama, chat_template=CHAT)
    recipe = writer(tmp_path, base, conversations(0))
    done_well(ticktune("train", recipe, cwd=tmp_path))
    task = load_target(find_target(str(tmp_path / "run"))).task
    row = conversations(0)[1]
    [trained] = task.encode([row], 0, EncodingReport(), labelled=True)
    [asked] = task.encode([row], 0, EncodingReport(), labelled=False)
    begin = asked["input_ids"]
    assert trained["input_ids"][: len(begin)] == begin
    assert begin.count(task.tokenizer.bos_token_id) == 1
    assert all(label == -100 for label in trained["labels"][: len(begin)])
    assert trained["labels"][len(begin)] != -100
    done = ticktune("train", recipe, f"base.model={tiny_llama}", "output=other", cwd=tmp_path)
    refused(done, 4, "no chat template", "prompt and response")


@case("D12")
def test_neighbours_do_not_change_a_row(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    recipe = classifier(tmp_path, tiny_bert)
    done_well(ticktune("train", recipe, cwd=tmp_path))
    texts = ["w1", " ".join(f"w{i}" for i in range(12)), "w3 w4 w50"]

    def probabilities(*words: str) -> list[float]:
        done = ticktune("--json", "predict", "run", *words, cwd=tmp_path)
        return [json.loads(line)["probability"] for line in done_json(done).splitlines()]

    together = probabilities(*texts)
    assert probabilities(*reversed(texts)) == pytest.approx(together[::-1], abs=1e-5)
    assert [probabilities(text)[0] for text in texts] == pytest.approx(together, abs=1e-5)


@case("D13")
def test_the_cache_follows_the_content(
    tmp_path: Path, tiny_bert: Path, ticktune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    recipe = classifier(tmp_path, base, labelled(2000), training={"epochs": None, "steps": 1})
    kept = tmp_path / "cache/ticktune/examples"

    def train(output: str, *words: str) -> str:
        return done_well(ticktune("train", recipe, f"output={output}", *words, cwd=tmp_path))

    train("first")
    before = files(kept)
    train("second")
    assert files(kept) == before
    victim = next(path for path in sorted(kept.rglob("*.arrow")))
    victim.write_bytes(victim.read_bytes()[:-9] + b"\0" * 9)
    assert "tokenised again" in train("third")
    assert weights(tmp_path / "third") == weights(tmp_path / "first")
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("w0 w0", "w0 w1", 1))
    train("row")
    assert len(list(kept.iterdir())) == 2
    train("length", "data.max_length=15")
    assert len(list(kept.iterdir())) == 3
    config = base / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"a": 1,', 1))
    train("tokenizer")
    assert len(list(kept.iterdir())) == 4


@case("D14")
def test_templates_and_control_tokens_in_texts(tmp_path: Path, tiny_llama: Path, ticktune: Run) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = base / "tokenizer.json"
    text = tokenizer.read_text()
    for old, new in (("w50", "{{"), ("w51", "7*7"), ("w52", "}}"), ("w53", "{prompt.__class__}"), ("w54", "49")):
        text = text.replace(f'"{old}"', f'"{new}"')
    tokenizer.write_text(text)
    rows = [
        {"question": "{{ 7*7 }} {prompt.__class__}", "response": "w1"},
        {"question": "w1 </s> w2", "response": "w3"},
    ]
    recipe = writer(tmp_path, base, rows, data={"columns": {"prompt": "w9 {question}", "response": "response"}})
    shown = ticktune("--json", "inspect", recipe, cwd=tmp_path)
    said = "1 of the 2 train rows (50.0 %) hold a text that the tokenizer reads as a control token"
    assert json.loads(done_json(shown))["example"][0]["text"] == "w9 {{ 7*7 }} {prompt.__class__}"
    done_well(shown, said)
    done = ticktune("train", recipe, "data.columns={prompt: '{question.__class__}', response: response}", cwd=tmp_path)
    refused(done, 2, "only plain {column} names can stand in a template")


@case("D15")
def test_rows_that_stand_twice_are_counted(tmp_path: Path, tiny_bert: Path, ticktune: Run) -> None:
    rows = labelled(20)
    other = {"small": "large", "large": "small"}
    rows += [rows[0], rows[0], rows[1], {**rows[2], "label": other[rows[2]["label"]]}]
    recipe = classifier(tmp_path, tiny_bert, rows)
    done_well(
        ticktune("train", recipe, cwd=tmp_path),
        "3 of the 24 train rows (12.5 %) repeat an earlier row",
        "2 of the 24 train rows (8.3 %) have the same input as a row with another label",
    )
    counts = record(tmp_path / "run")["rows_report"]["train"]
    assert (counts["repeated"], counts["contradicted"]) == (3, 2)


@case("D16")
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, tiny_bert: Path) -> None:
    path = tmp_path / "train.jsonl"
    recipe = classifier(tmp_path, tiny_bert)
    with path.open("a") as file:
        for i in range(60_000):
            file.write(json.dumps({"text": f"w{i % 60} {'w1 ' * 40}", "label": "small"}) + "\n")
    with Launched(["train", str(recipe)], tmp_path) as process:
        deadline = time.monotonic() + 60
        while not is_open(process.pid, path):
            assert process.poll() is None, process.text(2)
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGSTOP)
        assert is_open(process.pid, path)
        with path.open("r+b") as file:  # what was read already
            file.write(path.read_bytes()[:60].replace(b"w0", b"w9"))
        process.send_signal(signal.SIGCONT)
        refused(process.completed(120), 4, "train.jsonl", "the file changed while it was read")
    assert not (tmp_path / "run/run.json").exists()


def is_open(pid: int, path: Path) -> bool:
    """Whether a process has the file open, and has read some of it."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link) == str(path):
                position = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().split()[1]
                return 0 < int(position) < path.stat().st_size
    except OSError:
        pass
    return False
