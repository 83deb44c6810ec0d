"""Says what is wrong with a config that transformers does not take: its own texts name neither entry nor remedy."""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from ticktune.errors import Problem

_MEND = "correct it in config.json, or get that file anew from where the model came from"
_TYPES = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false", "dict": "an object"}
_TYPES |= {"list": "a list", "tuple": "a list", "NoneType": "null"}
_EXPECTED = re.compile(r"expected (\w+)(?:, got|\s|$)")
# Zero or less in no model that can be built; of other sizes and counts, zero often means that there is no such part.
_SIZE = re.compile(
    r"(hidden_size|d_model|n_embd|d_ff|d_kv|n_head|head_dim|(num|n)_(\w+_)?heads|vocab_size|intermediate_size"
    r"|patch_size|image_size|max_position_embeddings|n_positions|num_hidden_layers|num_layers|n_layer)"
)
_MAPPINGS = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "PRETRAINING")


def config_problem(entries: dict[str, Any], error: Exception, where: str) -> Problem:
    """What is wrong with the entries of a config.json of which transformers makes no config.

    Args:
        entries: What the file holds.
        error: What transformers said.
        where: The file.
    """
    found = _missing_package(error) or _unknown_type(entries, str(error)) or _wrong_type(entries, error)
    found = found or _wrong_dtype(entries)
    return _problem(found or (f"its config cannot be used: {_said(error)}", _MEND), where)


def model_problem(name: str, config: Any, error: Exception, where: str) -> Problem:
    """What is wrong with a config of which transformers builds no model.

    Args:
        name: The class that was to be built.
        config: The config.
        error: What transformers said.
        where: The file.
    """
    found = _missing_package(error) or _no_auto_class(name, config, error) or _other_family(name, config)
    found = found or _wrong_value(config, str(error))
    if found is None:
        in_class = 'name the class of the model in config.json ("architectures"), or ' if name[:4] == "Auto" else ""
        found = f"transformers builds no {name} of its config ({_said(error)})", in_class + _MEND
    return _problem(found, where)


def class_of(entries: Any, where: str) -> str | Problem | None:
    """The class that a config names in ``architectures``, None where it names none, or what is wrong with the entry.

    Args:
        entries: The value of ``architectures``.
        where: The file.
    """
    if entries is None or entries == []:
        return None
    if isinstance(entries, list) and all(isinstance(entry, str) and entry for entry in entries):
        return str(entries[0])
    return Problem(
        f'architectures is {_short(entries)}, expected a list of names of classes, such as ["BertModel"]', where, _MEND
    )


def _problem(found: tuple[str, str], where: str) -> Problem:
    return Problem(found[0], where, found[1])


def _said(error: Exception) -> str:
    """What an error says in a line, with its kind, as many say no more than a name."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)  # as it stands in the file
    return text if len(text) <= 60 else f"{text[:60]}..."


def _missing_package(error: Exception) -> tuple[str, str] | None:
    if not isinstance(error, ImportError):
        return None
    needed = _said(error).partition(". ")[0]
    return f"its family needs a package that is not installed ({needed})", "install that package"


def _unknown_type(entries: dict[str, Any], said: str) -> tuple[str, str] | None:
    import transformers

    if "model_type" not in entries:
        return (
            "its config has no model_type, the entry that says of what family the model is",
            'add it to config.json, for example "model_type": "bert"',
        )
    known = list(transformers.CONFIG_MAPPING)
    for path, value in _model_types(entries):
        # Only the outermost must be one of these; of the others, the one that was complained about.
        if value in known or (path != "model_type" and str(value) not in said):
            continue
        near = difflib.get_close_matches(str(value), known, 1, cutoff=0.75)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return (
            f"its config says {path} {_short(value)}, which is no family that transformers {transformers.__version__} "
            "knows",
            f"correct it in config.json{meant}, or install a transformers that knows it; a model that brings code of "
            "its own is not supported",
        )
    return None


def _model_types(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if key == "model_type":
            yield f"{prefix}model_type", value
        elif isinstance(value, dict):
            yield from _model_types(value, f"{prefix}{key}.")


def _wrong_type(entries: dict[str, Any], error: Exception) -> tuple[str, str] | None:
    field = re.search(r"error for field '(\w+)'", str(error))
    if field is None:
        return None
    names = dict.fromkeys(_EXPECTED.findall(str(error)))
    expected = [_TYPES.get(name, "") for name in names]
    wanted = " or ".join(dict.fromkeys(text for text in expected if text))
    found = [(path, value) for path, value in _named(entries, field[1]) if repr(value) in str(error)]
    path, value = found[0] if found else (field[1], entries.get(field[1]))
    detail = f"expected {wanted}" if wanted else f"which it cannot be ({_last_line(error)})"
    return f"its config says {path} {_short(value)}, {detail}", _MEND


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()[:200]


def _named(entries: dict[str, Any], name: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if key == name:
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _named(value, name, f"{prefix}{key}.")


def _wrong_dtype(entries: dict[str, Any]) -> tuple[str, str] | None:
    import torch

    for key in ("dtype", "torch_dtype"):
        value = entries.get(key)
        name = str(value).removeprefix("torch.")
        if value is not None and not isinstance(getattr(torch, name, None), torch.dtype):
            return f"its config says {key} {_short(value)}, expected float32, bfloat16 or float16", _MEND
    return None


def _no_auto_class(name: str, config: Any, error: Exception) -> tuple[str, str] | None:
    if not name.startswith("Auto") or "Unrecognized configuration class" not in str(error):
        return None
    from transformers.models.auto import modeling_auto as auto

    mappings = (getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}) for kind in _MAPPINGS)
    classes = (mapping.get(config.model_type) for mapping in mappings)
    cls = next((found for found in classes if isinstance(found, str)), None)
    fix = f'add the class to config.json: "architectures": ["{cls}"]' if cls else "choose another base"
    return (
        f"its config names no class (architectures), and transformers has no {name} of the family {config.model_type}",
        fix,
    )


def _other_family(name: str, config: Any) -> tuple[str, str] | None:
    import transformers

    own = getattr(getattr(transformers, name, None), "config_class", None)
    family = getattr(own, "model_type", None)
    if own is None or isinstance(config, own) or family == config.model_type:
        return None
    return (
        f"its config names the class {name} (architectures), which is a {family}, and says model_type "
        f"{_short(config.model_type)}",
        "correct that one of the two in config.json that is wrong",
    )


def _wrong_value(config: Any, said: str) -> tuple[str, str] | None:
    from transformers.activations import ACT2FN

    for path, value in _values(config):
        name = path.rpartition(".")[2]
        if type(value) is int and value < 1 and _SIZE.fullmatch(name):
            return f"its config says {path} {value}, expected 1 or more", _MEND
        is_activation = re.search(r"(act|activation|act_fn|activation_function)$", name) is not None
        if isinstance(value, str) and is_activation and value not in ACT2FN and value in said:
            near = difflib.get_close_matches(value, list(ACT2FN), 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            return f"its config says {path} {_short(value)}, which is no activation of transformers{meant}", _MEND
    return None


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _values(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            yield f"{prefix}{key}", value
