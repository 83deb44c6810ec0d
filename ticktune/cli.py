"""The command line: parse, call a verb (imported inside its command), print, exit code."""

import errno
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ticktune import __version__
from ticktune.console import Console
from ticktune.errors import Problem, ReaderGone, ResourceError, TicktuneError, UsageError
from ticktune.versions import refuse_old

app = typer.Typer(
    name="ticktune",
    help="Fine-tune a Transformer by a few extra hidden units and norms, and merge them exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Split(StrEnum):
    """A split of the data."""

    train = "train"
    validation = "validation"
    test = "test"


class Dtype(StrEnum):
    """How merged weights are stored."""

    base = "base"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Precision(StrEnum):
    """Arithmetic of matrix products."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class PadTo(StrEnum):
    """What merged widths are multiples of."""

    auto = "auto"
    none = "none"
    to_64 = "64"
    to_128 = "128"
    to_256 = "256"


class Express(StrEnum):
    """The architecture that a merged folder is written as."""

    same = "same"
    llama = "llama"


def _say_version(asked: bool) -> None:
    if asked:
        Console().text(f"ticktune {__version__}")
        raise typer.Exit


def _device(value: str | None) -> str | None:
    if value is not None and not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", value):
        raise UsageError(f"expected auto, cpu, cuda or cuda:N, found {value}", where="--device")
    return value


Target = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|RECIPE|DIR]",
        help="A run, its recipe, an adapter or a merged folder; default: the newest complete run under ./runs.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute; default: as in training.", callback=_device
    ),
]
PrecisionOption = Annotated[
    Precision | None, typer.Option("--precision", help="Arithmetic of matrix products; default: as in training.")
]
BaseOption = Annotated[str | None, typer.Option("--base", help="The base model, where the recorded one is not found.")]


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version.")
    ] = False,
) -> None:
    """Global flags; they stand before the command."""
    refuse_old()
    context.obj = {"console": Console(quiet=quiet, as_json=as_json), "debug": debug}


@app.command()
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Override any key, e.g. ticks.dim=32.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what the run folder holds and start over.")
    ] = False,
) -> None:
    """Train a recipe; the same command again resumes an interrupted run."""
    from ticktune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # a mistake is answered before anything heavy is imported

    from ticktune import run

    run.train(loaded, context.obj["console"], restart=restart)


@app.command("eval")
def evaluate(
    context: typer.Context,
    target: Target = None,
    split: Annotated[Split | None, typer.Option("--split", help="Default: test, else validation.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="A file with answers, instead of a split.")] = None,
    minimum: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="METRIC=VALUE", help="Exit 9 when the metric is below."),
    ] = None,
    maximum: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="METRIC=VALUE", help="Exit 9 when the metric is above."),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Print the metrics of a run, an adapter or a merged folder."""
    from ticktune import run

    run.evaluate(
        target,
        context.obj["console"],
        split=split.value if split else None,
        data=data,
        base=base,
        device=device,
        precision=precision.value if precision else None,
        minimums=minimum or [],
        maximums=maximum or [],
    )


@app.command()
def predict(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [TEXT…|FILE|DIR|-]",
            help="Perhaps a run; then texts, a file (txt: one example a line), pictures or sounds and folders of them, "
            "or - for standard input.",
        ),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw",
            metavar="DIR",
            help="Also draw each prediction, as a picture in DIR; a segmentation as a mask too.",
        ),
    ] = None,
) -> None:
    """Print one prediction a row; JSON lines when piped."""
    from ticktune import run

    run.predict_rows(
        words or [],
        context.obj["console"],
        standard_input=_standard_input,
        base=base,
        device=device,
        precision=precision.value if precision else None,
        draw=draw,
    )


@app.command()
def export(
    context: typer.Context,
    target: Target = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Build the ticks into the base's weights: a stock checkpoint.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write; default with --merge: RUN/merged.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Of the merged weights; base: as the base's files.")
    ] = Dtype.base,
    pad_to: Annotated[
        PadTo,
        typer.Option(
            "--pad-to",
            help="Round merged widths up with zero units to a multiple; auto: of what the base's width is, 64 at most.",
        ),
    ] = PadTo.auto,
    express: Annotated[
        Express,
        typer.Option(
            "--as", help="llama: write a Mistral, Qwen2 or Phi-3 as the Llama it is, so that plain ticks fit."
        ),
    ] = Express.same,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows to compare the merged folder on, instead of the run's.")
    ] = None,
    base: BaseOption = None,
) -> None:
    """Write adapter-only or merged safetensors, verified by reloading."""
    from ticktune import run

    run.export(
        target,
        context.obj["console"],
        merge=merge,
        output=output,
        dtype=dtype.value,
        pad_to=pad_to.value,
        express=express.value,
        force=force,
        base=base,
        data=data,
    )


@app.command()
def inspect(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, or a Hub id, directory or package:NAME.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Override any key of a recipe.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub commit, tag or branch of a MODEL.")] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim", min=0, max=65536, help="Hidden units of the ticks that are counted on a MODEL; default: 64."
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw",
            metavar="DIR",
            help="Also draw the example as the model sees it in training, random changes (data.augment) included, as a "
            "picture in DIR.",
        ),
    ] = None,
) -> None:
    """Show what would be ticked and trained, whether it merges, and one decoded example; trains nothing."""
    is_recipe, loaded = Path(target).suffix in (".yaml", ".yml"), None
    _refuse_unused(target, is_recipe, overrides or [], {"--dim": dim, "--revision": revision}, draw)
    if is_recipe:
        from ticktune.recipe.load import load_recipe

        loaded = load_recipe(Path(target), overrides or [])

    from ticktune import inspect as inspection

    console = context.obj["console"]
    if loaded is None:
        inspection.inspect_base(target, console, revision=revision, dim=64 if dim is None else dim)
    else:
        inspection.inspect_recipe(loaded, console, draw=draw)


@app.command()
def schema(context: typer.Context) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from ticktune.recipe.schema import json_schema

    context.obj["console"].text(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def entry(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: The command line without the program's name; None: the process's own.
    """
    words = _flags_first(sys.argv[1:] if arguments is None else arguments)
    console, debug = Console(quiet="--quiet" in words), "--debug" in words
    try:
        result = app(words, standalone_mode=False, prog_name="ticktune")
        return result if isinstance(result, int) else 0
    except ReaderGone as error:
        return error.exit_code
    except TicktuneError as error:
        if debug:
            console.traceback()
        console.error(error)
        return error.exit_code
    except typer.Exit as done:
        return int(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return _unexpected(error, console, debug)
        console.error(UsageError("the name is longer than the file system takes", where=str(error.filename)[:200]))
        return 2
    except Exception as error:  # noqa: BLE001 - the last net: a traceback is for --debug only
        return _unexpected(error, console, debug)


def _unexpected(error: Exception, console: Console, debug: bool) -> int:
    format_message = getattr(error, "format_message", None)  # the usage errors of typer
    if format_message is not None:
        console.error(UsageError(str(format_message()), fix="see ticktune --help"))
        return 2
    if debug:
        console.traceback()
    if _is_out_of_memory(error):
        full = ResourceError("out of memory", fix="end other programs, or give fewer or shorter rows at once")
        console.error(full)
        return full.exit_code
    summary = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    bug = TicktuneError(
        f"this is a bug in ticktune: {summary}", fix="run it again with --debug and report what it prints"
    )
    bug.kind = "internal"
    console.error(bug)
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # too slow to import for an error
        return isinstance(error, MemoryError)
    from ticktune.device import is_out_of_memory

    return is_out_of_memory(error)


def _refuse_unused(
    target: str, is_recipe: bool, overrides: list[str], options: dict[str, object], draw: Path | None
) -> None:
    """Refuses what the command line gives ``inspect`` for the other kind of target: nothing is dropped in silence."""
    keys = {"--dim": "ticks.dim", "--revision": "base.revision"}
    problems = [
        Problem(f"it is for a MODEL, and {target} is a recipe", f"inspect {name}", f"say {keys[name]}={value} instead")
        for name, value in options.items()
        if is_recipe and value is not None
    ]
    if draw is not None and not is_recipe:
        fix = "leave it out, or name a recipe (a .yaml or .yml file)"
        problems.append(Problem(f"it is for a recipe, and {target} is a MODEL", "inspect --draw", fix))
    for word in () if is_recipe else overrides:
        key, _, value = word.partition("=")
        known = next((name for name, own in keys.items() if own == key and value), None)
        fix = f"say {known} {value} instead" if known else "leave it out, or name a recipe (a .yaml or .yml file)"
        problems.append(Problem(f"overrides are for a recipe, and {target} is a MODEL", f"inspect {word}", fix))
    if problems:
        raise UsageError(problems)


def _flags_first(words: list[str]) -> list[str]:
    """Moves the global flags to the front: people write them after the command too."""
    end = words.index("--") if "--" in words else len(words)
    flags = [w for w in words[:end] if w in ("--debug", "--json", "--quiet", "-q")]
    rest = [w for w in words[:end] if w not in ("--debug", "--json", "--quiet", "-q")]
    return flags + rest + words[end:]


def _standard_input() -> bytes:
    return sys.stdin.buffer.read()


def program() -> None:
    """The console script."""
    sys.exit(entry())
