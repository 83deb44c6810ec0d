"""The model card of an adapter or a merged folder: every value from outside is escaped."""

import html
import math
from typing import Any

import yaml

from ticktune.console import clean

_CITATIONS = """\
The method is known as the parallel adapter (He et al. 2021, arXiv 2110.04366) and FL-Tuning (Liu et al. 2022,
arXiv 2206.15312), with LN-tuning (Qi et al. 2022, arXiv 2211.08682) for the norms.
"""


def adapter_card(facts: dict[str, Any]) -> str:
    """Returns README.md of an adapter folder.

    Args:
        facts: The adapter's facts as plain values.
    """
    usage = """\
```python
import ticktune
model = ticktune.load_adapter(base, "path/to/this/folder")
```
"""
    return _card(facts, "Ticks and norms for " + _code(facts["base"]["name"]), usage, "")


def merged_card(facts: dict[str, Any], verification: dict[str, Any]) -> str:
    """Returns README.md of a merged folder.

    Args:
        facts: The adapter's facts as plain values.
        verification: What the comparison of the merged folder with base and adapter found.
    """
    named = str(facts["model_class"])
    model_class = named if named.isidentifier() and named.isascii() and named != "None" else "AutoModel"
    usage = f"""\
A stock checkpoint: it opens with plain `transformers`, without ticktune.

```python
from transformers import {model_class}
model = {model_class}.from_pretrained("path/to/this/folder")
```
"""
    rows = "".join(f"| {_text(name)} | {_text(value)} |\n" for name, value in verification.items())
    check = f"\n## Merged equals base and adapter\n\n| | |\n|---|---|\n{rows}" if verification else ""
    return _card(facts, "Fine-tuned " + _code(facts["base"]["name"]), usage, check)


def _card(facts: dict[str, Any], title: str, usage: str, check: str) -> str:
    training, plan, task = facts.get("training") or {}, facts["plan"], facts.get("task") or {}
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["ticktune", "parallel-adapter"]}
    if "/" in facts["base"]["name"] and ":" not in facts["base"]["name"]:
        front["base_model"] = facts["base"]["name"]
    if task:
        front["pipeline_tag"] = {"causal-lm": "text-generation"}.get(task["name"], task["name"])
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n{usage}"]
    lines = [
        ("base", facts["base"]["name"]),
        ("base fingerprint", facts["base"]["fingerprint"]),
        ("ticks", f"{plan['form']}, dim {plan['dim']}, {sum(map(len, plan['layers'].values()))} layers"),
        ("norms trained", len(plan["norms"])),
        ("head tensors", len(plan["head"])),
    ]
    if task:
        lines.append(("task", task["name"]))
        if task.get("state", {}).get("labels"):
            lines.append(("labels", ", ".join(task["state"]["labels"])))
    lines += [(name, value) for name, value in training.items() if not isinstance(value, dict | list)]
    parts.append("\n| | |\n|---|---|\n" + "".join(f"| {_text(k)} | {_text(v)} |\n" for k, v in lines))
    metrics = training.get("metrics") or {}
    if metrics:
        split = _text(training.get("metrics_split", "validation"))
        parts.append(f"\n## Metrics ({split} rows)\n\n| metric | value |\n|---|---|\n")
        parts.append("".join(f"| {_text(name)} | {_figure(value)} |\n" for name, value in metrics.items()))
    parts.append(check)
    parts.append(f"\n## Method\n\n{_CITATIONS}")
    return "".join(parts)


def _text(value: object) -> str:
    text = html.escape(_line(value), quote=False)
    for character in "\\`*_{}[]()#+!|":
        text = text.replace(character, "\\" + character)
    return text


def _figure(value: object) -> str:
    # JSON holds what was not finite as null.
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else "\u2013"


def _code(value: object) -> str:
    return "`" + _line(value).replace("`", "'") + "`"


def _line(value: object) -> str:
    # What a terminal would obey is made visible: cards are read there too.
    return clean(" ".join(str(value).split()))
