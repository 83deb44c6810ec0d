"""What is put where: layers, norms, head, and the refusals."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import tests.models as models
import ticktune
from ticktune.errors import PatchError
from ticktune.patch.attach import (
    Plan,
    adapter_parameters,
    adapter_state,
    attach,
    attach_plan,
    attachment_of,
    base_state,
    detach,
    head_names,
    load_adapter_state,
    set_training,
    watched_ticks,
)


def _build(family: str) -> nn.Module:
    return models.families()[family]()


def _ticks(model: nn.Module) -> list[str]:
    return [key.removesuffix(".ffn") for key in attachment_of(model).ticks]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", [0, 1, 2]),
        ("none", []),
        ("last:2", [1, 2]),
        ("first:2", [0, 1]),
        ("1-2", [1, 2]),
        ([0, 2], [0, 2]),
        ({"encoder": "last:1"}, [2]),
    ],
)
def test_layer_selections(selection: Any, expected: list[int]) -> None:
    model = attach(_build("bert"), 4, selection)
    assert _ticks(model) == [f"encoder.{i}" for i in expected]
    with_tick = {
        name.split(".")[3]
        for name, _ in model.named_parameters()
        if name.startswith("bert.encoder.layer.") and ".tick." in name
    }
    assert with_tick == {str(i) for i in expected}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_layers_by_stack(family: str) -> None:
    model = attach(_build(family), 4, {"encoder": "first:1", "decoder": [1, 2]})
    assert _ticks(model) == ["encoder.0", "decoder.1", "decoder.2"]
    assert _ticks(attach(_build(family), 4, {"decoder": "last:1"})) == ["decoder.2"]
    assert len(_ticks(attach(_build(family), 4, "all"))) == 6


@pytest.mark.parametrize("selection", ["last:4", "first:4", "1-3", [3], [-1], {"encoder": [7]}])
def test_layers_out_of_range_are_refused(selection: Any) -> None:
    with pytest.raises(PatchError, match="the encoder has the layers 0 to 2"):
        attach(_build("bert"), 4, selection)


@pytest.mark.parametrize(
    "selection",
    ["frist:2", "last", "last:x", "2", "", "-", "2-1", 3.5, 3, None, True, ["a"], [True], [0.0], {"encoder": [True]}],
)
def test_layers_that_mean_nothing_are_refused(selection: Any) -> None:
    with pytest.raises(PatchError, match="ticks.layers"):
        attach(_build("bert"), 4, selection)


def test_unknown_stack_is_refused() -> None:
    with pytest.raises(PatchError, match="there is no stack decoder"):
        attach(_build("bert"), 4, {"decoder": "all"})


@pytest.mark.parametrize("dim", [0, 3])
def test_dim_is_the_number_of_units(dim: int) -> None:
    model = attach(_build("gpt2"), dim, norms="none")
    assert {tuple(p.shape) for _, role, p in adapter_parameters(model) if role == "Q"} == (
        {(dim, 48)} if dim else set()
    )
    assert attachment_of(model).plan.layers == ({"decoder": [0, 1, 2]} if dim else {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": -1}, "ticks.dim is -1, expected a whole number"),
        ({"dim": True}, "ticks.dim is True"),
        ({"dim": 2.5}, "ticks.dim is 2.5"),
        ({"dim": "4"}, "ticks.dim is '4'"),
        ({"form": "gate"}, "no form 'gate'"),
        ({"dropout": 1.0}, "ticks.dropout is 1.0"),
        ({"dropout": -0.1}, "ticks.dropout is -0.1"),
        ({"dropout": "0.1"}, "ticks.dropout is '0.1'"),
        ({"experts": "all"}, "experts='all'"),
        ({"seed": None}, "the seed is None"),
        ({"norms": None}, "norms is None, expected roles of norms"),
        ({"norms": True}, "norms is True"),
        ({"norms": [1]}, r"norms is \[1\]"),
        ({"norm_layers": "frist:2"}, "norms.layers 'frist:2' is no selection"),
        ({"norm_layers": [7]}, r"norms.layers \[7\]: the decoder has the layers 0 to 2"),
        ({"norm_layers": {"encoder": "all"}}, "norms.layers: there is no stack encoder"),
        ({"head": "yes"}, "head is 'yes'"),
    ],
)
def test_settings_that_mean_nothing_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = _build("llama")
    before = _state(model)
    with pytest.raises(PatchError, match=message):
        attach(model, **{"dim": 4, **options})
    assert _state(model) == before


def _state(model: nn.Module) -> list[Any]:
    """What an attachment changes: parameters, which are trained, hooks, the record, and the config."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return [parameters, hooks, attachment_of(model, missing_ok=True), model.config.to_dict()]


@pytest.mark.parametrize("step", ["train_norm", "_tick", "_in_own_dtype"])
@pytest.mark.parametrize("error", [TypeError, KeyboardInterrupt])
def test_a_failure_halfway_leaves_the_model_as_it_was(
    step: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ticktune.patch import attach as module

    model = _build("albert")
    before = _state(model)
    calls: list[int] = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error("halfway")
        return kept(*args, **options)

    if step == "_in_own_dtype":  # after all else
        monkeypatch.setattr(nn.Linear, "register_forward_pre_hook", fail)
        calls, kept = [1], None
    else:
        kept = getattr(module, step)
        monkeypatch.setattr(module, step, fail)
    with pytest.raises(error, match="halfway"):
        attach(model, 4, unshare=True, head=True)
    monkeypatch.undo()
    assert _state(model)[1:] == before[1:]
    # What the layers shared is one module again, as it was.
    assert [(n, r) for n, _, r in _state(model)[0]] == [(n, r) for n, _, r in before[0]]
    attach(model, 4, unshare=True)


def test_model_without_feed_forward_blocks_is_refused_with_exit_code_3() -> None:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8, state_size=4)
    with pytest.raises(PatchError, match="no feed-forward block was found: mamba: no pair of projections") as e:
        attach(MambaModel(config), 4)
    assert e.value.exit_code == 3


def test_gated_ticks_on_plain_blocks_are_refused() -> None:
    with pytest.raises(PatchError, match="gated ticks need gated feed-forward blocks"):
        attach(_build("bert"), 4, form="gated")


@pytest.mark.parametrize(
    ("family", "form", "roles"),
    [
        ("bert", "auto", "QrP"),
        ("gpt2", "plain", "QrP"),
        ("t5", "auto", "QP"),
        ("llama", "auto", "QUP"),
        ("llama", "plain", "QrP"),
        ("phi3", "gated", "QUP"),
        ("t5-gated", "auto", "QUP"),
        ("t5-gated", "plain", "QrP"),
    ],
)
def test_parameters_of_a_tick_by_role(family: str, form: str, roles: str) -> None:
    model = attach(_build(family), 4, form=form, norms="none")
    for key in _ticks(model):
        own = {role: tuple(p.shape) for k, role, p in adapter_parameters(model) if k.startswith(f"{key}.ffn.")}
        shapes = {"Q": (4, 48), "r": (4,), "U": (4, 48), "P": (48, 4)}
        assert own == {role: shapes[role] for role in roles}


# Norms that stay as they are: of convolutions, of embeddings between stages, of the head where that is not trained.
LEFT = {
    **dict.fromkeys(("modernbert", "modernbert-bias"), r"^head\."),
    "swin": r"downsample",
    "segformer": r"patch_embeddings|sequence_reduction|stages\.\d+\.layer_norm",
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), r"feature_extractor|feature_projection"),
    "audio-spectrogram-transformer": r"^classifier\.",
}


@pytest.mark.parametrize("family", list(models.families()))
def test_exactly_the_adapter_requires_gradients(family: str) -> None:
    model = attach(_build(family), 4)
    parameters = list(adapter_parameters(model))
    assert len({key for key, _, _ in parameters}) == len(parameters)
    assert {id(p) for _, _, p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {p.dtype for _, _, p in parameters} == {torch.float32}
    # Every feed-forward block and every norm of the model is in the table.
    norms = {id(p) for m in model.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    trained = {id(p) for _, role, p in parameters if role == "norm"}
    missing = [name for name, p in model.named_parameters() if id(p) in norms - trained]
    left = re.compile(r"[qk]_norm|\.head\.|" + LEFT.get(family, "^$"))
    assert [name for name in missing if not left.search(name)] == []
    assert family not in LEFT or any(re.search(LEFT[family], name) for name in missing)


def _slots(model: nn.Module) -> set[str]:
    return {key.rpartition(".")[2] for key in attachment_of(model).plan.norms}


@pytest.mark.parametrize(
    ("family", "slots"),
    [
        ("bert", {"embedding", "attention", "ffn"}),
        ("gpt2", {"attention", "ffn", "final"}),
        ("qwen3", {"attention", "ffn", "final"}),
        ("t5", {"attention", "cross_attention", "ffn", "final"}),
        ("bart", {"embedding", "attention", "cross_attention", "ffn"}),
    ],
)
def test_norm_roles_by_default(family: str, slots: set[str]) -> None:
    assert _slots(attach(_build(family), 4)) == slots


def test_q_and_k_norms_are_trained_when_named() -> None:
    model = attach(_build("qwen3"), 4, norms=["q", "k"])
    assert attachment_of(model).plan.norms == [f"decoder.{i}.norm.{slot}" for i in range(3) for slot in "qk"]


def test_named_norm_roles_only() -> None:
    model = attach(_build("t5"), 4, norms=["cross_attention", "final"])
    assert _slots(model) == {"cross_attention", "final"}
    assert "encoder.norm.final" in attachment_of(model).plan.norms
    assert _slots(attach(_build("bert"), 4, norms="none")) == set()


def test_norm_role_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(PatchError, match="no cross_attention norm"):
        attach(_build("bert"), 4, norms=["attention", "cross_attention"])
    with pytest.raises(PatchError, match="no al norm"):
        attach(_build("bert"), 4, norms="al")


def test_norms_follow_the_layers_of_the_ticks() -> None:
    model = attach(_build("gpt2"), 4, "last:1")
    assert attachment_of(model).plan.norms == [
        "decoder.2.norm.attention",
        "decoder.2.norm.ffn",
        "decoder.norm.final",
    ]


def test_embedding_norm_is_trained_only_with_all_layers() -> None:
    assert "encoder.norm.embedding" in attachment_of(attach(_build("bert"), 4, "all")).plan.norms
    assert "encoder.norm.embedding" not in attachment_of(attach(_build("bert"), 4, "0-2")).plan.norms
    both = attach(_build("bert"), 4, "last:1", norm_layers="all")
    assert len(attachment_of(both).plan.norms) == 7
    one = attach(_build("bart"), 4, {"encoder": "all", "decoder": [0]})
    embeddings = [key for key in attachment_of(one).plan.norms if key.endswith("embedding")]
    assert embeddings == ["encoder.norm.embedding"]


def test_head_auto_trains_an_existing_classification_head() -> None:
    model = attach(_build("bert"), 4)
    assert attachment_of(model).plan.head == ["classifier.weight", "classifier.bias"]
    assert attachment_of(attach(_build("vit"), 4)).plan.head == ["classifier.weight", "classifier.bias"]
    roberta = attachment_of(attach(_build("roberta"), 4)).plan.head
    assert {name.rpartition(".")[0] for name in roberta} == {"classifier.dense", "classifier.out_proj"}


def test_head_true_trains_the_pooler_too() -> None:
    head = attachment_of(attach(_build("bert"), 4, head=True)).plan.head
    assert set(head) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_head_false_trains_none() -> None:
    model = attach(_build("bert"), 4, head=False)
    assert attachment_of(model).plan.head == []
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("classifier"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5", "bart"])
def test_language_model_head_is_never_trained(family: str) -> None:
    model = _build(family)
    assert head_names(model, "auto") == []
    with pytest.raises(PatchError, match="language-model head is part of the base"):
        head_names(model, True)
    attach(model, 4)
    output = model.get_output_embeddings()
    assert not output.weight.requires_grad


def test_fresh_pooler_is_trained_and_a_fresh_base_parameter_refused() -> None:
    model = _build("bert")
    assert "bert.pooler.dense.weight" in head_names(model, "auto", ["bert.pooler.dense.weight"])
    assert "bert.pooler.dense.weight" not in head_names(model, "auto", ["classifier.weight"])
    for name in ("bert.encoder.layer.1.output.dense.weight", "bert.embeddings.word_embeddings.weight"):
        for train in ("auto", True, False):
            with pytest.raises(PatchError, match=f"the checkpoint lacks the base parameter {name}"):
                head_names(model, train, ["classifier.weight", name])  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="lacks the base parameter lm_head.weight"):
        attach(_build("llama"), 4, fresh=["lm_head.weight"])


def test_model_without_a_head_trains_its_fresh_pooler_only() -> None:
    body = _build("bert").bert
    assert head_names(body, "auto") == []
    assert head_names(body, "auto", ["pooler.dense.weight"]) == ["pooler.dense.weight"]


def test_float32_head_on_a_bfloat16_body_runs() -> None:
    model = attach(_build("bert").to(torch.bfloat16), 4, head=True)
    logits = model(**models.inputs(model)).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert model.classifier.weight.grad.dtype == torch.float32


def test_a_head_with_a_batch_norm_runs_on_a_bfloat16_body_and_comes_back() -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = {"depths": [1, 1], "hidden_sizes": [8, 16], "sr_ratios": [2, 1], "num_attention_heads": [1, 2]}
    small |= {"patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}
    model = SegformerForSemanticSegmentation(SegformerConfig(num_encoder_blocks=2, num_labels=3, **small)).eval()
    model = attach(model.to(torch.bfloat16), 4, head=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).logits.sum().backward()
    assert model.decode_head.batch_norm.weight.grad is not None
    assert detach(model).decode_head.batch_norm.running_mean.dtype == torch.bfloat16


def test_second_attach_is_refused_and_possible_after_detach() -> None:
    model = attach(_build("bert"), 4)
    with pytest.raises(PatchError, match="has ticks already"):
        ticktune.attach(model, 4)
    attach(detach(model), 5)
    assert attachment_of(model).plan.dim == 5
    with pytest.raises(PatchError, match="has no ticks"):
        detach(_build("bert"))


@pytest.mark.parametrize(
    "change",
    [
        {"norms": ["encoder.9.norm.ffn"]},
        {"head": ["score.weight"]},
        {"head": ["nowhere.at.all"]},
        {"layers": {"encoder": [9]}},
        {"layers": {"decoder": [0]}},
        {"form": "gated"},
    ],
)
def test_plan_that_does_not_fit_leaves_the_model_as_it_was(change: dict[str, Any]) -> None:
    model = _build("bert")
    before = _state(model)
    entries: dict[str, Any] = {"form": "plain", "dim": 4, "layers": {"encoder": [0]}, "norms": [], "head": []}
    with pytest.raises(PatchError):
        attach_plan(model, Plan(**{**entries, **change}))
    assert _state(model) == before
    attach(model, 4)


def test_seed_decides_the_ticks() -> None:
    one, two, three = (attach(_build("bert"), 4, seed=seed, head=False, norms="none") for seed in (1, 1, 2))
    assert all(torch.equal(adapter_state(one)[key], value) for key, value in adapter_state(two).items())
    assert not torch.equal(adapter_state(one)["encoder.0.ffn.Q"], adapter_state(three)["encoder.0.ffn.Q"])
    assert not torch.equal(adapter_state(one)["encoder.0.ffn.Q"], adapter_state(one)["encoder.1.ffn.Q"])


def test_attach_draws_nothing_from_the_global_generator() -> None:
    model = _build("bert")
    state = torch.get_rng_state()
    attach(model, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_base_state_is_the_base_without_ticks_and_head() -> None:
    model = _build("bert").to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" not in name}
    attach(model, 4)
    models.perturb(p for _, _, p in adapter_parameters(model))
    found = base_state(model)
    assert found.keys() == before.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], before[name]) for name in before)


def test_adapter_state_is_loaded_strictly() -> None:
    model = attach(_build("bert"), 4)
    state = {key: torch.randn_like(tensor) for key, tensor in adapter_state(model).items()}
    load_adapter_state(model, state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(model).items())
    key = "encoder.1.ffn.Q"
    for changed, message in (
        ({k: v for k, v in state.items() if k != key}, f"{key} is missing"),
        (state | {"encoder.9.ffn.Q": state[key]}, "encoder.9.ffn.Q has no place"),
        (state | {key: state[key].T}, r"\(48, 4\), expected \(4, 48\)"),
        (state | {key: state[key].half()}, "torch.float16, expected float32"),
    ):
        with pytest.raises(PatchError, match=message):
            load_adapter_state(model, {k: v + 1 if k != key else v for k, v in changed.items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(model).items())


def test_training_mode_of_base_and_ticks() -> None:
    model = attach(_build("bert"), 4, dropout=0.1)
    ticks = attachment_of(model).ticks.values()
    for training, base_dropout, base, tick in (
        (True, True, True, True),
        (True, False, False, True),
        (False, True, False, False),
    ):
        set_training(model, training, base_dropout=base_dropout)
        assert all(t.training == tick for t in ticks)
        assert model.bert.encoder.layer[0].training == base


def test_the_running_means_of_a_frozen_base_stay_in_training() -> None:
    model = attach(_build("segformer"), 4)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    pixels = torch.randn(3, 3, 32, 32)
    set_training(model, False)
    expected = model.decode_head(model.segformer(pixels, output_hidden_states=True).hidden_states)
    set_training(model, True)
    model.decode_head.dropout.eval()
    model.segformer.eval()
    found = model.decode_head(model.segformer(pixels, output_hidden_states=True).hidden_states)
    assert torch.equal(found, expected)
    assert len(norms) == 1
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)


def test_ticks_take_the_mode_of_the_model() -> None:
    assert not any(t.training for t in attachment_of(attach(_build("bert").eval(), 4)).ticks.values())
    assert all(t.training for t in attachment_of(attach(_build("bert").train(), 4)).ticks.values())


def test_ticks_that_run_are_seen() -> None:
    model = attach(_build("t5"), 4, norms="none")
    encoder, ids = model.get_encoder(), torch.tensor([[4, 5]])
    with watched_ticks(model) as ran:
        encoder(input_ids=ids)
    assert {key: key.startswith("encoder") for key in ran} == ran
    with watched_ticks(model) as ran:
        model(input_ids=ids, decoder_input_ids=ids)
    assert all(ran.values())
    assert len(ran) == 6


def test_an_expert_without_tokens_has_not_run() -> None:
    model = attach(_build("mixtral"), 4, [1], norms="none")
    with watched_ticks(model) as ran, torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert list(ran) == [f"decoder.1.experts.{i}" for i in range(4)]
    assert sum(ran.values()) == 2
