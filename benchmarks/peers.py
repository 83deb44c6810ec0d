"""One contender of benchmarks/speed.py or accuracy.py among other tools: the Trainer, PEFT and AdapterHub.

    python -m benchmarks.peers JOB

JOB is a JSON file that these write: encoded rows, the base's directory, and what to train. Training runs without
ticktune, so any environment with torch and transformers can be the interpreter; what was found is the last line of the
output, as JSON. For speed an epoch warms up, then the trained weights are set back, and another one counts.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Method = Literal["LoRA, FFN", "LoRA, all linear", "LN-tuning", "ParBn", "full"]


class Peer(NamedTuple):
    """A tool in one of its configurations.

    Args:
        method: What is trained.
        is_best: The fastest of its documented settings instead of its defaults: batches grouped by length,
            the faster attention of transformers (:attr:`Job.attention`), and bfloat16; frozen weights and adapters are
            held in it, full fine-tuning multiplies in it (``bf16=True``).
        lr: Its constant learning rate, for the curves.
    """

    method: Method
    is_best: bool
    lr: float


ADAPTERHUB = "AdapterHub ParBn, default"
PEERS: dict[str, Peer] = {
    "Trainer + PEFT LoRA, FFN, default": Peer("LoRA, FFN", False, 1e-3),
    "Trainer + PEFT LoRA, FFN, best": Peer("LoRA, FFN", True, 1e-3),
    "Trainer + PEFT LoRA, all linear, default": Peer("LoRA, all linear", False, 1e-3),
    "Trainer + PEFT LoRA, all linear, best": Peer("LoRA, all linear", True, 1e-3),
    "Trainer + PEFT LN-tuning, default": Peer("LN-tuning", False, 1e-3),
    "Trainer + PEFT LN-tuning, best": Peer("LN-tuning", True, 1e-3),
    ADAPTERHUB: Peer("ParBn", False, 1e-4),
    "Trainer, full fine-tuning, default": Peer("full", False, 1e-4),
    "Trainer, full fine-tuning, best": Peer("full", True, 1e-4),
}


SORTED = 50
"""Batches that the Trainer, like ticktune, sorts at once where it groups rows by length, in an epoch of four times as
many or more."""


class Job(NamedTuple):
    """What one process of a peer is given.

    Args:
        contender: Its name in PEERS.
        started: When the process was started, in seconds of ``time.time``.
        rows: ``input_ids`` and ``labels`` of each row.
        batch: Rows in a step.
        warm: Steps that warm up.
        directory: Of the base: config.json, tokenizer, weights.
        config: Entries of a config whose weights are drawn at random; None: the base has weights.
        task: Entries of the config that the task needs.
        auto_class: Of the model.
        budget: Parameters that an adapter shall have, the head aside.
        attention: The faster one of transformers for these rows, ``eager`` or ``sdpa``, which is the default.
        study: What benchmarks/accuracy.py asks for; None: speed is measured.
    """

    contender: str
    started: float
    rows: list[dict[str, Any]]
    batch: int
    warm: int
    directory: str
    config: dict[str, Any] | None
    task: dict[str, Any]
    auto_class: str
    budget: int
    attention: str = "sdpa"
    study: dict[str, Any] | None = None

    @property
    def is_causal(self) -> bool:
        """Whether tokens are predicted, not classes."""
        return "CausalLM" in self.auto_class

    @property
    def peft_task(self) -> str:
        """The task as PEFT calls it."""
        return "CAUSAL_LM" if self.is_causal else "SEQ_CLS"


class Study(NamedTuple):
    """Training until validation rows are answered well enough.

    Args:
        validation: ``input_ids`` and ``labels`` of each row.
        lr: Constant learning rate.
        seed: Of the row order, of new weights and of dropout.
        epochs: At most.
        every: Steps between evaluations.
        goal: Accuracy with which training ends; see :func:`settled`.
    """

    validation: list[dict[str, Any]]
    lr: float
    seed: int
    epochs: int
    every: int
    goal: float


def settled(evaluations: Sequence[tuple[int, float, float]]) -> float:
    """Median accuracy of the last three evaluations, as a single one may pass by chance; 0 of fewer."""
    return sorted(accuracy for _, _, accuracy in evaluations[-3:])[1] if len(evaluations) >= 3 else 0.0


class Learned(NamedTuple):
    """What a study found.

    Args:
        evaluations: (steps, seconds of training, accuracy), of each evaluation.
        trained: Parameters.
    """

    evaluations: list[tuple[int, float, float]]
    trained: int


class Measured(NamedTuple):
    """What one process found.

    Args:
        seconds: Of each step, by the clock.
        cpu_seconds: Of all these steps, by this process.
        tokens: Real tokens of each step.
        losses: Of each step.
        trained: Parameters.
        first_step: Seconds from the start of the process to the end of its first step.
        peak_bytes: The most memory that the process held.
        kept_bytes: What a step of rows of middle length keeps for its backward pass, for each real token.
    """

    seconds: list[float]
    cpu_seconds: float
    tokens: list[int]
    losses: list[float]
    trained: int
    first_step: float
    peak_bytes: int
    kept_bytes: float


def middle(lengths: list[int], count: int) -> list[int]:
    """Numbers of the rows of middle length: a batch in which little is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first = (len(order) - count) // 2
    return order[first : first + count]


def peak_bytes() -> int:
    """The most memory that this process held (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(job: Job, dtype: str) -> Any:
    """The base."""
    import torch
    import transformers

    torch.manual_seed(job.study["seed"] if job.study else 0)
    auto = getattr(transformers, job.auto_class)
    options = {"attn_implementation": job.attention} if PEERS[job.contender].is_best else {}
    if job.config is None:
        return auto.from_pretrained(job.directory, dtype=getattr(torch, dtype), **job.task, **options)
    config = transformers.AutoConfig.from_pretrained(job.directory)
    config.update({**job.config, **job.task})
    return auto.from_config(config, dtype=getattr(torch, dtype), **options)


def lora(model: Any, job: Job, *, everywhere: bool, is_best: bool) -> Any:
    """PEFT's LoRA on the feed-forward blocks or on all linear projections of the layers, of about the budget."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    ffn = ("gate_proj", "up_proj", "down_proj", "intermediate.dense", "output.dense")
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ".layer" in name
        and (everywhere or (name.endswith(ffn) and ".attention." not in name))
    ]
    of_one = sum(module.in_features + module.out_features for _, module in targets)
    rank = max(1, round(job.budget / of_one))
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[name for name, _ in targets], task_type=job.peft_task
    )
    return get_peft_model(model, config, autocast_adapter_dtype=not is_best)


def layer_norms(model: Any, job: Job, *, is_best: bool) -> Any:
    """PEFT's LN-tuning, of all norms."""
    from peft import LNTuningConfig, get_peft_model

    names = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    config = LNTuningConfig(target_modules=names, task_type=job.peft_task)
    return get_peft_model(model, config, autocast_adapter_dtype=not is_best)


def parallel_bottleneck(model: Any, job: Job) -> Any:
    """AdapterHub's parallel bottleneck beside the feed-forward blocks, of about the budget."""
    import adapters  # type: ignore[import-not-found]

    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    of_layer = job.budget / layers - width  # the bias of the way up
    bottleneck = max(1, round(of_layer / (2 * width + 1)))
    adapters.init(model)
    # A little less than the quotient, as the library rounds down.
    model.add_adapter("peer", config=adapters.ParBnConfig(reduction_factor=width / (bottleneck + 0.01)))
    model.train_adapter("peer")
    if job.is_causal:
        model.get_output_embeddings().requires_grad_(False)
    return model


def build(job: Job) -> Any:
    """The model with what the contender trains."""
    peer = PEERS[job.contender]
    model = load(job, "bfloat16" if peer.is_best and peer.method != "full" else "float32")
    if peer.method == "full":
        return model.requires_grad_(True)
    if peer.method == "LN-tuning":
        return layer_norms(model, job, is_best=peer.is_best)
    if peer.method == "ParBn":
        return parallel_bottleneck(model, job)
    return lora(model, job, everywhere=peer.method == "LoRA, all linear", is_best=peer.is_best)


class Log(NamedTuple):
    """What is written down while a Trainer trains.

    Args:
        times: By the clock, when training begins and after each step.
        tokens: Real tokens of each batch.
        losses: Of each step, as tensors.
    """

    times: list[float]
    tokens: list[int]
    losses: list[Any]


def _trainer_class(peer: Peer) -> Any:
    if peer.method == "ParBn":
        from adapters import AdapterTrainer

        return AdapterTrainer
    from transformers import Trainer

    return Trainer


def make_trainer(
    model: Any, job: Job, rows: list[dict[str, Any]], log: Log, folder: str
) -> tuple[Any, Callable[..., Any]]:
    """The Trainer for one epoch of some rows, and its collator."""
    import torch
    import transformers

    peer, study = PEERS[job.contender], Study(**job.study) if job.study else None
    # It only pads here; the automatic class of older versions does not know the name of newer ones' tokenizers.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(job.directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad = (
        transformers.DataCollatorForSeq2Seq(tokenizer)
        if job.is_causal
        else transformers.DataCollatorWithPadding(tokenizer)
    )

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = pad(features)
        log.tokens.append(int(batch["attention_mask"].sum()))
        return batch

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            log.times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            log.times.append(time.perf_counter())

    class Watched(_trainer_class(peer)):  # type: ignore[misc]
        """Keeps each loss as the tensor that it is: logging every step would read and write it."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            log.losses.append(loss)
            return loss

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            """In a short epoch the Trainer would sort a few batches at once: as in a long one."""
            if study or not peer.is_best:
                return super()._get_train_sampler(train_dataset)
            from transformers.trainer_pt_utils import get_length_grouped_indices

            lengths = [len(row["input_ids"]) for row in rows]
            return get_length_grouped_indices(lengths, job.batch, SORTED, torch.Generator().manual_seed(0))

    options: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if peer.is_best else {}
    if peer.is_best and peer.method == "full":
        options["bf16"] = True
    arguments = transformers.TrainingArguments(
        folder,
        num_train_epochs=study.epochs if study else 1,
        per_device_train_batch_size=job.batch,
        learning_rate=study.lr if study else peer.lr,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        seed=study.seed if study else 0,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        **options,
    )
    work = Watched(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    return work, collate


def measure(job: Job) -> Measured:
    """Trains in this process."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = build(job)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    begin = {name: p.detach().clone() for name, p in trained.items()}
    with tempfile.TemporaryDirectory() as folder:
        log = Log([], [], [])
        make_trainer(model, job, job.rows[: job.warm * job.batch], log, folder)[0].train()
        first = time.time() - (time.perf_counter() - log.times[1]) - job.started
        for name, parameter in trained.items():
            parameter.data.copy_(begin[name])
        log = Log([], [], [])
        work, collate = make_trainer(model, job, job.rows, log, folder)
        cpu = time.process_time()
        work.train()
        cpu = time.process_time() - cpu
        peak = peak_bytes()
        chosen = middle([len(row["input_ids"]) for row in job.rows], job.batch)
        batch = work._prepare_inputs(collate([job.rows[number] for number in chosen]))
        kept = _kept(work, model, batch)
    return Measured(
        seconds=[b - a for a, b in zip(log.times, log.times[1:], strict=False)],
        cpu_seconds=cpu,
        tokens=log.tokens[: len(log.losses)],
        losses=[float(loss) for loss in log.losses],
        trained=sum(p.numel() for p in trained.values()),
        first_step=first,
        peak_bytes=peak,
        kept_bytes=kept / log.tokens[-1],
    )


def learn(job: Job, study: Study) -> Learned:
    """Trains in this process until the goal is reached or the epochs are over; evaluations take no time."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = build(job)
    found: list[tuple[int, float, float]] = []

    with tempfile.TemporaryDirectory() as folder:
        work, collate = make_trainer(model, job, job.rows, Log([], [], []), folder)

        class Evaluations(transformers.TrainerCallback):  # type: ignore[misc]
            seconds, since = 0.0, 0.0

            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.since = time.process_time()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % study.every == 0:
                    self.seconds += time.process_time() - self.since
                    accuracy = accuracy_of(work, model, collate, study.validation)
                    found.append((state.global_step, self.seconds, accuracy))
                    control.should_training_stop = settled(found) >= study.goal
                    self.since = time.process_time()

        work.add_callback(Evaluations())
        work.train()
    return Learned(found, sum(p.numel() for p in model.parameters() if p.requires_grad))


def accuracy_of(work: Any, model: Any, collate: Callable[..., Any], rows: list[dict[str, Any]]) -> float:
    """Share of rows whose class is the likeliest."""
    import torch

    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    correct = 0
    model.eval()
    with torch.no_grad(), work.compute_loss_context_manager():
        for start in range(0, len(rows), 64):
            batch = work._prepare_inputs(collate(rows[start : start + 64]))
            correct += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    return correct / len(rows)


def _kept(work: Any, model: Any, batch: Any) -> int:
    from benchmarks.counting import saved_bytes  # the only thing of ticktune's, after all that is timed

    model.train()
    with work.compute_loss_context_manager():
        return saved_bytes(model, lambda: work.compute_loss(model, batch))


def main() -> None:
    """Runs the job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    found = learn(job, Study(**job.study)) if job.study else measure(job)
    sys.stdout.write("\n" + json.dumps(found._asdict()) + "\n")


if __name__ == "__main__":
    main()
