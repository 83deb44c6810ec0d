"""Broken recipes, command lines, rows, adapters and weights, thousands of them, through the real command line.

``python -m tests.reliability.fuzz --inputs 20000`` writes benchmarks/results/fuzz.json. Every input is made from the
seed and its number alone: ``--first 1234 --inputs 1 --show`` repeats one.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
ALLOWED = {0, 2, 3, 4, 5, 6, 7, 8, 9}
SECONDS = 60.0  # an input that takes longer by the clock hangs

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 8, 65536, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-4, 1e308, float("nan"),
    float("inf"), "", " ", "x", "no", "1e-4", "auto", "all", "none", "last:3", "0-1", "epoch", "cpu", "cuda:99", "../x",
    "/dev/null", "~", "${NO_SUCH}", "{text}", "{0.__class__}", "{", "a\nb", "\x1b]0;x\x07", "\u202e", "\ud800",
    "[/red]", "é🙂", "y" * 300, [], [[]], [0], [1, 2], ["text"], {}, {"": 1}, {"text": "text"}, {"path": "x"},
    {"a": {"b": []}},
]  # fmt: skip
"""What stands in the place of a value."""

PIECES = [
    *(b"1e-4", b".nan", b"-1", b"no", b"{", b"}", b"[", b"]", b":", b": ", b"- ", b"&a ", b"*a", b"<<: ", b"#", b"|"),
    *(b">", b"!!python/object/apply:os.system ", b"\t", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r"),
    *(b"\n", b"\n---\n", b"'", b'"', b"\\", b"\\u0000", b"\\ud800", b"9" * 400, b"9" * 5000, b"null", b"NaN"),
    *(b"[" * 2000, b"{" * 50, b"\x1b[2J", "\u2028".encode(), "\u202e".encode(), b"%", b"${HOME}", b"{x!r}", b","),
    *(b"\x1c", b"\x85"),
]  # fmt: skip
"""What is put between the bytes of a file."""


@dataclass(frozen=True)
class Input:
    """A command line, and the files that stand there while it runs.

    Args:
        kind: What is broken.
        words: The command line.
        files: Path below the stage's folder -> content; None: the file is missing.
    """

    kind: str
    words: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a command made of an input.

    Args:
        code: The exit code; -1 where it hung.
        error: What it wrote to standard error.
        seconds: What it computed, as other programs may be busy; in a process of its own, by the clock.
    """

    code: int
    error: str
    seconds: float

    @property
    def is_bad(self) -> bool:
        """Whether no command should answer so."""
        return self.code not in ALLOWED or "Traceback" in self.error or (self.code > 0 and not self.error.strip())


class Stage:
    """A folder with a tiny base, rows, recipes and a trained adapter, whole between two inputs.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        import yaml

        from tests.end_to_end.support import classification, write_rows
        from tests.models import save_tiny_bert
        from ticktune.cli import entry

        self.folder = folder
        save_tiny_bert(folder / "base")
        recipe = classification(folder, Path("base"), training={"epochs": 1})
        write_rows(folder, "few.jsonl", 4, 5)
        with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()) as error:
            with contextlib.redirect_stdout(io.StringIO()):
                code = entry(["train", str(recipe.name)])
        if code:
            raise RuntimeError(f"the stage cannot be set: {error.getvalue()}")
        data = {"train": "few.jsonl", "validation": None, "test": None}
        small = {**yaml.safe_load(recipe.read_text()), "data": data, "output": "runs/small"}
        (folder / "small.yaml").write_text(yaml.safe_dump(small))
        (folder / "rows.csv").write_text('text,label\n"w1 w2",small\nw31,large\n')
        (folder / "rows.json").write_text('[{"text": "w1", "label": "small"}, {"text": "w2", "label": "large"}]')
        (folder / "rows.tsv").write_text("text\tlabel\nw1 w2\tsmall\nw31\tlarge\n")

    def read(self, name: str) -> bytes:
        """A file as it is between two inputs."""
        return (self.folder / name).read_bytes()

    @contextlib.contextmanager
    def holding(self, files: dict[str, bytes | None]) -> Iterator[None]:
        """Puts an input's files there for the block."""
        before = {name: self.read(name) if (self.folder / name).exists() else None for name in files}
        try:
            self._put(files)
            yield
        finally:
            self._put(before)

    def _put(self, files: dict[str, bytes | None]) -> None:
        for name, content in files.items():
            path = self.folder / name
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)

    def answer(self, given: Input) -> Answer:
        """Runs the command line's main function on an input, in this process."""
        from ticktune.cli import entry

        error, start, code = io.StringIO(), time.process_time(), -1
        with self.holding(given.files), contextlib.chdir(self.folder), _alarm(SECONDS):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
                try:
                    code = entry(given.words)
                except _TooLong:
                    error.write("it hangs")
        return Answer(code, error.getvalue(), time.process_time() - start)

    def launch(self, given: Input) -> Answer:
        """Runs the command line on an input, in a process of its own."""
        from tests.launch import launch

        start = time.perf_counter()
        with self.holding(given.files):
            done = launch(*given.words, cwd=self.folder, timeout=SECONDS)
        return Answer(done.returncode, done.stderr, time.perf_counter() - start)


class _TooLong(BaseException):
    """Raised by the alarm; no handler of the program's takes it for an error of its own."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLong


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# How things are broken


def broken_bytes(rng: Random, data: bytes, most: int = 4) -> bytes:
    """Cuts, doubles, swaps, flips and puts pieces between some bytes."""
    for _ in range(rng.randint(1, most)):
        start = rng.randint(0, len(data))
        end = min(len(data), start + rng.choice([1, 1, 2, 5, 20, 200]))
        way = rng.randrange(7)
        if way == 0:
            data = data[:start] + data[end:]
        elif way == 1:
            data = data[:end] + data[start:]
        elif way == 2 and start < end:
            data = data[:start] + bytes([data[start] ^ (1 << rng.randrange(8))]) + data[start + 1 :]
        elif way == 3:
            data = data[:start]
        elif way == 4:
            lines = data.split(b"\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
            data = b"\n".join(lines)
        else:
            data = data[:start] + rng.choice(PIECES) + data[rng.choice([start, end]) :]
    return data


def broken_tree(rng: Random, tree: Any) -> Any:
    """Puts an odd value in some place of nested dicts and lists, takes a place out, or adds one."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = [(tree, key) for key in _keys(tree)]
        for parent, key in places:
            places += [(parent[key], inner) for inner in _keys(parent[key])]
        if not places:
            return rng.choice(ODD_VALUES)
        parent, key = rng.choice(places)
        odd = copy.deepcopy(rng.choice(ODD_VALUES))
        way = rng.randrange(6)
        if way == 0:
            del parent[key]
        elif way == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "x", "é", "../x", f"{key}s", "0", "path", "__class__"])] = odd
        elif way == 2 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        else:
            parent[key] = odd
    return tree


def _keys(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def broken_json(rng: Random, data: bytes) -> bytes:
    """Breaks JSON as a tree or as bytes."""
    return broken_bytes(rng, data) if rng.random() < 0.3 else _json(broken_tree(rng, json.loads(data)))


def broken_weights(rng: Random, data: bytes) -> bytes:
    """Breaks a safetensors file: its header as JSON, the length of the header, or bytes anywhere."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    way = rng.randrange(8)
    if way == 0:
        return broken_bytes(rng, data)
    if way == 1:
        lengths = [0, 1, 2, length - 1, length + 1, len(data) - 8, len(data), 10**8 + 1, 2**63, 2**64 - 1]
        return rng.choice(lengths).to_bytes(8, "little") + header + body
    if way == 2:
        return data[: rng.choice([0, 1, 7, 8, 9, length, length + 8, len(data) - 1])]
    if way == 3:
        return data + rng.choice([b"\0", b"x" * 100])
    if way == 4:  # a name twice
        name = rng.choice(list(json.loads(header)))
        twice = header[:1] + _json(name) + b":" + _json(json.loads(header)[name]) + b"," + header[1:]
        return len(twice).to_bytes(8, "little") + twice + body
    new = broken_json(rng, header)
    return len(new).to_bytes(8, "little") + new + body


# Kinds of inputs


def recipe_input(rng: Random, stage: Stage) -> Input:
    """A broken recipe; the base of most is not there, so that what is still whole ends soon."""
    import yaml

    text = stage.read("small.yaml")
    if rng.random() < 0.5:
        tree = broken_tree(rng, yaml.safe_load(text))
        text = yaml.dump(tree, allow_unicode=rng.random() < 0.5, default_flow_style=rng.random() < 0.2).encode(
            "utf-8", "surrogatepass"
        )
    else:
        text = broken_bytes(rng, text)
    if rng.random() < 0.8:
        return Input(
            "recipe", ["train", "fuzzed.yaml"], {"fuzzed.yaml": text.replace(b"model: base", b"model: ./gone")}
        )
    return Input("recipe", ["inspect", "fuzzed.yaml"], {"fuzzed.yaml": text})


def words_input(rng: Random, stage: Stage) -> Input:
    """A command line with odd words."""
    from ticktune.recipe.load import _all_keys

    verb = rng.choice(["train", "eval", "predict", "export", "inspect", "schema", "nonsense"])
    options = ["--min", "--max", "--split", "--data", "--base", "--device", "--precision", "--dim", "--draw", "--dtype"]
    words: list[str] = []
    for _ in range(rng.randint(0, 4)):
        odd = str(rng.choice(ODD_VALUES))
        way = rng.randrange(4)
        if way == 0:
            words.append(rng.choice([*options, "--json", "--quiet", "--restart", "--", "-"]))
        elif way == 1:
            words.append(f"{rng.choice(_all_keys())}={odd}")
        elif way == 2:
            words.append(broken_bytes(rng, rng.choice(_all_keys()).encode() + b"=3").decode("utf-8", "surrogateescape"))
        else:
            words.append(odd)
    if verb in ("train", "inspect"):
        words = ["gone.yaml", *words]
    words = [word.replace("\0", "0") for word in words if word not in ("--merge", "--force")]  # exec takes no NUL
    return Input(
        "words", [verb, *words], {"gone.yaml": stage.read("small.yaml").replace(b"model: base", b"model: ./gone")}
    )


def rows_input(rng: Random, stage: Stage) -> Input:
    """Broken rows of one of the formats."""
    name = rng.choice(["few.jsonl", "few.jsonl", "few.jsonl", "rows.csv", "rows.tsv", "rows.json"])
    data = stage.read(name)
    if name == "few.jsonl" and rng.random() < 0.6:
        lines = data.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = broken_json(rng, lines[i])
        data = b"\n".join(lines)
    elif name == "rows.json" and rng.random() < 0.6:
        data = broken_json(rng, data)
    else:
        data = broken_bytes(rng, data)
    verb = ["inspect"] if rng.random() < 0.3 else ["train"]
    words = [*verb, "small.yaml", f"data.train={name}"]
    return Input("rows", words if verb == ["inspect"] else [*words, "base.model=./gone"], {name: data})


def adapter_input(rng: Random, stage: Stage) -> Input:
    """An adapter with one broken file; in half of them the manifest agrees with it."""
    folder = "runs/tiny/adapter"
    name = rng.choice(["adapter.safetensors", "adapter.json", "adapter.json", "manifest.json"])
    data = stage.read(f"{folder}/{name}")
    data = broken_weights(rng, data) if name.endswith(".safetensors") else broken_json(rng, data)
    files: dict[str, bytes | None] = {f"{folder}/{name}": data if rng.random() < 0.98 else None}
    if name != "manifest.json" and rng.random() < 0.5:
        manifest = json.loads(stage.read(f"{folder}/manifest.json"))
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        files[f"{folder}/manifest.json"] = _json(manifest)
    verb = rng.choice(
        [
            ["eval", folder, "--data", "few.jsonl"],
            ["predict", folder, "w1"],
            ["export", folder, "-o", "runs/x", "--force"],
        ]
    )
    return Input("adapter", verb, files)


def base_input(rng: Random, stage: Stage) -> Input:
    """A base whose weights or index are broken."""
    if rng.random() < 0.8:
        files: dict[str, bytes | None] = {
            "base/model.safetensors": broken_weights(rng, stage.read("base/model.safetensors"))
        }
    else:
        names = json.loads(
            stage.read("base/model.safetensors")[
                8 : 8 + int.from_bytes(stage.read("base/model.safetensors")[:8], "little")
            ]
        )
        index = {"metadata": {}, "weight_map": dict.fromkeys(list(names)[:5], "model.safetensors")}
        files = {"base/model.safetensors.index.json": broken_json(rng, _json(index))}
    if rng.random() < 0.9:
        return Input("base", ["inspect", "small.yaml"], files)
    return Input("base", ["eval", "runs/tiny/adapter", "--data", "few.jsonl"], files)


def record_input(rng: Random, stage: Stage) -> Input:
    """A run whose record or recipe is broken."""
    name = rng.choice(["runs/tiny/run.json", "runs/tiny/recipe.yaml"])
    data = stage.read(name)
    data = broken_json(rng, data) if name.endswith(".json") else broken_bytes(rng, data)
    return Input(
        "record", rng.choice([["eval"], ["train", "recipe.yaml"], ["predict", "runs/tiny", "w1"]]), {name: data}
    )


KINDS: list[tuple[Callable[[Random, Stage], Input], int]] = [
    (recipe_input, 35),
    (words_input, 15),
    (rows_input, 20),
    (adapter_input, 15),
    (base_input, 12),
    (record_input, 3),
]
"""Makers of inputs, and how many of a hundred inputs each makes."""


def make(seed: int, number: int, stage: Stage) -> Input:
    """The input of a number."""
    rng = Random(f"{seed}:{number}")
    makers, weights = zip(*KINDS, strict=True)
    return rng.choices(makers, weights)[0](rng, stage)


def fuzz(stage: Stage, *, seed: int, numbers: range, launched: int = 0) -> dict[str, Any]:
    """Answers inputs and counts.

    Args:
        stage: Where they stand.
        seed: Of the inputs.
        numbers: Which ones.
        launched: How many of them are run in processes of their own, spread evenly.
    """
    codes: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    longest, start = (0.0, 0), time.process_time()
    apart = {numbers[i * len(numbers) // launched] for i in range(launched)}
    for number in numbers:
        given = make(seed, number, stage)
        answer = stage.launch(given) if number in apart else stage.answer(given)
        codes.setdefault(given.kind, Counter())[str(answer.code)] += 1
        if number not in apart:
            longest = max(longest, (answer.seconds, number))
        if answer.is_bad:
            bad.append({"number": number, "words": given.words, "code": answer.code, "error": answer.error[:400]})
    return {
        "seed": seed,
        "inputs": sum(sum(found.values()) for found in codes.values()),
        "in_processes_of_their_own": launched,
        "exit_codes_by_kind": {kind: dict(sorted(found.items())) for kind, found in sorted(codes.items())},
        "longest_cpu_seconds": round(longest[0], 2),
        "longest_number": longest[1],
        "cpu_seconds": round(time.process_time() - start),
        "bad": bad,
    }


def main() -> int:
    """Runs the fuzz and writes its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--launched", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print one input and its answer; write no results")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from ticktune.versions import versions

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        (Path(folder) / "stage").mkdir()
        stage = Stage(Path(folder) / "stage")
        if given.show:
            one = make(given.seed, given.first, stage)
            if "--debug" not in one.words:
                one = Input(one.kind, ["--debug", *one.words], one.files)
            sys.stdout.write(f"{one}\n{stage.answer(one)}\n".replace("\\n", "\n"))
            return 0
        numbers = range(given.first, given.first + given.inputs)
        found = fuzz(stage, seed=given.seed, numbers=numbers, launched=min(given.launched, given.inputs))
    command = (
        f"python -m tests.reliability.fuzz --inputs {given.inputs} --launched {given.launched} --seed {given.seed}"
    )
    report = {"command": command, "versions": versions(), **found}
    if not given.first:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
