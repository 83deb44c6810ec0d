"""The base: Hub id, directory or package:NAME -> a pretrained model and its tokenizer; fingerprint; safety checks."""

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ticktune.device import DTYPES, is_out_of_memory
from ticktune.diagnosis import class_of, config_problem, model_problem
from ticktune.errors import BaseModelError, Problem, ResourceError, first_line
from ticktune.files import input_path, sha256_json
from ticktune.quantize import check_package, is_coded, plain_parts
from ticktune.versions import require
from ticktune.weights import weights_header

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
# Config entries that name this run's file layout or the writer's version, not the function.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class BaseFiles:
    """Where a base's files lie.

    Args:
        name: What the recipe calls it.
        directory: The folder with config.json and the safetensors.
        commit: The Hub commit, or None.
    """

    name: str
    directory: Path
    commit: str | None = None

    @property
    def public_name(self) -> str:
        """The name without folders of this machine, for files that may be shared."""
        is_named = self.commit is not None or self.name.startswith("package:")
        return self.name if is_named else self.directory.resolve().name

    @property
    def config_name(self) -> str:
        """Where its config.json is, for messages."""
        return f"config.json of {self.name}" if self.commit is not None else str(self.directory / "config.json")


def quiet_transformers() -> None:
    """Turns off the progress bars and load reports of transformers and the Hub client in this process."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    # Where torchao is installed, transformers imports it with the first model, and that import logs which of its
    # CUDA kernels a CPU lacks.
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def locate_base(model: str, *, revision: str | None = None, relative_to: Path = Path()) -> BaseFiles:
    """Finds a base's files; downloads them when it is a Hub id.

    Args:
        model: ``package:NAME``, a directory, or a Hub id.
        revision: Hub commit, tag or branch.
        relative_to: Directory that a relative path starts from.

    Raises:
        BaseModelError: It is not there, or has no safetensors weights.
    """
    base = _locate(model, revision, relative_to, _HUB_FILES)
    _check_files(model, base.directory)
    return base


def locate_config(model: str, *, revision: str | None = None, relative_to: Path = Path()) -> BaseFiles:
    """Finds a base of which the config is enough; downloads nothing else.

    Args:
        model: ``package:NAME``, a directory with config.json, or a Hub id.
        revision: Hub commit, tag or branch.
        relative_to: Directory that a relative path starts from.

    Raises:
        BaseModelError: It is not there.
    """
    base = _locate(model, revision, relative_to, ("config.json",))
    _check_config(model, base.directory)
    return base


def _locate(model: str, revision: str | None, relative_to: Path, files: tuple[str, ...]) -> BaseFiles:
    if model.startswith("package:"):
        return BaseFiles(model, _package_directory(model.removeprefix("package:")))
    path = input_path(model, relative_to)
    if os.path.isdir(path):  # unlike Path.is_dir, it takes any text
        return BaseFiles(model, path)
    if os.path.isfile(path):
        raise BaseModelError(
            "it is a file, expected the directory that holds the model",
            where=f"base.model {model}",
            fix=f"name {Path(model).parent}",
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise BaseModelError(
            "there is no such directory",
            where=f"base.model {model}",
            fix="name a directory that is there, a package (package:NAME), or a model of the Hub (owner/name)",
        )
    directory = _download(model, revision, files)
    return BaseFiles(model, directory, directory.name)


def load_config(base: BaseFiles) -> Any:
    """Returns the transformers config of a base.

    Raises:
        BaseModelError: It is damaged, unknown, or asks for code of its own.
    """
    from transformers import AutoConfig

    entries = _read_config(base)
    if "auto_map" in entries and "model_type" not in entries:
        raise BaseModelError(
            "this model needs code of its own (auto_map in its config), which is never run",
            where=f"base.model {base.name}",
            fix="choose a model whose family transformers itself has",
        )
    try:
        return AutoConfig.from_pretrained(base.directory, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config meets in transformers' own checks
        raise BaseModelError([config_problem(entries, error, base.config_name)]) from error


def code_not_run(base: BaseFiles) -> str | None:
    """Says that a base's config names code of its own beside a model type of transformers; None: it names none."""
    names = _read_config(base).get("auto_map")
    if not names:
        return None
    own = type(load_config(base)).__name__.removesuffix("Config")
    return f"{base.config_name} names code of its own (auto_map), which is not run: the {own} of transformers is used"


def named_class(base: BaseFiles) -> str | None:
    """Returns the model class that a base's config names, or None where it names none.

    Raises:
        BaseModelError: The entry is no list of names.
    """
    found = class_of(_read_config(base).get("architectures"), base.config_name)
    if isinstance(found, Problem):
        raise BaseModelError([found])
    return found


def load_tokenizer(base: BaseFiles) -> Any:
    """Returns the base's tokenizer; one without a pad token pads with its end or unknown token.

    Raises:
        BaseModelError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False)
    except ImportError as error:
        raise BaseModelError(
            f"its tokenizer needs a package that is missing: {first_line(error)}",
            where=f"base.model {base.name}",
            fix="pip install sentencepiece sacremoses, or the package that is named there",
        ) from error
    except Exception as error:  # a damaged tokenizer.json raises the bare class
        raise BaseModelError(
            f"its tokenizer cannot be used: {first_line(error)}", where=f"base.model {base.name}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise BaseModelError("its tokenizer has no token to pad with", where=f"base.model {base.name}")
    return tokenizer


def padded_with(processor: Any) -> str | None:
    """Returns the token that a tokenizer pads with though it has no pad token of its own, else None."""
    if "pad_token" not in getattr(processor, "init_kwargs", {"pad_token": ""}):
        return str(processor.pad_token)
    return None


def load_processor(base: BaseFiles, kind: Literal["tokenizer", "image", "audio", "speech"]) -> Any:
    """Returns what makes a model's inputs: a tokenizer, an image processor or a feature extractor.

    For speech it is the processor that holds a feature extractor and a tokenizer, or the feature extractor of a base
    that has no tokenizer.

    Image processors are those that compute with Pillow and numpy: the same pixels on every machine.

    Raises:
        BaseModelError: There is none.
        UsageError: A package that it needs is not installed.
    """
    if kind == "tokenizer":
        return load_tokenizer(base)
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    require(*{"image": ("PIL", "vision")}.get(kind, ("soundfile", "audio")))
    try:
        if kind == "image":
            return AutoImageProcessor.from_pretrained(base.directory, backend="pil", trust_remote_code=False)
        if kind == "speech" and any((base.directory / name).is_file() for name in _TOKENIZER_FILES):
            return AutoProcessor.from_pretrained(base.directory, trust_remote_code=False)
        return AutoFeatureExtractor.from_pretrained(base.directory, trust_remote_code=False)
    except Exception as error:  # whatever a damaged config meets in transformers' own checks
        name = "image processor" if kind == "image" else "feature extractor"
        raise BaseModelError(
            f"its {name} cannot be used: {first_line(error)}",
            where=f"base.model {base.name}",
            fix="the folder needs the model's preprocessor_config.json",
        ) from error


def stored_quantization(base: BaseFiles) -> str | None:
    """Returns the method that a base's files are quantised by, as transformers calls it; None: they are not."""
    entries = _read_config(base).get("quantization_config")
    return str(entries.get("quant_method") or "bitsandbytes") if isinstance(entries, dict) else None


def without_weights(base: BaseFiles, auto_class: str, config: dict[str, Any] | None = None) -> nn.Module:
    """Builds a base's model on the meta device: shapes and names, no memory.

    Args:
        base: Its files.
        auto_class: Name of a transformers auto class, or of a model class.
        config: Config entries that differ from the checkpoint's.

    Raises:
        BaseModelError: Its config describes no such model.
    """
    import transformers

    entries = load_config(base)
    for key, value in (config or {}).items():
        if key != "num_labels":
            setattr(entries, key, value)
    named = getattr(transformers, auto_class, None)
    is_stock = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    if not is_stock and not auto_class.startswith("AutoModel"):
        auto_class = "AutoModel"  # a class of somebody's own code; its body may still be stock
    try:
        with torch.device("meta"):
            cls = getattr(transformers, auto_class)
            model: nn.Module = cls.from_config(entries) if auto_class.startswith("Auto") else cls(entries)
    except Exception as error:
        raise BaseModelError([model_problem(auto_class, entries, error, base.config_name)]) from error
    return model


def load_model(
    base: BaseFiles,
    auto_class: str,
    *,
    dtype: str = "auto",
    config: dict[str, Any] | None = None,
    seed: int = 42,
    loading: dict[str, Any] | None = None,
    keep: Iterable[str] = (),
) -> tuple[nn.Module, list[str]]:
    """Loads a base under a task's model class.

    Args:
        base: Its files.
        auto_class: Name of a transformers auto class, for example AutoModelForSequenceClassification.
        dtype: ``auto`` (the checkpoint's own) or a torch dtype's name.
        config: Config entries that differ from the checkpoint's, such as id2label.
        seed: Seed of the values of parameters that the checkpoint lacks (a fresh head).
        loading: Further arguments of ``from_pretrained``: how to quantise, and where.
        keep: Names of the modules that are no codes, where the files are quantised and do not hold them.

    Returns:
        The model in evaluation mode, and the names of the parameters that the checkpoint lacks or that do
        not fit.

    Raises:
        BaseModelError: It cannot be loaded, has tensors without a place, or holds a value that is not finite.
        RecipeError: It is quantised by a package that is missing.
        ResourceError: It does not fit into memory.
    """
    import transformers

    load_config(base)
    method = stored_quantization(base)
    if method is not None:
        check_package(method, "these files are quantised and need", where=f"base.model {base.name}")
    entries = dict(config or {})
    if method == "bitsandbytes":
        entries = {"config": _config_with_plain(base, entries, keep)}
    torch.manual_seed(seed)
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            base.directory,
            dtype=DTYPES.get(dtype, "auto"),
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **entries,
            **(loading or {}),
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "out of memory while the base was loaded",
                where=f"base.model {base.name}",
                fix="choose a smaller base, or set base.dtype: bfloat16 or base.quantize: int8",
            ) from error
        # transformers 5.23 finds the codes of such files by their full names, so a body's file fits no class with a
        # head; what it says then names neither.
        fix = "such files open only under the class that saved them" if method == "torchao" else ""
        raise BaseModelError(
            f"it cannot be loaded: {first_line(error)}", where=f"base.model {base.name}", fix=fix
        ) from error
    layer_tensors = [k for k in info["unexpected_keys"] if any(part.isdigit() for part in k.split("."))]
    if layer_tensors:
        names = ", ".join(sorted(layer_tensors)[:5])
        raise BaseModelError(
            f"the checkpoint has tensors that a {type(model).__name__} has no place for: {names}",
            where=f"base.model {base.name}",
        )
    for name, parameter in model.named_parameters():
        for part in plain_parts(parameter):
            if not torch.isfinite(part.sum()) and not torch.isfinite(part).all():
                raise BaseModelError(
                    f"the tensor {name} holds NaN or infinity",
                    where=f"base.model {base.name}",
                    fix="get the weights anew from where the model came from",
                )
    if dtype == "float64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    mismatched = [entry[0] if isinstance(entry, tuple | list) else entry for entry in info["mismatched_keys"]]
    if method is not None:
        mismatched += _fit_head(model)
    fresh = sorted({*info["missing_keys"], *mismatched} & {name for name, _ in model.named_parameters()})
    return model.eval(), fresh


def check_vocabulary(model: nn.Module, tokenizer: Any, base: BaseFiles) -> None:
    """Refuses a tokenizer whose ids the model has no embedding for.

    Raises:
        BaseModelError: Naming the first such token.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        raise BaseModelError(
            f"the tokenizer's token {beyond[0][1]!r} has the id {beyond[0][0]}, the model has {rows} embeddings",
            where=f"base.model {base.name}",
            fix="use the tokenizer that belongs to this model",
        )


def merging_dtype(base: BaseFiles) -> str:
    """Returns the dtype in which merging rounds nothing: float64 where a tensor of the files is, else float32."""
    return "float64" if "F64" in _stored_sizes(base) else "float32"


def _stored_sizes(base: BaseFiles) -> dict[str, int]:
    """Bytes of each dtype in a base's files, by the names of safetensors."""
    sizes: dict[str, int] = {}
    for file in weight_files(base):
        for name, entry in read_header(file).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return sizes


def stored_dtype(base: BaseFiles) -> str:
    """Returns the dtype that most of the checkpoint's values are stored in, as torch names it."""
    sizes = _stored_sizes(base)
    # Codes of quantised weights are integers and say nothing of what they stand for.
    floating = [name for name in sizes if name in _SAFETENSORS_DTYPES]
    return _SAFETENSORS_DTYPES[max(floating, key=lambda name: sizes[name], default="F32")]


def stored_bytes(base: BaseFiles) -> int:
    """Returns the size of all tensors in a base's files."""
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for file in weight_files(base)
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    )


def training_dtype(asked: str, base: BaseFiles, precision: str, device: str) -> str:
    """Returns the dtype that ``base.dtype`` means under a precision and device type."""
    if asked != "auto":
        return asked
    if precision == "bf16":
        return "bfloat16"
    own = stored_dtype(base)
    return "float32" if device == "cpu" and own == "float16" else own


def fingerprint(base: BaseFiles, *, head: Iterable[str] = ()) -> str:
    """SHA-256 over the sorted (on-disk name, shape, SHA-256 of the bytes) of a base's tensors and its config.

    Args:
        base: Its files.
        head: Names of trained head parameters, which do not count.
    """
    excluded = set(head)
    digest = hashlib.sha256()
    entries = []
    for file in weight_files(base):
        header = read_header(file)
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                if name == "__metadata__" or name in excluded:
                    continue
                begin, end = entry["data_offsets"]
                entries.append((name, entry["shape"], _sha256_range(stream, start + begin, end - begin)))
    for entry in sorted(entries):
        digest.update(json.dumps(entry).encode())
    config = {key: value for key, value in _read_config(base).items() if key not in _VOLATILE_CONFIG}
    digest.update(sha256_json(config).encode())
    return digest.hexdigest()


def fingerprint_in_memory(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the sorted (name, dtype, shape, bytes) of tensors in memory, for a model without files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content = hashlib.sha256(b"".join(_bytes_of(part) for part in plain_parts(tensor.detach()))).hexdigest()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), content]).encode())
    return digest.hexdigest()


def _fit_head(model: Any) -> list[str]:
    """Draws the weights anew that do not fit; returns their names.

    transformers 5.23 does not see that a weight of quantised files has other outputs than the model asks for.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_coded(module.weight):
            shape = (module.out_features, module.in_features)
            if module.weight.shape != shape:
                values = module.weight.new_empty(shape).normal_(std=getattr(model.config, "initializer_range", 0.02))
                module.weight = nn.Parameter(values)
                names.append(f"{name}.weight")
    return names


def _config_with_plain(base: BaseFiles, entries: dict[str, Any], keep: Iterable[str]) -> Any:
    """The config of a base that bitsandbytes quantised, where a head that the files lack is not made of codes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, **entries)
    headers = [read_header(file) for file in weight_files(base)]
    coded = {
        name.removesuffix(".weight")
        for header in headers
        for name, entry in header.items()
        if name.endswith(".weight") and entry["dtype"] not in _SAFETENSORS_DTYPES
    }
    # A body's file leaves out the prefix that its modules have below a head.
    plain = {name for name in keep if not any(name == c or name.endswith(f".{c}") for c in coded)}
    quantization = config.quantization_config
    plain |= set(quantization.get("llm_int8_skip_modules") or ())
    quantization["llm_int8_skip_modules"] = sorted(plain) or None
    return config


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    content: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def weight_files(base: BaseFiles) -> list[Path]:
    """Returns the safetensors files of a base, in order.

    Raises:
        BaseModelError: Their index is damaged.
    """
    index = base.directory / "model.safetensors.index.json"
    if index.exists():
        return [base.directory / name for name in sorted(set(_index(index).values()))]
    return [base.directory / "model.safetensors"]


def _index(index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it."""
    try:
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("it names no files")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(
            "the index of the weights is damaged",
            where=str(index),
            fix="get the file anew from where the model came from",
        ) from error


def read_header(file: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: name -> dtype, shape and data_offsets.

    Raises:
        BaseModelError: It is cut or damaged, or names a tensor twice.
    """
    try:
        return weights_header(file)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"the weights are damaged: {first_line(error)}", where=str(file)) from error


def _sha256_range(stream: Any, start: int, length: int) -> str:
    digest = hashlib.sha256()
    stream.seek(start)
    while length > 0:
        data = stream.read(min(length, 1 << 24))
        if not data:
            break
        digest.update(data)
        length -= len(data)
    return digest.hexdigest()


def _package_directory(package: str) -> Path:
    where = f"base.model package:{package}"
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            "there is no such Python package",
            where=where,
            fix=f"pip install {package.replace('_', '-')}",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(path.parent for path in root.rglob("config.json") if (path.parent / "model.safetensors").exists())
    if len(found) != 1:
        raise BaseModelError(
            f"expected one folder with config.json and model.safetensors in it, found {len(found)}",
            where=where,
        )
    return found[0]


def _download(model: str, revision: str | None, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"base.model {model}"
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise BaseModelError(f"the Hub does not have it: {first_line(error)}", where=where) from error
    except (LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise BaseModelError(
            f"it is no directory here, and the Hub cannot be reached{offline}",
            where=where,
            fix="name a directory (./my-model), a package (package:NAME), or connect to the network",
        ) from error
    return Path(path)


def _check_config(name: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise BaseModelError(
            "the directory has no config.json",
            where=f"base.model {name}",
            fix="name a folder that transformers' save_pretrained wrote, or one downloaded from the Hub",
        )


def _check_files(name: str, directory: Path) -> None:
    where = f"base.model {name}"
    _check_config(name, directory)
    index = directory / "model.safetensors.index.json"
    tensors: dict[str, str] = {}
    fix = "get the files anew from where the model came from"
    if index.exists():
        tensors = _index(index)
        first = {file: tensor for tensor, file in reversed(tensors.items())}
        outside = [n for n in sorted(first) if Path(n).name != n]
        missing = [n for n in sorted(first) if n not in outside and not os.path.isfile(directory / n)]
        if outside or missing:
            raise BaseModelError([
                Problem(f"the index names {n}, for {first[n]}, which is not in the folder", where, fix)
                for n in (*outside, *missing)
            ])  # fmt: skip
    elif not (directory / "model.safetensors").is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise BaseModelError(
                f"its weights are pickled ({pickles[0]}), which can run code when loaded",
                where=where,
                fix="convert them to safetensors",
            )
        raise BaseModelError("the directory has no model.safetensors", where=where)
    for file in weight_files(BaseFiles(name, directory)):
        header = read_header(file)
        absent = [tensor for tensor, holder in tensors.items() if holder == file.name and tensor not in header]
        if absent:
            raise BaseModelError(
                f"the index puts {absent[0]} into this file, which does not hold it", where=str(file), fix=fix
            )


def _read_config(base: BaseFiles) -> dict[str, Any]:
    path, where = base.directory / "config.json", base.config_name
    fix = "get the file anew from where the model came from"
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text)
    except UnicodeDecodeError as error:
        raise BaseModelError("the config is damaged: it is no text in UTF-8", where=where, fix=fix) from error
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if text.strip() else where
        found = f"no JSON ({error.msg})" if text.strip() else "empty"
        raise BaseModelError(f"the config is damaged: it is {found}", where=place, fix=fix) from error
    except RecursionError as error:
        raise BaseModelError("the config is damaged: it is nested too deep", where=where, fix=fix) from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"the config cannot be read: {first_line(error)}", where=where, fix=fix) from error
    if not isinstance(entries, dict):
        found = "a list" if isinstance(entries, list) else json.dumps(entries)[:40]
        raise BaseModelError(
            f"the config is not a JSON object: found {found}, expected names and values in braces", where=where, fix=fix
        )
    if kernel := _foreign_kernel(entries):
        raise BaseModelError(
            f"it names code of the Hub to compute with ({kernel}), which is never run",
            where=where,
            fix="remove the entry: the model's family has implementations of its own",
        )
    return entries


def _foreign_kernel(entries: dict[str, Any]) -> str:
    """The first entry, as ``key: value``, that names attention or experts by a Hub id; empty where there is none."""
    for key, value in entries.items():
        if "attn_implementation" in key or "experts_implementation" in key:
            if "/" in str(value):
                return f"{key}: {value}"
        elif isinstance(value, dict) and (found := _foreign_kernel(value)):
            return found
    return ""
