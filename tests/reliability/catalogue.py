"""What can go wrong with a run, each case with an ID, and which test shows what happens then.

A test names its cases: ``@case("C1", "C15")``. ``python -m tests.reliability.catalogue`` writes docs/reliability.md.
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"

CASES: dict[str, str] = {
    # Recipe
    "R1": "An unknown key, or a known one at the wrong level, is named with file, line, column and the nearest key.",
    "R2": "A key that stands twice, in block or flow style or by merge keys, is refused with both lines.",
    "R3": "A number means the same however it is written: 1e-4, 1E-4, 1.0e-4, 0.0001.",
    "R4": "An unquoted no, on or off is no text, and true is no number.",
    "R5": "Texts stay as they are written: 010, 12:30, 2024-01-01, 1.10.",
    "R6": "A number outside its range is refused, and the range is named.",
    "R7": "A missing, empty, broken, doubled or deeply nested file is refused in one line.",
    "R8": "A BOM and CRLF change nothing; another encoding is refused with the byte; the locale does not matter.",
    "R9": "All mistakes of a recipe are said at once, sorted by line.",
    "R10": "Paths with spaces, brackets, accents, percent signs or from another directory work.",
    "R11": "inspect shows the resolved values and writes nothing.",
    "R12": "An override is checked like the file, and its error says command line.",
    "R13": "A recipe of a newer schema is refused, and both versions are named.",
    # Base model
    "B1": "An adapter on another base is refused: expected and found fingerprints, and nothing is written.",
    "B2": "Training leaves every tensor and file of the base as it was.",
    "B3": "A base that cannot be found is an error within seconds, without another one in its place.",
    "B4": "A shard that is missing or cut, or an index that does not fit, is named before training.",
    "B5": "A base that lacks tensors of its architecture, or has others, is refused: nothing random is trained on.",
    "B6": "A model without a place for ticks or norms is refused with what is known.",
    "B7": "A tokenizer with more tokens than the base has embeddings is refused.",
    "B8": "Before the first step the model gives the base's logits bit for bit.",
    "B9": "A base with NaN or infinity is refused, and the tensor is named.",
    "B10": "A missing pad or end token is chosen and said, or refused where it is needed.",
    # Data
    "D1": "A column that is not there is refused with the columns that are, before the model is loaded.",
    "D2": "Rows without anything to learn are counted and never trained on; if there are many, training is refused.",
    "D3": "The end token is learned in every row that was not cut, though it is the pad token too.",
    "D4": "A broken row is named by file:line, or skipped and counted where the recipe allows it.",
    "D5": "BOM, CRLF, blank lines, odd separators and quoted newlines give the same rows and right line numbers.",
    "D6": "A huge line, deep nesting, invalid UTF-8, a lone surrogate or NUL is refused in bounded memory.",
    "D7": "No rows, or fewer than a batch, is an error or a short batch, never a run of no steps.",
    "D8": "Evaluating on the training rows is refused, and rows in both splits are counted.",
    "D9": 'A label that training does not know is named with its lines; 1 and "1" are the same label.',
    "D10": "Texts that are too long are counted, and said which end is cut.",
    "D11": "A prompt is made into the same tokens in training and prediction; a missing template is an error.",
    "D12": "Padding, batch size and order within a batch do not change a row's loss.",
    "D13": "The cache of tokenised rows is keyed by content, and a damaged one is made anew.",
    "D14": "Templates within a text are text; rows with a tokenizer's control tokens in their text are counted.",
    "D15": "Rows that stand twice, and the same text with two labels, are counted.",
    "D16": "A file that changes while it is read is noticed.",
    # Numerics
    "N1": "Micro-batches of any size give the same gradients, loss and weights.",
    "N2": "Trained tensors and their optimizer state are float32 whatever the base is, and all move.",
    "N3": "A loss or gradient that is not finite moves no weight and reaches no file.",
    "N4": "A precision that the device cannot do is refused, not replaced.",
    "N5": "Steps that fp16 skips count by a rule, and a resumed run agrees.",
    "N6": "Every trained tensor has a finite gradient; those that never move are reported.",
    "N7": "The learning rate is its closed form at every step.",
    "N8": "The longest rows are tried before training, and out of memory names the keys to change.",
    "N9": "The same recipe twice gives the same weights, bit for bit.",
    "N10": "Evaluating more often changes no weight.",
    "N11": "A metric is that of a plain reference on odd numbers of rows.",
    "N12": "Nothing to train is refused; the learning rate of the last step is documented.",
    # Crash and resume
    "C1": "Killed after every step and at random instants, the same command ends with the same weights, bit for bit.",
    "C2": "Killed at every write, fsync and rename of a save, a whole checkpoint is left.",
    "C3": "SIGTERM within a step saves and says how to go on; exit 143.",
    "C4": "A signal while loading, encoding, evaluating, saving or exporting stops soon, and nothing is half-written.",
    "C5": "A full disk is exit 8 with path and space; what was saved before is as it was.",
    "C6": "A damaged newest checkpoint is put aside with a warning, and the one before is used.",
    "C7": "A changed recipe is refused with old and new values; what changes no result may change.",
    "C8": "Of two processes in one folder one works and the other is refused at once.",
    "C9": "A lock is free when its holder is dead.",
    "C10": "Changed rows, base or tokenizer are refused by name.",
    "C11": "If no checkpoint is whole, nothing starts over by itself.",
    "C12": "A finished run is said to be complete, and no file is touched.",
    "C13": "Files of others in the output folder are never deleted.",
    "C14": "An old checkpoint goes only when the new one is verified; the best one stays.",
    "C15": "No row is seen twice or left out, wherever the run was killed.",
    "C16": "An output that cannot be written is refused before the model is loaded.",
    "C17": "Another thread count, version or device on resume is said.",
    "C18": "Checkpoints of older versions load or say what to do; those of newer ones are refused.",
    "C19": "Early stopping, the best metric, the scaler and the log go on where they were.",
    "C20": "Every file is flushed, then the manifest, the folder, the rename and its parent.",
    "C21": "Checkpoints are ordered by step, not by clock or by name.",
    # Checkpoint and export
    "X1": "The merged model is the base with its adapter: logits, predictions, a fresh process.",
    "X2": "A saved adapter is loaded bit for bit.",
    "X3": "A crash or full disk while exporting leaves the old export or the new one.",
    "X4": "An adapter with a missing, extra or misshapen tensor is refused by name.",
    "X5": "A flipped bit in an adapter is found.",
    "X6": "An adapter holds the trained tensors and facts of base, recipe and rows, and nothing else.",
    "X7": "Tied weights are tied after merging.",
    "X8": "File modes follow the umask.",
    "X9": "An export onto its own source is refused.",
    "X10": "NaN and infinity are not exported.",
    "X11": "An exported folder opens without ticktune, and holds no path of this machine.",
    "X12": "An export says which step it is, and its figures are those of eval.",
    # Several processes
    "P1": "A rank that dies ends the others.",
    "P2": "Uneven rows per rank are counted once.",
    "P3": "One rank and two give the same losses.",
    "P4": "A signal to one rank stops all at the same step.",
    "P5": "Only one rank writes.",
    "P6": "Ranks that see other inputs are refused.",
    "P7": "A run resumed with other ranks is refused, or goes on in the same order.",
    # Security
    "S1": "Code in weights, tokenizers, configs, recipes or templates is never run, and the file is named.",
    "S2": "Alias bombs and huge recipes are refused fast and in little memory.",
    "S3": "Names and paths of a run never leave the output folder.",
    "S4": "A link inside the output folder is not followed for writing or deleting.",
    "S5": "Tensor names and shard indexes that point elsewhere are refused.",
    "S6": "Malformed safetensors, duplicate names among them, are refused fast.",
    "S7": "Compressed data are refused, or read within a limit.",
    "S8": "Chat templates run in a sandbox with a limit on their output.",
    "S9": "Markup and control characters of any text reach a terminal escaped and whole.",
    "S10": "The model card keeps its form whatever the recipe says.",
    "S11": "No token, key, home path or user name is in any artefact.",
    "S12": "Local inputs open no connection.",
    "S13": "A template takes plain column names alone.",
    "S14": "Versions with known holes are refused at the start.",
}

ABSENT: dict[str, str] = {
    **dict.fromkeys(("P1", "P2", "P3", "P4", "P5", "P6", "P7"), "does not apply: ticktune trains on one device"),
}
"""Cases that no test has, and why."""


def case(*names: str) -> Callable[[Any], Any]:
    """Marks a test with the cases that it shows."""
    unknown = {*names} - CASES.keys()
    if unknown:
        raise ValueError(f"no such case: {sorted(unknown)}")
    return pytest.mark.case(*names)


def shown_by() -> dict[str, list[tuple[str, str]]]:
    """File and name of each case's tests, read off the decorators."""
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in CASES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "case":
                    for argument in decorator.args:
                        found[ast.literal_eval(argument)].append((str(path.relative_to(ROOT)), node.name))
    return found


def page() -> str:
    """The page on reliability, after its introduction."""
    found = shown_by()
    lines = ["| case | what happens | tests |", "|---|---|---|"]
    for name, promise in CASES.items():
        tests = "<br>".join(
            f"[{test.removeprefix('test_').replace('_', ' ')}](../{file})" for file, test in found[name]
        )
        lines.append(f"| {name} | {promise} | {tests or '**' + ABSENT.get(name, 'none') + '**'} |")
    applicable = [name for name in CASES if not name.startswith("P")]
    shown = sum(bool(found[name]) for name in applicable)
    lines.append("")
    lines.append(
        f"{shown} of the {len(applicable)} cases that apply have tests; the seven of several processes do not apply."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table into docs/reliability.md."""
    before, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    PAGE.write_text(before + mark + page(), encoding="utf-8")
    sys.stdout.write(page().splitlines()[-1] + "\n")


if __name__ == "__main__":
    main()
