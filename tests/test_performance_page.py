"""The page on performance says what the committed results say."""

import json
from pathlib import Path

import transformers

from benchmarks import accuracy, aims, attention, gpu_check, inference, loss, page, speed, tick_tax

ROOT = Path(__file__).parents[1]


def _page() -> str:
    return page.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_the_loss_are_made_of_the_committed_results() -> None:
    document = json.loads((ROOT / "benchmarks/results/loss.json").read_text(encoding="utf-8"))
    assert document["loss"]
    assert document["layouts"]
    assert loss.table(document) in (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_the_section_on_ticks_is_made_of_the_results() -> None:
    document = json.loads(tick_tax.RESULTS.read_text(encoding="utf-8"))
    assert document["shapes"].keys() == tick_tax.SHAPES.keys()
    assert page.page_with("tick_tax", tick_tax.section(document)) == _page()


def test_the_section_beside_other_tools_is_made_of_the_results() -> None:
    if not speed.RESULTS.exists():
        assert "\n".join(page.marks("speed")) in _page()
        return
    document = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
    assert document["cases"].keys() == speed.CASES.keys()
    assert page.page_with("speed", speed.section(document)) == _page()
    for name in speed.WITH_CURVES:
        drawn = (speed.IMAGES / speed.image_name(name)).read_text(encoding="utf-8")
        assert drawn == speed.curves(document["cases"][name])


def test_the_section_on_attention_is_made_of_the_results() -> None:
    document = json.loads(attention.RESULTS.read_text(encoding="utf-8"))
    shapes = [list(shape) for shape in attention.SHAPES]
    assert [entry["shape"] for entry in document["results"]] == shapes * len(attention.DTYPES) * len(attention.DROPOUT)
    assert page.page_with("attention", attention.section(document)) == _page()


def test_the_time_to_accuracy_is_made_of_the_results() -> None:
    if not accuracy.RESULTS.exists():
        assert "\n".join(page.marks("accuracy")) in _page()
        return
    document = json.loads(accuracy.RESULTS.read_text(encoding="utf-8"))
    assert {run["contender"] for run in document["runs"]} == accuracy.GRID.keys()
    assert page.page_with("accuracy", accuracy.section(document)) == _page()


def test_the_section_on_merged_models_is_made_of_the_results() -> None:
    document = json.loads(inference.RESULTS.read_text(encoding="utf-8"))
    assert document["shapes"].keys() == inference.SHAPES.keys()
    assert page.page_with("inference", inference.section(document)) == _page()


def test_a_merged_model_multiplies_by_its_wider_blocks_and_no_more() -> None:
    """Two FLOPs for each weight and token: two projections in BERT's block, three in Llama's."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    for kind, projections in ((transformers.BertConfig, 2), (transformers.LlamaConfig, 3)):
        config = kind(vocab_size=64, **sizes)
        ids = inference.batch_of(config, 2, 5)
        more = inference.counted(config, 64, ids) - inference.counted(config, 0, ids)
        assert more == 2 * 5 * 3 * projections * 2 * 32 * 64


def test_the_checks_on_a_gpu_are_told_from_the_results() -> None:
    document = json.loads(gpu_check.RESULTS.read_text(encoding="utf-8"))
    assert page.page_with("gpu check", gpu_check.table(document)) == _page()
    assert {(c["case"], c["precision"]) for c in document["checks"]} == {
        (case, precision) for case in gpu_check.CASES for precision in ("fp32", "bf16", "fp16")
    }


def test_the_aims_are_told_from_the_results() -> None:
    assert page.page_with("aims", aims.table(aims.aims())) == _page()
    assert page.page_with("gpu aims", aims.table(aims.gpu_aims())) == _page()
    assert any(not aim.reached for aim in aims.aims())  # it says so, and says it of something
