"""Bytes per rank: exact counts, what each strategy shards, and a step's walk against autograd and real steps."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.family.variants import FAMILIES, Shape
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.fused_layers import install_fused_layers
from phi3_dist.modeling.fused_lora import install_fused
from phi3_dist.planning.activation_memory import Step, saved_by_layer
from phi3_dist.planning.launch_configs import deepspeed_json
from phi3_dist.planning.memory import (
    GIB,
    SHIPPED_ZERO,
    Term,
    Workload,
    adapter_parameters,
    fits,
    memory_terms,
    total_gib,
)
from phi3_dist.planning.memory_moments import step_moments

# peft 0.21 asks transformers 5.24 for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BY_NAME = {family.name: family.shape for family in FAMILIES}
MINI = BY_NAME["mini-4k"]
R16 = 25_165_824


def gib(load: Workload, place: str = "device") -> dict[str, float]:
    found: dict[str, float] = {}
    for term in memory_terms(MINI, R16, load):
        if term.place == place:
            found[term.name] = found.get(term.name, 0.0) + term.gib
    return found


@pytest.mark.parametrize(
    ("name", "trainable"),
    [("mini-4k", R16), ("medium-4k", 55_705_600), ("Phi-4", 55_705_600), ("Phi-4-mini", 23_068_672)],
)
def test_adapter_counts(name: str, trainable: int) -> None:
    assert adapter_parameters(BY_NAME[name], 16) == trainable


def test_adapter_counts_of_parts() -> None:
    assert adapter_parameters(MINI, 16, ["o_proj", "down_proj", "q_proj"]) == 8_912_896  # the public notebook's list
    assert adapter_parameters(MINI, 16, ["mlp.down_proj"]) == 32 * 16 * (8192 + 3072)
    assert adapter_parameters(MINI, 16, dora=True) - R16 == 32 * (9216 + 3072 + 16384 + 3072)
    assert adapter_parameters(MINI, 16, modules_to_save=["lm_head"]) - R16 == 32064 * 3072


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_count_equals_peft(dora: bool) -> None:
    shape = Shape(2, 96, 256, 4, 2, 24, 64)
    adapter = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], use_dora=dora, modules_to_save=["lm_head"])
    model = get_peft_model(Phi3ForCausalLM(hf_config(shape)), adapter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(shape, 4, ["qkv_proj", "down_proj"], dora=dora, modules_to_save=["lm_head"]) == trainable


def test_terms_of_one_device() -> None:
    terms = gib(Workload("single", 1, "bf16"))
    assert terms["base weights"] == pytest.approx(3_821_079_552 * 2 / GIB)
    assert terms["adapter"] == terms["gradients"] == pytest.approx(R16 * 4 / GIB)
    assert terms["optimizer"] == pytest.approx(R16 * 8 / GIB)
    assert terms["logits (upper bound)"] == pytest.approx(512 * 32064 * 6 / GIB)  # bf16, and its float32 copy
    on_cpu = Step(2048, 1.0, "fp32", 0.0, "cpu", "torch", 16)
    (at_loss,) = (one for one in step_moments(MINI, on_cpu, selects=True) if one.name == "the loss")
    assert at_loss.bytes_by_use["logits"] == 128 * 32064 * 4
    whole = gib(Workload("zero2", 2, "bf16", chunked=False))
    assert whole["logits (upper bound)"] == pytest.approx(2048 * 32064 * 16 / GIB)
    assert "gathered weights" not in terms


@pytest.mark.parametrize(
    ("strategy", "sharded"),
    [
        ("ddp", set()),
        ("zero1", {"optimizer"}),
        ("zero2", {"optimizer", "gradients"}),
        ("zero3", {"optimizer", "gradients", "adapter", "base weights"}),
        ("fsdp2", {"optimizer", "gradients", "adapter", "base weights"}),
    ],
)
def test_what_each_strategy_shards(strategy: str, sharded: set[str]) -> None:
    alone, four = (gib(Workload(strategy, world, "fp32", accumulation=2)) for world in (1, 4))
    if strategy == "fsdp2":  # whole until the last micro batch of a step
        assert four.pop("gradients") == alone.pop("gradients")
        sharded = sharded - {"gradients"}
        alone["gradients"] = four["gradients"] = 0.0
    for name in ("base weights", "adapter", "gradients", "optimizer"):
        assert four[name] == pytest.approx(alone[name] / 4 if name in sharded else alone[name]), name


@pytest.mark.parametrize(
    ("name", "layers", "checkpointing", "measured_gib"),
    [
        ("mini-4k", 3, False, 1.600),
        ("mini-4k", 4, True, 1.260),
        ("Phi-4-mini", 2, True, 2.994),
        ("Phi-4-mini", 6, True, 3.095),
    ],
)
def test_zero3_holds_what_was_measured_on_fake_cuda_tensors(
    name: str, layers: int, checkpointing: bool, measured_gib: float
) -> None:
    """Eight ranks, 2,048 tokens of which half are supervised, dropout 0.05 (`python -m phi3_dist.bench.memory`)."""
    shape = replace(BY_NAME[name], layers=layers)
    trainable = adapter_parameters(shape, 16)
    zero = json.loads(deepspeed_json("zero3"))["zero_optimization"]
    load = Workload(
        "zero3",
        8,
        "bf16",
        supervised=0.5,
        dropout=0.05,
        accumulation=1,
        activation_checkpointing=checkpointing,
        zero=zero,
    )
    found = total_gib(memory_terms(shape, trainable, load))
    assert -0.01 <= found / measured_gib - 1 <= 0.03


def test_what_is_whole_for_a_while_where_weights_are_shared_out() -> None:
    def whole(shape: Shape, load: Workload) -> float:
        terms = memory_terms(shape, 786_432 * shape.layers, load)
        return next(term.gib for term in terms if term.name == "gathered weights")

    zero3 = Workload("zero3", 8, "bf16", supervised=0.5, dropout=0.05)
    keeps_all = replace(zero3, zero={"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9})
    assert whole(MINI, keeps_all) > 1.8 * whole(MINI, zero3)
    # buffers and copies beside what may be whole at once, and no more with a deeper model
    assert whole(MINI, zero3) * GIB < 2 * 2 * 300e6
    assert whole(MINI, zero3) == pytest.approx(whole(replace(MINI, layers=16), zero3), rel=0.02)
    tables = 2 * 32064 * 3072 * 2 / GIB
    assert whole(MINI, Workload("fsdp2", 8, "bf16")) > tables + 2 * 113_246_208 * 2 / GIB


def test_shipped_settings_are_those_of_the_account() -> None:
    zero = json.loads(deepspeed_json("zero3"))["zero_optimization"]
    held = {name: value for name, value in SHIPPED_ZERO.items() if name != "stage3_prefetch_bucket_size"}
    assert {name: zero[name] for name in held} == held
    assert json.loads(deepspeed_json("zero2"))["zero_optimization"]["reduce_bucket_size"] == 10_000_000


@pytest.mark.parametrize(
    ("tokens", "layers", "step", "measured_mib"),
    [
        (4096, 3, {}, 1240.2),
        (4096, 5, {}, 2149.3),
        (1024, 5, {"dropout": 0.0}, 465.0),
        (2048, 4, {"by": "triton"}, 722.4),
        (4096, 5, {"checkpointing": True}, 712.4),
    ],
)
def test_a_step_holds_what_was_measured_on_fake_cuda_tensors(
    tokens: int, layers: int, step: dict[str, Any], measured_mib: float
) -> None:
    """Mini's widths, half of the tokens supervised; what lived at the peak, logits aside, in MiB."""
    shape = Shape(layers, 3072, 8192, 32, 32, 96, 32064)
    plain = Step(tokens, 0.5, "bf16", 0.05, "cuda", "torch", 16, copies=True, adapter_per_layer=786_432)
    step_of = replace(plain, **step)
    highest = max(step_moments(shape, step_of, selects=True), key=lambda moment: moment.total)
    found = highest.total - highest.bytes_by_use.get("logits", 0.0)
    assert found / 2**20 == pytest.approx(measured_mib, rel=0.005)


@pytest.mark.parametrize(
    ("strategy", "moved"),
    [
        ("zero2_offload", {"optimizer", "gradients"}),
        ("zero3_offload", {"optimizer", "gradients", "adapter", "base weights"}),
        ("fsdp2_offload", {"optimizer", "gradients", "adapter", "base weights"}),
    ],
)
def test_offload_moves_terms_to_the_host(strategy: str, moved: set[str]) -> None:
    load = Workload(strategy, 2, "bf16")
    assert set(gib(load, "host")) == moved
    plain = gib(Workload(strategy.removesuffix("_offload"), 2, "bf16"))
    assert gib(load, "host").items() | gib(load).items() == plain.items()


def test_deepspeed_in_bf16_keeps_a_float32_master() -> None:
    terms = gib(Workload("zero1", 2, "bf16"))
    assert terms["adapter"] == pytest.approx(R16 * 2 / GIB)
    assert terms["optimizer"] == pytest.approx(R16 * 12 / 2 / GIB)


def test_quantised_base() -> None:
    rest = MINI.parameters - MINI.linear_parameters
    terms = gib(Workload("single", 1, "bf16", "nf4"))
    nf4 = terms["base weights"]
    assert nf4 * GIB == pytest.approx(MINI.linear_parameters * 0.5 + rest * 2)
    assert terms["quantisation constants"] * GIB == pytest.approx(MINI.linear_parameters * (1 / 64 + 1 / 4096))
    sharded = gib(Workload("fsdp2", 8, "bf16", "nf4"))
    assert sharded["base weights"] == pytest.approx(nf4 / 8)
    assert sharded["quantisation constants"] == terms["quantisation constants"]  # every rank has them whole
    int8 = gib(Workload("single", 1, "bf16", "int8"))["base weights"]
    assert nf4 < int8 < gib(Workload("single", 1, "bf16"))["base weights"]


def test_everything_is_on_the_host_of_a_cpu() -> None:
    terms = memory_terms(MINI, R16, Workload("ddp", 2, "fp32", device="cpu"))
    assert {term.place for term in terms} == {"host"}


def test_fits_keeps_a_reserve() -> None:
    terms = (Term("a", 8.0, ""), Term("b", 1.0, ""), Term("c", 100.0, "", "host"))
    assert total_gib(terms) == 9.0
    assert fits(terms, 10.0)
    assert not fits(terms, 9.9)
    assert fits(terms, 9.0, reserve=0.0)


def hf_config(shape: Shape) -> Phi3Config:
    return Phi3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation="sdpa",
    )


def kept_by_autograd(shape: Shape, tokens: int, dtype: torch.dtype, dropout: float, *, fused: bool = False) -> int:
    """Bytes of distinct storages, parameters aside, that autograd saves in one forward pass of a PEFT Phi-3."""
    adapter = LoraConfig(r=2, lora_dropout=dropout, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    model = get_peft_model(Phi3ForCausalLM(hf_config(shape)).to(dtype), adapter).train()
    packed: dict[str, Any] = {}
    if fused:
        use_backend(model.get_base_model(), "sdpa")
        install_fused(model)
        install_fused_layers(model)
        packed = {"position_ids": torch.arange(tokens)[None], "lengths": (tokens,)}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids_T = torch.arange(tokens)[None] % shape.vocab
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=fused and dtype == torch.bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model.model.model(input_ids=ids_T, use_cache=False, **packed).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_layer_keeps_is_within_three_percent(precision: str, dropout: float, kv_heads: int, fused: bool) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    two, four = (Shape(layers, 192, 512, 4, kv_heads, 48, 64) for layers in (2, 4))
    tokens = 512 if fused else 64  # so that the adapter's 16-bit copies, which no token adds to, weigh little
    real = kept_by_autograd(four, tokens, dtype, dropout, fused=fused)
    real -= kept_by_autograd(two, tokens, dtype, dropout, fused=fused)
    by = "torch" if fused else "library"
    step = Step(tokens, 1.0, precision, dropout, "cpu", by, 2, whole_attention=True)
    assert real == pytest.approx(2 * saved_by_layer(two, step).total, rel=0.03)


def test_checkpointing_keeps_an_input_per_layer_and_one_layer() -> None:
    def held(layers: int, checkpointing: bool) -> float:
        step = Step(10, 1.0, "bf16", 0.0, "cuda", "torch", 4, checkpointing)
        moments = step_moments(Shape(layers, 192, 512, 4, 4, 48, 64), step, selects=False)
        return max(moment.total for moment in moments)

    assert held(9, True) - held(8, True) == 10 * 192 * 2
    assert held(9, True) < held(9, False) / 3
