"""The state of training: every optimizer goes on to the bit, and what was planned is what every tensor is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from phi3_dist.config.schema import LoraConfig, OptimConfig
from phi3_dist.errors import PlanError, TrainingError
from phi3_dist.modeling import base as base_module
from phi3_dist.modeling.base import find_base, load_full, load_quantized
from phi3_dist.modeling.lora import add_lora
from phi3_dist.training import runtime as runtime_module
from phi3_dist.training.checkpoints.state import BLOCKS, export_state, import_state
from phi3_dist.training.engines.backward_and_update import TorchEngine
from phi3_dist.training.engines.optimizer import make_optimizer
from phi3_dist.training.engines.zero_state import new_moments, step_count
from phi3_dist.training.plan_proof import prove_built_dtypes, prove_updated_dtypes

CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")


def _engine(name: str) -> TorchEngine:
    """One matrix large enough for 8-bit moments, one that bitsandbytes leaves in 32 bits, and a vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3, bias=False))
    return TorchEngine(model, make_optimizer(model, OptimConfig(name=name, lr=1e-2), CPU), 1, 1.0)  # type: ignore[arg-type]


def _step(engine: TorchEngine, number: int) -> None:
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(number))
    engine.backward(engine.model(x).square().mean())
    engine.update(1e-2)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_state_to_the_bit(name: str) -> None:
    whole, before, after = _engine(name), _engine(name), _engine(name)
    for number in range(3):
        _step(whole, number)
        _step(before, number)
    state = export_state(before, keep=True)
    import_state(after, state, 3)
    for number in range(3, 6):
        _step(whole, number)
        _step(after, number)
    for ours, theirs in zip(after.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again, expected = export_state(after, keep=True), export_state(whole, keep=True)
    assert set(again) == set(expected)
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    bytes_kept = {key for key, value in state.items() if value.dtype == torch.uint8}
    assert bool(bytes_kept) == name.endswith("8bit")
    assert export_state(whole, keep=False) == {}


def test_a_checkpoint_of_another_optimizer_is_refused_by_name() -> None:
    state = export_state(_stepped("adamw"), keep=True)
    with pytest.raises(TrainingError, match=f"{BLOCKS[0]}/0.weight holds nothing"):
        import_state(_engine("adamw_8bit"), state, 1)


def _stepped(name: str) -> TorchEngine:
    engine = _engine(name)
    _step(engine, 0)
    return engine


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_the_count_of_steps_is_where_the_update_runs(fused: bool, device: str) -> None:
    """`meta` stands for a GPU: torch's AdamW of one kernel refuses a count on the host."""
    flat = torch.zeros(4, device="meta")
    optimizer = SimpleNamespace(param_groups=[{"fused": fused}], state={})
    assert step_count(optimizer, flat, 7).device.type == device
    zero = SimpleNamespace(single_partition_of_fp32_groups=[flat], optimizer=optimizer)
    new_moments(zero, 7)
    assert optimizer.state[flat]["step"].device.type == device
    assert optimizer.state[flat]["exp_avg"].device.type == "meta"


# --- the proof at start -----------------------------------------------------------------------------------------------


def _tiny(dtype: torch.dtype, **lora: Any) -> TorchEngine:
    config = LoraConfig(r=4, **lora)
    model = add_lora(load_full(find_base("tiny-random"), dtype, CPU), config, "tiny-random")
    return TorchEngine(model, make_optimizer(model, OptimConfig(), CPU), 1, 1.0)


def _planned(dtype: torch.dtype) -> Any:
    return SimpleNamespace(dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [(), ("lm_head",), ("embed_tokens",)])
def test_what_trains_is_float32_and_what_is_frozen_is_as_planned(dtype: torch.dtype, saved: tuple[str, ...]) -> None:
    engine = _tiny(dtype, modules_to_save=saved)
    prove_built_dtypes(engine, _planned(dtype))
    assert {p.dtype for p in engine.model.parameters() if p.requires_grad} == {torch.float32}
    embedding: Any = engine.model
    assert embedding.get_input_embeddings()(torch.tensor([1])).dtype == dtype


@pytest.mark.parametrize(("part", "dtype"), [("lora_B", torch.bfloat16), ("mlp.down_proj.base_layer", torch.float16)])
def test_one_tensor_of_another_dtype_is_refused_by_name(part: str, dtype: torch.dtype) -> None:
    engine = _tiny(torch.float32)
    name, param = next((n, p) for n, p in engine.model.named_parameters() if part in n)
    param.data = param.data.to(dtype)
    with pytest.raises(PlanError, match="float32 was planned") as caught:
        prove_built_dtypes(engine, _planned(torch.float32))
    assert caught.value.problems[0].where == f"dtype of {name}"


def test_moments_of_another_dtype_are_refused_after_the_first_step() -> None:
    engine = _stepped("adamw")
    prove_updated_dtypes(engine)
    first = next(iter(engine.optimizer.state.values()))
    first["exp_avg"] = first["exp_avg"].bfloat16()
    with pytest.raises(PlanError, match=r"exp_avg of 0\.weight: is bfloat16"):
        prove_updated_dtypes(engine)
    prove_updated_dtypes(_stepped("adamw_8bit"))


# --- a quantised base goes where the plan says ------------------------------------------------------------------------


@pytest.mark.parametrize("zero3", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_quantised_base_is_loaded_onto_the_planned_device(
    device: str, zero3: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told no device transformers takes a GPU where there is one; under ZeRO-3 it refuses to be told."""
    from transformers.integrations import deepspeed as integration

    class Three:
        def __init__(self) -> None:
            self.config: dict[str, Any] = {}

        def is_zero3(self) -> bool:
            return True

    seen: dict[str, Any] = {}

    def from_pretrained(_folder: Path, **options: Any) -> Any:
        seen.update(options, zero3=integration.is_deepspeed_zero3_enabled())
        return nn.Module()

    base = find_base("tiny-random")
    held = Three()
    if zero3:
        integration.set_hf_deepspeed_config(held)
    monkeypatch.setattr(base_module.Phi3ForCausalLM, "from_pretrained", from_pretrained)
    try:
        base = base_module.Base(str(tmp_path), base.config, tmp_path, base.weights)
        load_quantized(base, "nf4", torch.bfloat16, torch.device(device), held if zero3 else None)
        assert integration.is_deepspeed_zero3_enabled() is zero3
    finally:
        integration.unset_hf_deepspeed_config()
    assert seen["device_map"] == {"": torch.device(device)}
    assert seen["zero3"] is False


def test_host_tensors_get_a_backend_beside_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2's offload takes a norm of shards on the host, which NCCL alone cannot add up."""
    asked: list[Any] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, device_id: asked.append(backend))
    runtime_module._start_both_backends()
    assert asked == [torch.device("cuda", 3), "cuda:nccl,cpu:gloo"]
