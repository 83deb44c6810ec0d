"""What a recipe may say: every key with its type, default, unit, range and help, and nowhere else.

The JSON Schema and the reference page are made from these models.
"""

import re
from typing import Annotated, Any, Literal

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from ticktune.registry import TASKS

SCHEMA_VERSION = 1
"""Version of the recipe grammar."""

_YAML_11_WORDS = {"yes", "no", "on", "off", "y", "n"}


class PlainWord(str):
    """An unquoted yes, no, on or off: some YAML readers take it as true or false."""


def _plain_text(value: Any) -> Any:
    if isinstance(value, PlainWord):
        raise ValueError(f'unquoted {value} is read as true or false by other YAML readers; write "{value}"')
    return value


def _stripped(value: str) -> str:
    if not value.strip():
        raise ValueError("expected some text")
    return value


Text = Annotated[
    str,
    BeforeValidator(_plain_text),
    AfterValidator(_stripped),
    WithJsonSchema({"type": "string", "minLength": 1}),
]
Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]  # more, and steps leave float32
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _epoch_or_count(value: Any) -> Any:
    if value == "epoch" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("expected a number of optimizer steps, at least 1, or the word epoch")


Every = Annotated[
    Any,
    BeforeValidator(_epoch_or_count),
    WithJsonSchema({"anyOf": [{"const": "epoch"}, {"type": "integer", "minimum": 1}]}),
]

_DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?)$"
_LAYERS = re.compile(r"all|none|(first|last):[1-9][0-9]*|[0-9]+-[0-9]+")
_LAYERS_HELP = "all, none, last:3, first:2, 4-11 or a list such as [0, 2, 5]"


def _layers(value: Any, words: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        if not value or not all(isinstance(stack, str) for stack in value):
            raise ValueError(f"expected stack: layers pairs, where layers is {_LAYERS_HELP}")
        return {stack: _layers(item) for stack, item in value.items()}
    if isinstance(value, list):
        if not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise ValueError("expected a list of layer numbers, 0 or more")
        return sorted(set(value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return [value]
    if isinstance(value, str) and (value in words or _LAYERS.fullmatch(value)):
        low, _, high = value.partition("-")
        if high and int(low) > int(high):
            raise ValueError(f"the range {value} is empty")
        return value
    raise ValueError(f"expected {', '.join([*words, _LAYERS_HELP])}")


_LAYERS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": rf"^({_LAYERS.pattern})$"},
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        {"type": "integer", "minimum": 0},
        {"type": "object"},
    ]
}
Layers = Annotated[Any, BeforeValidator(_layers), WithJsonSchema(_LAYERS_SCHEMA)]
NormLayers = Annotated[
    Any,
    BeforeValidator(lambda value: _layers(value, ("same",))),
    WithJsonSchema({"anyOf": [{"const": "same"}, *_LAYERS_SCHEMA["anyOf"]]}),
]

NORM_ROLES = ("embedding", "attention", "cross_attention", "ffn", "final", "q", "k")


def _norm_roles(value: Any) -> Any:
    if isinstance(value, str) and value not in ("all", "none"):
        value = [part.strip() for part in value.split(",")]
    if value in ("all", "none"):
        return value
    if isinstance(value, list) and value and all(role in NORM_ROLES for role in value):
        return sorted(set(value), key=NORM_ROLES.index)
    raise ValueError(f"expected all, none, or a list of {', '.join(NORM_ROLES)}")


NormRoles = Annotated[
    Any,
    BeforeValidator(_norm_roles),
    WithJsonSchema({"anyOf": [{"enum": ["all", "none"]}, {"type": "array", "items": {"enum": list(NORM_ROLES)}}]}),
]


def _head_train(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("expected auto, true or false")


HeadTrain = Annotated[Any, BeforeValidator(_head_train), WithJsonSchema({"enum": ["auto", True, False]})]


def _answer_pattern(value: str) -> str:
    try:
        groups = regex.compile(value).groups
    except regex.error as error:
        raise ValueError(f"this is no regular expression: {error}") from error
    if groups == 0:
        raise ValueError("expected a group, in parentheses, for the answer itself")
    return value


Pattern = Annotated[Text, Field(max_length=1000), AfterValidator(_answer_pattern)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Base(Section):
    """The frozen pretrained model."""

    model: Text
    """Hub id, directory (relative to the recipe file), or `package:NAME` for weights inside an installed
    Python package."""
    revision: Text | None = None
    """Hub commit, tag or branch; what was used is recorded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How the frozen weights are held while training. auto: bfloat16 under precision bf16, else the
    checkpoint's own; float16 on a CPU becomes float32."""
    dropout: Literal["keep", "off"] = "keep"
    """The base model's own dropout while training."""
    quantize: Literal["none", "int8", "bnb-8bit", "bnb-4bit"] = "none"
    """Hold the frozen linear projections as codes while training. int8: torchao, on CPUs and CUDA. bnb-8bit,
    bnb-4bit: bitsandbytes, on CUDA. Heads, norms and embeddings stay as they are, and merging reads the
    full-precision files again. Needs `pip install "ticktune[quantized]"`."""


class Ticks(Section):
    """The extra hidden units beside each feed-forward block."""

    dim: Annotated[int, Field(ge=0, le=65536)] = 64
    """Hidden units of each tick; 0 = no ticks."""
    layers: Layers = "all"
    """Which layers get a tick: all, none, last:3, first:2, 4-11, a list, or one of these per stack:
    `{encoder: all, decoder: last:2}`."""
    form: Literal["auto", "plain", "gated"] = "auto"
    """plain: P σ(Qx + r). gated: P (σ(Qx) ⊙ Ux). auto: plain on plain feed-forward blocks, gated on
    gated ones; this always merges where the architecture allows it."""
    dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Dropout on the tick's hidden units while training."""
    experts: Literal["each", "block"] = "each"
    """Mixtures of experts. each: a tick in every expert, routed like it. block: one tick beside all of them; it
    merges where a token's routing weights sum to one, and is refused where they do not."""
    unshare: bool = False
    """Where layers share one block (ALBERT): give each layer its own copy, so that each gets its own tick. The
    merged file then holds as many blocks as layers; false: one shared tick."""


class Norms(Section):
    """The task's own γ′ and β′."""

    train: NormRoles = "all"
    """all, none, or a list of roles: embedding, attention, cross_attention, ffn, final, q, k. `all` leaves
    out q and k, which are trained only when named."""
    layers: NormLayers = "same"
    """same: as ticks.layers (the embedding norm only when that is all; the final norm always); else as
    ticks.layers."""


class Head(Section):
    """The task head."""

    train: HeadTrain = "auto"
    """auto: parameters that the checkpoint lacks or that do not fit, and an existing classification or
    regression head; never a language-model head or a tied embedding. true: the whole head. false: nothing."""


def _class_numbers(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


ClassNumbers = Annotated[
    list[Annotated[int, Field(ge=0, le=65535)]],
    BeforeValidator(_class_numbers),
    Field(min_length=1),
]


class Source(Section):
    """Where rows come from: a file, a Hub data set, or a share of the training rows."""

    path: Text | None = None
    """jsonl, json, csv, tsv, parquet or txt file, relative to the recipe file; or a folder of pictures or sound, with a
    metadata.jsonl or metadata.csv whose file_name names each, or with a subfolder for each label. Rows and tokens above
    32 MiB are kept on disk, in the cache directory, while a command runs; a json file, a txt file that is one document,
    and standard input are read into memory whole."""
    hub: Text | None = None
    """Name of a Hub data set."""
    config: Text | None = None
    """Configuration of the Hub data set."""
    split: Text | None = None
    """Split of the Hub data set; default: the one of the same name."""
    revision: Text | None = None
    """Commit of the Hub data set."""
    fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    """Only for validation and test: this share of the training rows, chosen by the seed."""
    sample_by: Literal["auto", "line", "document"] = "auto"
    """How a txt file becomes rows. auto: document for causal-lm, else line."""
    limit: Count | None = None
    """Only the first so many rows."""


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


AnySource = Annotated[Source, BeforeValidator(_source, json_schema_input_type=str | Source)]


class Augment(Section):
    """Random changes of pictures and sound while training, seeded; evaluation sees them as they are."""

    flip: Ratio = 0.0
    """Probability that a picture is mirrored from left to right."""
    crop: Ratio = 0.0
    """Largest share of a picture's height and width that is cut away."""
    jitter: Ratio = 0.0
    """Largest relative change of a picture's brightness, contrast and colour."""
    time_mask: Ratio = 0.0
    """Largest share of a sound that is silenced in one piece (SpecAugment)."""
    noise: Ratio = 0.0
    """Largest share of a sound's own loudness that is added as white noise."""


class Loss(Section):
    """How errors count."""

    weights: Literal["none", "balanced"] = "none"
    """balanced: each class counts as much as the others, however rare: a row of a class counts rows / (classes × its
    rows). Where a row can have several labels, those that have one count rows without it / rows with it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Share of the target that all classes get alike."""


class Data(Section):
    """The rows and their columns."""

    train: AnySource
    """Rows to learn from."""
    validation: AnySource | None = None
    """Rows that choose the best checkpoint."""
    test: AnySource | None = None
    """Rows that only `eval` looks at."""
    allow_training_rows: bool = False
    """Whether validation and test may be the training rows themselves, as to see whether these can be learned at
    all."""
    columns: dict[str, Text] = {}
    """What the task calls a column: what the file calls it, or a template such as `{question}\\n{answer}`."""
    separator: Annotated[str, BeforeValidator(_plain_text), Field(min_length=1)] | None = None
    """What stands between the labels of a row that has several in one cell, such as `|`; an empty cell is a row without
    any."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """What a row does that cannot be used: a broken line, a column that is missing, empty or of another kind, or what
    the task refuses. fail: nothing starts. skip: it is left out, counted and said; a file that is no text, or a whole
    column that is not there, is an error all the same."""
    max_bad_rows: Count = 100
    """With `on_bad_row: skip`: the most rows of a split that may be left out; one more is an error."""
    max_length: Annotated[int, Field(ge=2, le=2**20)] = 128
    """Longest example, in tokens; longer ones are cut, and counted."""
    max_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0
    """Longest sound, in seconds; longer ones are cut, and counted."""
    vocabulary: Literal["base", "rows"] = "base"
    """Of speech by frames (CTC). base: the base's own characters, where it has some. rows: the characters
    of the training transcripts."""
    language: Text | None = None
    """What is spoken, such as english, for a model of several languages (Whisper)."""
    overlap: Annotated[int, Field(ge=0, le=2**20)] = 64
    """Tokens that the windows share which a long row is cut into."""
    augment: Augment = Augment()
    classes: dict[Text, ClassNumbers] = {}
    """Name of a class: the values in the masks, or the numbers of
    categories, that are it, for example `{animal: [16, 17, 18]}`. Pixels of other values are not learned; things of
    other categories belong to the background. Empty: every value of the training masks but 255, or every category
    of the training rows, is a class."""


class Optimizer(Section):
    """AdamW with one learning rate for each role."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: Rate = 2e-4
    """Peak learning rate of Q, r and U."""
    p_lr_ratio: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 4.0
    """P learns at lr × p_lr_ratio, with weight_decay and eps divided by it: the same as a forward scale of
    this size on the tick, without one in the artefact."""
    norm_lr: Rate = 1e-3
    """Peak learning rate of γ′ and β′."""
    head_lr: Rate = 1e-3
    """Peak learning rate of the task head."""
    weight_decay: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.01
    """Decay of Q, U, P and the head's matrices; never of r, γ′, β′ and biases."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.999,
    ]
    """AdamW's averaging coefficients."""
    eps: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-8
    """AdamW's denominator term."""
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """Largest norm of the whole gradient; null = no clipping."""


class Schedule(Section):
    """The learning rate over the run, in closed form."""

    name: Literal["linear", "cosine", "constant"] = "linear"
    """What follows the warm-up: a decay towards zero, or a constant rate. The last step's rate is not zero: of N steps
    after the warm-up, that of linear is 1/N of the peak, that of cosine about 2.5/N²."""
    warmup: Ratio = 0.06
    """Share of the steps over which the learning rate rises to its peak."""


class Training(Section):
    """The loop."""

    epochs: Count | None = None
    """Passes over the training rows; 3 when neither epochs nor steps is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: Count | None = 32
    """Examples per optimizer step; null where batch_tokens is given."""
    batch_tokens: Count | None = None
    """Tokens per optimizer step, instead of batch_size: as many examples of about one length as fit, padding counted;
    packed, as many as fit. At least data.max_length."""
    micro_batch_size: Count | None = None
    """Examples per forward pass; null = the whole batch (no accumulation)."""
    packing: bool = False
    """Several examples in a row of up to data.max_length tokens, none of which sees another: positions begin anew, and
    attention stays inside of an example. Batches are then not of about one length. run.json says how the base attends:
    inside of segments, or with masks where it cannot (soft caps, compiled on a CPU, dropout in attention on CUDA). A
    base that does not keep examples apart is refused."""
    padding_free: bool = False
    """The layers of an encoder compute the tokens of a batch without its padding, each text attending to itself alone;
    losses differ by rounding. Most is saved where batches hold texts of many lengths. Dropout draws other numbers; on
    CUDA in half precision that in attention cannot act, and a base that has some needs `base.dropout: off`. A base
    whose layers do not compute the same so is refused."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic. auto: bf16 where the device has it natively, else fp16 on CUDA and fp32 on a CPU.
    Trainable tensors and optimizer state are always float32. A step whose gradients overflow in fp16 moves no weight
    but counts: the learning rate goes on, its rows come again in the next epoch, and run.json has how many
    (skipped_steps). More than 16 in a row are an error."""
    device: Annotated[
        str,
        BeforeValidator(_plain_text),
        Field(pattern=_DEVICE),
        WithJsonSchema({"type": "string", "pattern": _DEVICE}),
    ] = "auto"
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool = False
    """Bitwise equal results on CUDA too, at some cost in speed; a CPU is always deterministic."""
    prefix_cache: Literal["off", "memory", "disk"] = "off"
    """Where only upper layers are trained: compute the frozen layers below them once for each row, before the first
    step, and keep their hidden states in memory (at most 4 GiB), or on disk in the cache directory, in a file that
    never has a name. Losses differ by rounding (1e-6 relative in fp32). It needs `base.dropout: off` where the base
    has dropout, and rows that are the same in every epoch."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the layer again there: less memory, more
    time, the same gradients."""
    ffn: Literal["split", "wide", "auto"] = "split"
    """How ticks are computed. split: beside the products of their block, which so has the base's bits. wide: in the
    same products, as wide as the merged block will be; agrees to rounding. auto: wide where a trial of some seconds
    before the first step finds it clearly faster, by 2 % or more; run.json has the choice, and two runs need not make
    the same."""
    compile: bool = False
    """Compile the layers with torch (inductor; on a CPU it needs a C++ compiler): faster steps after half a minute or
    more at the start. Losses differ by rounding."""
    cuda_graphs: bool = False
    """Record the kernels of a step once for each shape of batch, and start them with one call: steps of a small model
    are several times faster. Texts are padded to one of eight lengths, so that shapes are few; with `base.dropout: off`
    losses differ by rounding, else dropout draws other numbers. It needs a CUDA device. Tasks whose loss reads what is
    no tensor, and models that wait for the device or draw numbers on the CPU, are refused."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the initial values, the row order and dropout."""
    fast: bool = True
    """Ways of computing that are faster or keep less, and agree with the plain ones to rounding: the loss of language
    models without their logits, and their scores in evaluation; less kept for the backward pass of gated units,
    activations and norms without mean; Q and U of a gated tick in one product; on a CPU, attention in bfloat16 or with
    dropout, and dropout, which so draws other numbers than torch's. false: the plain ones; packing, padding_free,
    prefix_cache, ffn, compile and cuda_graphs must be off then."""


class Generate(Section):
    """How text is generated in evaluation and prediction."""

    max_new_tokens: Count = 128
    """Longest continuation, in tokens."""
    num_beams: Count = 1
    """Beams of the search; 1 = greedy."""
    answer: Pattern | None = None
    """For rows with prompt and response. A regular expression whose first group is the answer inside a response,
    such as `####\\s*(-?[0-9.,]+)`; the metric exact_match then counts the rows whose generated answer is that of their
    response."""


class Evaluation(Section):
    """When and by what the model is judged."""

    every: Every = "epoch"
    """Optimizer steps between evaluations, or the word epoch."""
    metric: Text = "auto"
    """The metric that chooses the best checkpoint; auto: the usual one of the problem, such as accuracy
    or perplexity."""
    save: Literal["best", "last"] = "best"
    """Which state becomes the adapter."""
    patience: Count | None = None
    """Stop after so many evaluations without a better one; null = never."""
    batch_size: Count | None = None
    """Examples per forward pass in evaluation; null = the training micro-batch's size or 32, the larger."""
    threshold: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    """Probability from which on a label is predicted, where a row can have several."""
    generate: Generate = Generate()


class Checkpoints(Section):
    """Training states on disk."""

    every: Every = 200
    """Optimizer steps between checkpoints, or the word epoch."""
    keep: Count = 2
    """How many of the newest are kept."""


class Logging(Section):
    """What is written while training."""

    every: Count = 10
    """Optimizer steps between lines of metrics.jsonl."""


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = 1
    """Version of the recipe grammar."""
    task: Annotated[Text, WithJsonSchema({"enum": list(TASKS)})]
    """What is learned; the table of tasks says what each one reads and measures."""
    base: Base
    ticks: Ticks = Ticks()
    norms: Norms = Norms()
    head: Head = Head()
    data: Data
    problem: Literal["auto", "single", "multi", "regression"] = "auto"
    """auto: regression when labels are fractional numbers, multi when they are
    lists, else single."""
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    logging: Logging = Logging()
    output: Text = "runs/{name}"
    """The run's directory, relative to the working directory; {name} is the recipe file's name."""


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ticktune recipe", **schema}
