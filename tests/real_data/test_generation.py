"""Written text on real data: translation, arithmetic."""

import os
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.real_data import cases
from tests.real_data.commands import assert_better, document, merged, predicted, stock, trained

TRANSLATE = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
sources = [json.loads(line)["en"] for line in sys.stdin]
for i in range(0, len(sources), 32):
    inputs = tokenizer(sources[i:i + 32], padding=True, truncation=True, max_length=48, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, num_beams=2, max_new_tokens=30, do_sample=False)
    for text in tokenizer.batch_decode(out, skip_special_tokens=True):
        print(json.dumps(text))
"""

CONTINUE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
for line in sys.stdin:
    inputs = tokenizer(json.loads(line)["question"] + "\\n", return_tensors="pt")
    out = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False,
                         pad_token_id=0)
    print(json.dumps(tokenizer.decode(out[0, inputs.input_ids.shape[1]:], skip_special_tokens=True)))
"""


def test_a_model_that_knows_both_languages_learns_to_translate(
    data_folder: Path, ticktune: Run, tmp_path: Path
) -> None:
    case = cases.translation(data_folder, tmp_path)
    trained(ticktune, case.path, [*case.ours(), "data.validation=null", "output=run"], tmp_path)
    ours = predicted(ticktune, "run", case.file(tmp_path), tmp_path)
    before = stock(TRANSLATE, tmp_path / "base", lines=case.rows)
    assert_better(case, [{"text": text} for text in before], ours)
    after = stock(TRANSLATE, merged(ticktune, case, "run", tmp_path), lines=case.rows)
    assert after == [answer["text"] for answer in ours]


def test_a_story_teller_learns_to_answer_and_is_judged_by_its_answers(ticktune: Run, tmp_path: Path) -> None:
    folder = os.environ.get("TICKTUNE_MODELS")
    if not folder:
        pytest.skip("TICKTUNE_MODELS is not set: it names the folder with stories260K-hf/")
    case = cases.arithmetic(Path(folder), tmp_path)
    trained(ticktune, case.path, [*case.ours(), "data.validation=null", "output=run"], tmp_path)
    ours = predicted(ticktune, "run", case.file(tmp_path), tmp_path)
    before = stock(CONTINUE, Path(folder) / "stories260K-hf", lines=case.rows)
    assert not any("legs" in text for text in before)
    assert_better(case, [{"answer": None} for _ in before], ours)
    metrics = document(ticktune("eval", "run", "--precision", "fp32", cwd=tmp_path))["metrics"]
    right = case.scores(ours)
    assert metrics["exact_match"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    after = stock(CONTINUE, merged(ticktune, case, "run", tmp_path), lines=case.rows)
    assert after == [answer["text"] for answer in ours]
