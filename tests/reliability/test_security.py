"""What comes from others runs no code, reads and writes no file of its choice, and takes no more than its share.

By the command line (cases S).
"""

import ast
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import ticktune
from tests.launch import launch
from tests.reliability.catalogue import case
from tests.reliability.commands import ROWS, contents, recipe_text, refused
from tests.reliability.faults import plan
from tests.test_console import on_terminal
from ticktune.cli import entry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Path:
    """A folder with a base of its own, rows and ``r.yaml``."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "r.yaml").write_text(recipe_text(Path("base")))
    shutil.copytree(tiny_bert, tmp_path / "base")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A folder with a base of its own and a finished run."""
    place = tmp_path_factory.mktemp("trained")
    (place / "rows.jsonl").write_text(ROWS)
    (place / "r.yaml").write_text(recipe_text(Path("base")))
    shutil.copytree(tiny_bert, place / "base")
    done = launch("train", "r.yaml", "checkpoints.every=1", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(trained, tmp_path / "copy")


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def sign(directory: Path) -> None:
    """Makes a manifest agree with what lies beside it, as anybody can."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (directory / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


# Canaries, S1


class Canary:
    """A file that appears when code of others runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = f"open({str(path)!r}, 'w').close()\n"
        self.pickle = pickle.dumps(_Payload(f"touch '{path}'"))


class _Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canary]:
    """Must not have appeared when the test ends."""
    found = Canary(tmp_path_factory.mktemp("canary") / "it-ran")
    yield found
    assert not found.path.exists()


@case("S1")
def test_the_canary_sings_when_it_is_let_out(tmp_path: Path) -> None:
    one = Canary(tmp_path / "it-ran")
    pickle.loads(one.pickle)
    assert one.path.exists()
    one.path.unlink()
    exec(one.python)
    assert one.path.exists()


@case("S1")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused(folder: Path, canary: Canary, name: str) -> None:
    (folder / "base/model.safetensors").unlink()
    (folder / "base" / name).write_bytes(canary.pickle)
    said = ("error[base]", f"pickled ({name})", "fix: convert them to safetensors")
    refused(3, "train", "r.yaml", cwd=folder, said=said)


@case("S1")
def test_pickles_beside_safe_weights_are_left_alone(folder: Path, canary: Canary) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (folder / "base" / name).write_bytes(canary.pickle)
    done = launch("train", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr


@case("S1")
def test_pickled_weights_under_a_safe_name_are_refused(folder: Path, canary: Canary) -> None:
    (folder / "base/model.safetensors").write_bytes(canary.pickle)
    refused(
        3,
        "train",
        "r.yaml",
        cwd=folder,
        said=("base/model.safetensors (r.yaml:2:8 base.model): the weights are damaged",),
    )


@case("S1")
def test_pickles_in_a_checkpoint_are_not_read(copy: Path, canary: Canary) -> None:
    run = copy / "runs/tiny"
    change_json(run / "run.json", status="interrupted")
    (step,) = (run / "checkpoints").glob("step-*2")
    for name in ("rng_state.pth", "optimizer.pt", "training_args.bin", "optimizer.bin"):
        (step / name).write_bytes(canary.pickle)
    done = launch("train", "r.yaml", "checkpoints.every=1", cwd=copy)
    assert done.returncode == 0, done.stderr
    change_json(run / "run.json", status="interrupted")
    for step in (run / "checkpoints").glob("step-*"):
        (step / "optimizer.safetensors").write_bytes(canary.pickle)
        sign(step)
    said = ("error[checkpoint]", "optimizer.safetensors: the file is damaged")
    refused(6, "train", "r.yaml", "checkpoints.every=1", cwd=copy, said=said)


@case("S1")
def test_a_pickled_adapter_is_refused(copy: Path, canary: Canary) -> None:
    adapter = copy / "runs/tiny/adapter"
    (adapter / "adapter.safetensors").write_bytes(canary.pickle)
    sign(adapter)
    for words in (["eval", "runs/tiny", "--data", "rows.jsonl"], ["predict", "runs/tiny", "w1"]):
        refused(6, *words, cwd=copy, said=("adapter.safetensors: the file is damaged",))


@case("S1")
def test_code_of_a_model_is_not_run(folder: Path, canary: Canary) -> None:
    (folder / "base/modeling_x.py").write_text(canary.python)
    (folder / "base/configuration_x.py").write_text(canary.python)
    config = folder / "base/config.json"
    own = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    own["AutoModelForSequenceClassification"] = "modeling_x.X"
    change_json(config, auto_map=own)
    note = "base/config.json names code of its own (auto_map), which is not run: the Bert of transformers is used\n"
    for words in (("train", "r.yaml"), ("inspect", "r.yaml"), ("inspect", "base")):  # it is a stock BERT all the same
        done = launch(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(note) == 1
    change_json(config, model_type="x", architectures=["X"])
    said = ("error[base]", "base/config.json", "fix: ")
    refused(3, "train", "r.yaml", "output=runs/other", cwd=folder, said=said)
    refused(3, "inspect", "base", cwd=folder, said=said)
    entries = json.loads(config.read_text())
    del entries["model_type"]
    config.write_text(json.dumps(entries))
    said = ("needs code of its own (auto_map in its config), which is never run",)
    refused(3, "train", "r.yaml", "output=runs/other", cwd=folder, said=said)


@case("S1")
@pytest.mark.parametrize("key", ["_attn_implementation_internal", "attn_implementation", "experts_implementation"])
def test_a_config_that_names_an_attention_of_somebody_else_runs_none(folder: Path, canary: Canary, key: str) -> None:
    kernel = folder / "evil/kernel"
    kernel.mkdir(parents=True)
    for name in ("__init__.py", "kernel.py", "build.py"):
        (kernel / name).write_text(canary.python)
    for entries in ({key: "evil/kernel"}, {key: {"": "evil/kernel:f"}}, {"text_config": {key: "evil/kernel@main"}}):
        shutil.copy(folder / "base/config.json", folder / "kept.json")
        change_json(folder / "base/config.json", **entries)
        said = ("base/config.json: it names code of the Hub to compute with", key, "which is never run")
        for words in (["train", "r.yaml"], ["inspect", "base"]):
            refused(3, *words, cwd=folder, said=said)
        shutil.copy(folder / "kept.json", folder / "base/config.json")


@case("S1")
def test_code_of_a_tokenizer_is_not_run(folder: Path, canary: Canary) -> None:
    (folder / "base/tokenization_x.py").write_text(canary.python)
    own = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
    change_json(folder / "base/tokenizer_config.json", tokenizer_class="XTokenizer", auto_map=own)
    (folder / "base/tokenizer.json").rename(folder / "base/other.json")
    refused(3, "train", "r.yaml", cwd=folder, said=("error[base]", "its tokenizer cannot be used"))


@case("S1")
def test_a_data_set_that_is_a_script_is_not_run(folder: Path, canary: Canary) -> None:
    (folder / "rows.py").write_text(canary.python)
    (folder / "scripted").mkdir()
    (folder / "scripted/scripted.py").write_text(canary.python)
    refused(4, "train", "r.yaml", "data.train=rows.py", cwd=folder, said=("files ending in .py are not read",))
    for name in ("./scripted", str(folder / "scripted"), str(folder / "scripted/scripted.py")):
        words = ("data.train={hub: '" + name + "'}",)
        refused(4, "train", "r.yaml", *words, cwd=folder, said=("error[data]", "the Hub set cannot be read"))


@case("S1")
@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_recipe_constructs_nothing(folder: Path, canary: Canary, tag: str) -> None:
    (folder / "r.yaml").write_text(f"task: !!{tag} [\"touch '{canary.path}'\"]\n")
    for verb in ("train", "inspect", "eval", "export"):
        refused(2, verb, "r.yaml", cwd=folder, said=("r.yaml:1:7: the tag", "is not used in recipes"))


@case("S1")
def test_a_package_that_holds_a_base_is_not_imported(
    tmp_path: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil_weights").mkdir()
    (tmp_path / "evil_weights/__init__.py").write_text(canary.python)
    monkeypatch.syspath_prepend(tmp_path)
    assert entry(["inspect", "package:evil_weights"]) == 3
    assert "expected one folder with config.json" in capsys.readouterr().err


@case("S1", "S8")
def test_a_chat_template_runs_no_code(chat: Path, canary: Canary) -> None:
    put_template(chat, "{{ cycler.__init__.__globals__.os.system(\"touch '" + str(canary.path) + "'\") }}")
    refused(4, "train", "r.yaml", cwd=chat, said=("error[data]", "chat template refuses a conversation"))


UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "runpy"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.load_all", "yaml.unsafe_load"}
UNSAFE_CALLS |= {"yaml.full_load", "torch.load", "torch.jit.load", "torch.package.PackageImporter", "os.system"}
UNSAFE_CALLS |= {"numpy.load", "np.load", "pandas.read_pickle"}
UNSAFE_NAMES = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader"}
SAFE_ARGUMENTS = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "shell": False}


def unsafe_parts(source: str) -> list[str]:
    """What in a source could run code of others, as ``line: what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, name) for name in names if name.partition(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                found.append((node.lineno, ast.unparse(node.func)))
            for keyword in node.keywords:
                safe = SAFE_ARGUMENTS.get(keyword.arg or "")
                if safe is not None and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is safe):
                    found.append((node.lineno, ast.unparse(keyword)))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
            found.append((node.lineno, ast.unparse(node)))
    return [f"{line}: {what}" for line, what in found]


@case("S1")
@pytest.mark.parametrize("path", sorted(Path(ticktune.__path__[0]).rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_of_the_program_can_run_code_of_others(path: Path) -> None:
    assert unsafe_parts(path.read_text(encoding="utf-8")) == []


@case("S1")
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import os, joblib.externals",
        "eval('1')",
        "exec(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.compose(text, Loader=yaml.UnsafeLoader)",
        "torch.load(path, weights_only=True)",
        "f(weights_only=False)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=asked)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_code_that_could_is_found(line: str) -> None:
    assert unsafe_parts(line)


# Recipes that explode, S2


@case("S2")
def test_exploding_recipes_are_refused_in_a_second_and_little_memory(folder: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    recipes = {
        "bomb": (bomb, "anchors and aliases are not used in recipes"),
        "self": ("a: &a [*a]\n", "anchors and aliases are not used in recipes"),
        "50MB": ("x" * 50_000_000, "the file is larger than 1 MB: not a recipe"),
        "keys": ("".join(f"key{i}: {i}\n" for i in range(10_000)), "more than 10,000 keys and values"),
        "unknown": ("".join(f"learnig_rate{i}: {i}\n" for i in range(4_900)), "more mistakes of this kind"),
        "list": ("ticks: {layers: [" + "1, " * 300_000 + "1]}\n", "more than 10,000 keys and values"),
        "deep": ("[" * 900_000, "more than 32 levels of nesting"),
    }
    for name, (text, _) in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    script = (
        "import io, json, sys, time\n"
        "from contextlib import redirect_stderr\n"
        "from ticktune.cli import entry\n"
        "for name in sys.argv[1:]:\n"
        "    start, error = time.process_time(), io.StringIO()\n"
        "    with redirect_stderr(error):\n"
        "        code = entry(['train', f'{name}.yaml'])\n"
        "    # Not ru_maxrss, which begins with that of the process that forked.\n"
        "    peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
        "    print(json.dumps([name, code, error.getvalue(), time.process_time() - start, peak]))\n"
    )
    words = [sys.executable, "-c", script, *recipes]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer[0] for answer in answers] == list(recipes)
    for name, code, error, seconds, megabytes in answers:
        assert code == 2
        assert recipes[name][1] in error
        assert len(error) < 60_000
        assert "Traceback" not in error
        assert seconds < 1, name
        assert megabytes < 200, name


# Names, S3


@case("S3")
@pytest.mark.parametrize(
    ("output", "code"),
    [
        ('"a\\0b"', 2),
        ('"a\\nb"', 2),
        ("x" * 300, 2),
        ("..", 7),
        ("../copy", 7),
        (".", 7),
        ("rows.jsonl", 7),
        ("base", 7),
    ],
)
def test_outputs_that_are_no_folder_of_a_run_are_refused(folder: Path, output: str, code: int) -> None:
    inner = shutil.copytree(folder, folder / "inner/copy")
    text = (inner / "r.yaml").read_text().replace("output: runs/tiny", f"output: {output}")
    (inner / "r.yaml").write_text(text)
    refused(code, "train", "r.yaml", cwd=inner, watched=folder)


@case("S3")
@pytest.mark.parametrize("name", ["..yaml", "...yaml"])
def test_a_recipe_whose_name_is_a_folder_above_needs_an_output(folder: Path, name: str) -> None:
    text = (folder / "r.yaml").read_text().replace("output: runs/tiny\n", "")
    (folder / name).write_text(text)
    (folder / "empty").mkdir()
    refused(2, "train", f"../{name}", cwd=folder / "empty", watched=folder, said=("names no folder of its own",))


HOSTILE = ["../../x", "/etc/x", "..", "CON", "a\nb", "n" * 300, "\x1b]0;owned\x07\x1b[2J", "[red]r[/x]", "\u202eevil"]


def hostile_folder(place: Path, base: Path) -> Path:
    """A folder whose labels, columns, rows and base have odd names; returns the recipe."""
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base, place / "[b]<script>`x`---")
    labels = [*HOSTILE, "---\nlicense: x", "<script>alert(1)</script>", "](javascript:alert(1))", "{{ 7*7 }}", "| a |"]
    column = "te[/x]xt\x1b[2J"
    rows = [{column: f"w{i % 7} \x1b]0;private words\x07", "label": labels[i % len(labels)]} for i in range(28)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(recipe_text(Path("[b]<script>`x`---")))
    recipe["data"] |= {"columns": {"text": column, "label": "label"}, "validation": {"fraction": 0.2}}
    (place / "r.yaml").write_text(yaml.safe_dump(recipe))
    return place / "r.yaml"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A trained and merged run of a hostile recipe, and secrets in its environment."""
    outer = tmp_path_factory.mktemp("outer")
    home = outer / "home-of-mallory"
    hostile_folder(home / "work", tiny_bert)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("HOME", str(home))
        for words in (["train", "r.yaml"], ["export", "runs/tiny", "--merge"]):
            done = launch(*words, cwd=home / "work")
            assert done.returncode == 0, done.stderr
            (home / "work" / f"said-{words[0]}.txt").write_text(done.stdout + done.stderr)
    return home / "work"


SECRETS = {
    "HF_TOKEN": "hf_SecretTokenOfMallory",
    "HUGGING_FACE_HUB_TOKEN": "hf_OtherTokenOfMallory",
    "AWS_SECRET_ACCESS_KEY": "AwsKeyOfMallory",
    "WANDB_API_KEY": "WandbKeyOfMallory",
    "USER": "user-mallory",
    "LOGNAME": "user-mallory",
    "USERNAME": "user-mallory",
}


@case("S3")
def test_labels_and_columns_name_no_files(hostile: Path) -> None:
    outer = hostile.parents[1]
    assert [path.name for path in outer.iterdir()] == ["home-of-mallory"]
    assert [path.name for path in hostile.parent.iterdir() if path.name != ".cache"] == ["work"]
    ours = {"r.yaml", "rows.jsonl", "runs", "[b]<script>`x`---", "said-train.txt", "said-export.txt"}
    assert {path.name for path in hostile.iterdir()} == ours
    assert {path.name for path in (hostile / "runs/tiny").iterdir()} == {
        *("recipe.yaml", "run.json", "metrics.jsonl", "report.html", "checkpoints", "adapter", "merged", ".lock")
    }


# Links, S4


@case("S4")
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (".lock", 8, "it is a link, which is not followed for writing"),
        ("metrics.jsonl", 7, "it is a link, which is not followed for writing"),
        ("checkpoints", 7, "it is a link, which is not followed for writing"),
        ("adapter", 7, "it is a link, which is not followed for writing"),
    ],
)
def test_links_in_a_run_are_not_followed_for_writing(copy: Path, name: str, code: int, said: str) -> None:
    run, outside = copy / "runs/tiny", copy / "outside"
    change_json(run / "run.json", status="interrupted")
    if (run / name).is_dir():
        shutil.copytree(run / name, outside)
        shutil.rmtree(run / name)
    else:
        outside.write_text("precious")
        (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    refused(code, "train", "r.yaml", "checkpoints.every=1", cwd=copy, said=(f"runs/tiny/{name}: ", said))


@case("S4")
def test_a_new_run_replaces_links_and_leaves_what_they_point_to(folder: Path) -> None:
    outside = folder / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (outside / "step-00000001").mkdir()
    (outside / "step-00000001/file").write_text("precious")
    run = folder / "runs/tiny"
    run.mkdir(parents=True)
    (run / ".tmp-000000000000").symlink_to(outside)
    (run / ".tmp-111111111111").symlink_to(outside / "file")
    before = contents(outside)
    done = launch("train", "r.yaml", "checkpoints.every=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert contents(outside) == before
    assert not list(run.glob(".tmp-*"))
    # Links in the place of files that are written as a whole are replaced themselves.
    for name in ("run.json", "report.html", "recipe.yaml"):
        (run / name).rename(outside / name)
        (run / name).symlink_to(outside / name)
    (run / "checkpoints/step-00000000").symlink_to(outside / "step-00000001")
    before = contents(outside)
    done = launch("train", "r.yaml", "checkpoints.every=1", "--restart", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert contents(outside) == before
    assert not [path for path in run.rglob("*") if path.is_symlink()]


@case("S4")
def test_temporary_names_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ticktune import files

    outside = tmp_path / "outside"
    outside.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".tmp-guessed").symlink_to(outside)
    with pytest.raises(ticktune.errors.ResourceError, match="File exists"):
        files.write_text(tmp_path / "file", "text")
    assert outside.read_text() == "precious"
    monkeypatch.undo()
    assert len({files.secrets.token_hex(6) for _ in range(100)}) == 100


# Weights, S5, S6


def weights(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


BOUNDED = plan("cpu=1", f"memory={64 << 20}")
"""The kernel ends what computes for a second, and gives it no more memory."""

TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the header is longer than the file"),
    "7 bytes": (b"\0" * 7, "the header is longer than the file"),
    "cut header": (weights({"a": tensor(0, 4)})[:20], "the header is longer than the file"),
    "cut data": (weights({"a": tensor(0, 8)}, b"1234"), "not as long as its header says"),
    "a byte more": (weights({"a": tensor(0, 4)}, b"12345"), "not as long as its header says"),
    "length 2^63": ((2**63).to_bytes(8, "little") + b"{}", "the header is longer than the file"),
    "no JSON": (weights(b"{'a'}"), "damaged: "),
    "no object": (weights([1]), "the header is no JSON object"),
    "nested": (weights(b'{"a":' + b"[" * 200_000), "nested too deep"),
    "overlap": (weights({"a": tensor(0, 8), "b": tensor(4, 12)}, b"1" * 12), "'b' does not begin where the one before"),
    "hole": (weights({"a": tensor(0, 4), "b": tensor(8, 12)}, b"1" * 12), "'b' does not begin where the one before"),
    "backwards": (weights({"a": tensor(4, 0, [1])}, b"1234"), "has not as many bytes as its shape"),
    "shape overflow": (weights({"a": tensor(0, 4, [2**40, 2**40])}, b"1234"), "has not as many bytes as its shape"),
    "negative shape": (weights({"a": tensor(0, 4, [-1])}, b"1234"), "the entry of the tensor 'a' is damaged"),
    "shape of text": (weights({"a": tensor(0, 4, ["1"])}, b"1234"), "the entry of the tensor 'a' is damaged"),
    "no dtype": (weights({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "the entry of the tensor 'a' is"),
    "metadata": (weights({"__metadata__": {"a": 1}, "a": tensor(0, 4)}, b"1234"), "the metadata are not text"),
    "twice": (weights(TWICE, b"12345678"), "a name stands twice in the header"),
    "a path": (weights({"../../x": tensor(0, 4)}, b"1234"), "'../../x' is no name of a tensor"),
    "NUL": (weights({"a\0b": tensor(0, 4)}, b"1234"), "is no name of a tensor"),
    "absolute": (weights({"/etc/x": tensor(0, 4)}, b"1234"), "'/etc/x' is no name of a tensor"),
}


@case("S5", "S6")
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_weights_are_refused_fast(copy: Path, kind: str) -> None:
    data, said = MALFORMED[kind]
    adapter = copy / "runs/tiny/adapter"
    (adapter / "adapter.safetensors").write_bytes(data)
    sign(adapter)
    words = ("eval", "runs/tiny", "--data", "rows.jsonl")
    refused(6, *words, cwd=copy, said=("adapter.safetensors: the file is damaged", said), env=BOUNDED)
    (copy / "base/model.safetensors").write_bytes(data)
    place = "base/model.safetensors (r.yaml:2:8 base.model): the weights are damaged"
    for words in (("train", "r.yaml", "output=x"), ("inspect", "r.yaml")):
        refused(3, *words, cwd=copy, said=(place, said), env=BOUNDED)
        assert not (copy / "x").exists()


@case("S5", "S6")
def test_a_million_tensors_are_refused_in_bounded_memory(folder: Path) -> None:
    header = b'{"t0":' + json.dumps(tensor(0, 0)).encode()
    header += (
        b"".join(b',"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1, 1_000_000)) + b"}"
    )
    (folder / "base/model.safetensors").write_bytes(weights(header))
    said = (
        "base/model.safetensors (r.yaml:2:8 base.model): the weights are damaged: the header is longer than 32 MiB",
    )
    refused(3, "inspect", "r.yaml", cwd=folder, said=said, env=BOUNDED)


@case("S5")
@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y", 5, None])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, name: Any) -> None:
    shutil.copy(folder / "base/model.safetensors", folder / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
    (folder / "base/model.safetensors.index.json").write_text(json.dumps(index))
    for words in (["inspect", "r.yaml"], ["train", "r.yaml"]):
        refused(3, *words, cwd=folder, said=("error[base]", "index"))


@case("S5")
@pytest.mark.parametrize("name", ["../../../rows.jsonl", "/etc/hostname", "adapter.json/../adapter.json"])
def test_a_manifest_that_points_elsewhere_is_refused(copy: Path, name: str) -> None:
    path = copy / "runs/tiny/adapter/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    refused(6, "predict", "runs/tiny", "w1", cwd=copy, said=("the manifest names a file outside of its folder",))


@case("S5")
@pytest.mark.parametrize(
    "change",
    [
        {"plan": {"form": "plain"}},
        {"base": {"name": 5}},
        {"task": {"name": "../x", "state": {}, "options": {}, "columns": {}}},
        {"novelty": 1},
        {"training": {"data": 3}},
        {"model_class": ["x"]},
        {"model_class": "../x"},
        {"model_class": "pipeline"},
    ],
    ids=str,
)
def test_an_adapter_that_says_nonsense_of_itself_is_refused(copy: Path, change: dict[str, Any]) -> None:
    adapter = copy / "runs/tiny/adapter"
    change_json(adapter / "adapter.json", **change)
    sign(adapter)
    code = 3 if isinstance(change.get("model_class"), str) else 6
    refused(
        code,
        "eval",
        "runs/tiny",
        "--data",
        "rows.jsonl",
        cwd=copy,
        said=(f"error[{'base' if code == 3 else 'checkpoint'}]",),
    )


# Compressed data, S7


@case("S7")
def test_archives_are_not_opened(copy: Path) -> None:
    import gzip
    import io
    import tarfile
    import zipfile

    # A tenth of what the file says it is would fill the machine's memory; it is never unpacked.
    (copy / "bomb.jsonl.gz").write_bytes(gzip.compress(b"\0" * 50_000_000))
    with zipfile.ZipFile(copy / "rows.zip", "w") as file:
        file.writestr("../escaped.txt", "x")
    with tarfile.open(copy / "rows.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("../escaped.txt"), io.BytesIO())
    for name, suffix in (("bomb.jsonl.gz", ".gz"), ("rows.zip", ".zip"), ("rows.tar.gz", ".gz")):
        said = (name, f"files ending in {suffix} are not read", "fix: use one of")
        refused(4, "train", "r.yaml", f"data.train={name}", "output=x", cwd=copy, watched=copy.parent, said=said)
        refused(4, "eval", "runs/tiny", "--data", name, cwd=copy, watched=copy.parent, said=said)
        refused(4, "predict", "runs/tiny", name, cwd=copy, watched=copy.parent, said=(name, "is not UTF-8"))


@case("S7")
@pytest.mark.parametrize("name", ["bomb.jsonl", "bomb.csv", "bomb.json", "bomb.txt", "bomb.parquet"])
def test_compressed_rows_under_another_name_are_refused(copy: Path, name: str) -> None:
    import gzip

    (copy / name).write_bytes(gzip.compress(ROWS.encode()))
    refused(4, "train", "r.yaml", f"data.train={name}", "output=x", cwd=copy, said=("error[data]", name))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a tiny vision model, two pictures and ``r.yaml``."""
    import torch
    from PIL import Image
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"image": f"{name}.png", "label": name}) + "\n" for name in ("a", "b", "a", "b"))
    )
    text = recipe_text(Path("base")).replace("text-classification", "image-classification")
    (tmp_path / "r.yaml").write_text(text.replace("  max_length: 16\n", ""))
    done = launch("inspect", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


@case("S7")
def test_a_picture_of_billions_of_pixels_is_refused(pictures: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    (pictures / "a.png").write_bytes(bomb)
    refused(
        4, "train", "r.yaml", cwd=pictures, said=("rows.jsonl:1", "this picture cannot be read", "decompression bomb")
    )


@case("S1")
def test_code_of_an_image_processor_is_not_run(pictures: Path, canary: Canary) -> None:
    (pictures / "base/image_processing_x.py").write_text(canary.python)
    own = {"AutoImageProcessor": "image_processing_x.X", "AutoProcessor": "image_processing_x.X"}
    change_json(pictures / "base/preprocessor_config.json", image_processor_type="X", auto_map=own)
    said = ("error[base]", "its image processor cannot be used")
    refused(3, "train", "r.yaml", cwd=pictures, said=said)


# Chat templates, S8


def put_template(place: Path, template: str) -> None:
    """The base's chat template; wherever a tokenizer keeps it."""
    for path in (place / "base").glob("chat_template*"):
        path.unlink()
    change_json(place / "base/tokenizer_config.json", chat_template=template)


@pytest.fixture
def chat(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder with a language model, conversations and ``r.yaml``."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8)
    text = recipe_text(Path("base")).replace("text-classification", "causal-lm")
    (tmp_path / "r.yaml").write_text(text)
    put_template(tmp_path, "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}")
    return tmp_path


@case("S8")
def test_a_plain_chat_template_is_used(chat: Path) -> None:
    done = launch("train", "r.yaml", cwd=chat)
    assert done.returncode == 0, done.stderr


@case("S8")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**8 }}",
        "{{ 'a' * 10**11 }}",
        "{{ 'x'.center(10**11) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 1 / 0 }}",
        "{{ undefined.thing }}",
        "{% for m in messages %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_chat_template_is_refused(chat: Path, template: str) -> None:
    put_template(chat, template)
    start = time.monotonic()
    refused(4, "train", "r.yaml", cwd=chat, said=("error[data]", "chat template"))
    assert time.monotonic() - start < 30


@case("S8")
def test_a_chat_template_that_never_ends_is_stopped(
    chat: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    put_template(chat, loop)
    monkeypatch.chdir(chat)
    monkeypatch.setattr("ticktune.tasks.causal_lm._RENDER_SECONDS", 0.3)
    start = time.process_time()
    assert entry(["train", "r.yaml"]) == 4
    assert time.process_time() - start < 5
    assert "chat template refuses a conversation: it computes for too long" in capsys.readouterr().err


@case("S8")
def test_a_limit_ends_with_its_block() -> None:
    import resource
    import signal

    from ticktune.limits import limited

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(MemoryError), limited(5, 1 << 28):
        bytearray(1 << 30)
    with pytest.raises(TimeoutError), limited(0.1, 1 << 28):
        any(number < 0 for number in itertools.count())
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert len(bytearray(1 << 29)) == 1 << 29


@case("S8")
def test_a_chat_template_is_rendered_for_conversations_alone(chat: Path) -> None:
    put_template(chat, "{{ 'a' * 10**11 }}")
    (chat / "rows.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n' * 8)
    done = launch("train", "r.yaml", cwd=chat)
    assert done.returncode == 0, done.stderr
    (chat / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    done = launch("train", "r.yaml", "output=runs/text", cwd=chat)
    assert done.returncode == 0, done.stderr


# What is printed and written, S9 to S11


@case("S9")
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "r.yaml"],
        ["train", "r.yaml"],
        ["eval", "runs/tiny", "--split", "validation"],
        ["predict", "runs/tiny", "w1 \x1b[2J [/x]", "w2"],
        ["train", "r.yaml", "ticks.dim=\x1b]0;x\x07[/x]"],
        ["train", "r.yaml", "data.columns={text: '[/red]\u202e', label: label}", "output=x"],
        ["eval", "[/x]\x1b[2J"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_a_terminal_gets_no_control_characters(
    hostile: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = shutil.copytree(hostile, tmp_path / "copy")
    monkeypatch.chdir(place)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "400")
    out, error = on_terminal(monkeypatch), on_terminal(monkeypatch, "stderr")
    code = entry(words)
    said = out.getvalue() + error.getvalue()
    assert code in (0, 2, 4)
    assert "bug in ticktune" not in said
    assert {c for c in said if not c.isprintable()} <= {"\n"}
    shown = {
        "inspect": r"te[/x]xt\u001b[2J",
        "predict": "\\x1b" if code else "",
        "eval": "" if code == 0 else "[/x]\\x1b[2J",
    }
    assert shown.get(words[0], "") in "".join(said.split())


@case("S9")
def test_files_hold_no_control_characters(hostile: Path) -> None:
    texts = [p for p in (hostile / "runs").rglob("*") if p.suffix in (".json", ".jsonl", ".yaml", ".md", ".html")]
    assert len(texts) > 8
    for path in [*texts, hostile / "said-train.txt", hostile / "said-export.txt"]:
        assert not {b"\x1b", b"\x07", b"\r"} & {bytes([byte]) for byte in path.read_bytes()}, path
    assert "\\u001b]0;owned" in (hostile / "runs/tiny/adapter/adapter.json").read_text()


@case("S10")
@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_the_card_of_a_hostile_run_keeps_its_form(hostile: Path, name: str) -> None:
    card = (hostile / "runs/tiny" / name / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["ticktune", "parallel-adapter"],
        "pipeline_tag": "text-classification",
    }
    assert "\nlicense" not in body
    assert "<script>" not in body.replace("`[b]<script>'x'---`", "")
    for text in ("](javascript", "{{ 7", "| a |", "\x1b", "\u202e"):
        assert text not in body
    for text in (r"\[red\]r\[/x\]", r"&lt;script&gt;alert\(1\)", r"\{\{ 7\*7 \}\}", r"\\u202eevil"):
        assert text in body
    assert "private words" not in card
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[0].endswith("`[b]<script>'x'---`")
    assert [line for line in headings[1:] if line not in ("## Merged equals base and adapter", "## Method")] == [
        r"## Metrics (validation rows)"
    ]


@case("S11")
def test_no_secret_and_no_name_of_the_user_is_in_any_file(hostile: Path) -> None:
    files = [path for path in (hostile / "runs").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in [*files, hostile / "said-train.txt", hostile / "said-export.txt"]:
        data = path.read_bytes().lower()
        assert b"mallory" not in data, path  # of the tokens, of the user's name and of the home folder


@case("S11")
def test_a_traceback_shows_no_secret(hostile: Path) -> None:
    done = launch("train", "gone.yaml", "--debug", cwd=hostile, env=SECRETS)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert not [value for value in SECRETS.values() if value in done.stderr]


# The network, S12

OFFLINE = """
import json, os, sys
events = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        events.append(f"{event} {args[1:]}" if event != "socket.getaddrinfo" else f"{event} {args[:2]}")
sys.addaudithook(watch)
from ticktune.cli import entry
codes = [entry(words) for words in (
    ["train", "r.yaml"], ["eval", "runs/tiny", "--data", "other.jsonl"], ["predict", "runs/tiny", "w1"],
    ["inspect", "r.yaml"], ["export", "runs/tiny", "--merge"], ["eval", "runs/tiny/merged", "--data", "other.jsonl"],
)]
open("seen.json", "w").write(json.dumps([codes, events]))
"""


@case("S12")
def test_local_inputs_open_no_connection(folder: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB", "TRANSFORMERS_", "HF_DATASETS"))}
    (folder / "other.jsonl").write_text('{"text": "w9 w31", "label": "small"}\n{"text": "w32", "label": "large"}\n')
    words = [sys.executable, "-c", OFFLINE]
    # Where the kernel allows it, in a network of its own without any interface; the audit hook looks either way.
    cut_off = (
        shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    )
    words = ["unshare", "-rn", *words] if cut_off else words
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    codes, events = json.loads((folder / "seen.json").read_text())
    assert codes == [0] * 6, done.stderr
    assert events == []


@case("S12")
def test_the_watch_on_the_network_sees_a_connection(folder: Path) -> None:
    script = OFFLINE.partition("from ticktune")[0] + (
        "import socket\n"
        "try: socket.create_connection(('localhost', 9), timeout=1)\n"
        "except OSError: pass\n"
        "print(json.dumps(events))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "socket.getaddrinfo" in done.stdout


# Templates of columns, S13


@case("S13")
@pytest.mark.parametrize(
    "template",
    ["{text.__class__}", "{0.__class__}", "{text!r:>999999999}", "{text:>999999999}", "{text[0]}", "{text} {label!s}"],
)
def test_a_template_takes_plain_column_names_alone(folder: Path, template: str) -> None:
    word = "data.columns={text: " + json.dumps(template) + ", label: label}"
    said = ("command line: data.columns.text: only plain {column} names can stand in a template", template)
    refused(2, "train", "r.yaml", word, cwd=folder, said=said)


@case("S13")
def test_what_a_row_holds_is_no_template(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(
        '{"a": "{b}", "b": "{0.__class__} %s", "label": "{a}"}\n{"a": "w1", "b": "w2", "label": "x"}\n'
    )
    done = launch("inspect", "r.yaml", "data.columns={text: '{a}-{b}', label: label}", cwd=folder)
    assert done.returncode == 0, done.stderr


# Versions, S14


@case("S14")
@pytest.mark.parametrize(
    ("package", "old"), [("torch", "2.9.1"), ("transformers", "5.2.9"), ("jinja2", "3.1.4"), ("safetensors", "0.5.2")]
)
def test_versions_with_known_holes_are_refused_at_the_start(folder: Path, package: str, old: str) -> None:
    place = folder / f"site/{package}-{old}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {old}\n")
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "ticktune", "train", "r.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"error[usage]: {package} {old} has known security holes, expected" in done.stderr
    assert f"fix: pip install --upgrade '{package}>=" in done.stderr
    assert not (folder / "runs").exists()


@case("S14")
def test_the_floors_are_those_that_pip_is_asked_for() -> None:
    import re
    import tomllib

    from ticktune.versions import FLOORS

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for package, floor in FLOORS.items():
        assert f"{package}>={floor}" in asked
        numbers = [[int(n) for n in re.findall(r"\d+", text)[:3]] for text in (pinned[package], floor)]
        assert numbers[0] >= numbers[1]
