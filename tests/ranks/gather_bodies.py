"""What each rank does in test_gather_ranks.py, and the small models that the unit tests use too."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_dist.adapters.files import save_adapter
from phi3_dist.adapters.gather import gather_adapter_with_stats
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.adapters.select import expected_keys
from phi3_dist.errors import AdapterError

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "rslora": {"use_rslora": True, "r": 3},
}


def tiny_phi3() -> Phi3ForCausalLM:
    """A Phi-3 of 0.1 M parameters with fixed random weights; its odd sizes leave uneven shards."""
    config = Phi3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=90,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=None,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Phi3ForCausalLM(config)


def seeded(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator)


def tiny_peft(kind: str = "lora", seed: int = 1) -> PeftModel:
    """The tiny Phi-3 with an adapter whose every trainable value is drawn by its name and `seed`."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **KINDS[kind]}
    model = get_peft_model(tiny_phi3(), LoraConfig(**options))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.copy_(seeded(name, param.shape, seed))
    return model


class Wrapper(nn.Module):
    """Holds a PEFT model as a training loop might."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.inner(input_ids=ids, labels=ids).loss
        return loss


def reference(kind: str, seed: int) -> dict[str, Tensor]:
    """One process's adapter, by PEFT's own code."""
    return {k: v.clone() for k, v in get_peft_model_state_dict(tiny_peft(kind, seed)).items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def check_gather(model: nn.Module, kind: str, seed: int, bucket_mib: int = 64) -> dict[str, Any]:
    """Gather and compare with one process: equal on rank 0, nothing elsewhere. The rank's facts."""
    tensors, stats = gather_adapter_with_stats(model, bucket_mib=bucket_mib)
    expected = reference(kind, seed)
    assert {k: (v.shape, v.dtype) for k, v in expected.items()} == expected_keys(model)
    if dist.get_rank() == 0:
        assert same(tensors, expected), f"{kind}: rank 0 gathered other values than one process has"
    else:
        assert tensors == {}, "a rank other than 0 kept tensors"
    assert stats.tensor_bytes == sum(v.nbytes for v in expected.values())
    assert stats.tensors == len(expected)
    return {"moved": stats.moved_bytes, "size": stats.tensor_bytes, "buckets": stats.buckets}


def one_backward(model: nn.Module) -> None:
    """A forward and backward pass, so that the gather meets an engine in the state that training leaves it in."""
    ids = torch.arange(12).reshape(1, 12)
    model(ids).backward()


def agreement(model: nn.Module, poisoned: Tensor | None) -> str:
    """One rank's adapter is not finite: every rank must raise the same words, soon."""
    if poisoned is not None:
        with torch.no_grad():
            poisoned.view(-1)[0] = float("nan")
    try:
        gather_adapter_with_stats(model)
    except AdapterError as error:
        return str(error)
    return "no error"


def run(cases: dict[str, dict[str, Any]], deepspeed: bool = False) -> dict[str, Any]:
    """Several bodies (`name: {"body": …, arguments}`) one after the other in one gloo group: a start costs seconds."""
    if deepspeed:
        import deepspeed as ds

        ds.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    bodies: dict[str, Any] = {
        "ddp": ddp,
        "disagree": disagree,
        "bug": bug_on_one_rank,
        "zero": zero,
        "fsdp2": fsdp2,
        "small_buckets": small_buckets,
    }
    results = {}
    for name, arguments in cases.items():
        try:
            results[name] = bodies[arguments.pop("body")](**arguments)
        except Exception as error:
            error.add_note(f"in case {name}")
            raise
        gc.collect()  # models must be gone before their group is: the end of a DDP model would wait for it
    dist.destroy_process_group()
    return results


# --- DDP --------------------------------------------------------------------------------------------------------------


def ddp(folder: str) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Wrapper(tiny_peft()))
    one_backward(model)
    facts = check_gather(model, "lora", 1)
    _set_values(model, 2)
    facts |= check_gather(model, "lora", 2)
    receipt = save_adapter(model, Path(folder) / "adapter")
    assert (receipt is None) == (dist.get_rank() != 0)
    tensors, _ = read_adapter(Path(folder) / "adapter")  # complete on every rank when save_adapter returns
    assert same(tensors, reference("lora", 2))
    facts["write_failure"] = _message(lambda: save_adapter(model, Path(folder) / "a_file" / "adapter"))
    facts["not_finite"] = agreement(model, next(_trainables(model))[1] if dist.get_rank() == 0 else None)
    return facts


def disagree() -> str:
    """Ranks with different adapters: refused on both before anything moves."""
    return _message(lambda: gather_adapter_with_stats(tiny_peft("lora" if dist.get_rank() == 0 else "rslora")))


def bug_on_one_rank() -> str:
    """An exception that is not an AdapterError on rank 1 stays itself there and reaches rank 0 as an AdapterError."""
    from phi3_dist.adapters.gather import raised_together

    try:
        with raised_together():
            if dist.get_rank() == 1:
                raise ZeroDivisionError("a bug")
    except (AdapterError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _message(call: Any) -> str:
    try:
        call()
    except AdapterError as error:
        return str(error)
    return "no error"


def _trainables(model: nn.Module) -> Any:
    """Trainables under the names that `tiny_peft` draws by."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield "base_model." + name.split("base_model.", 1)[1], param


def _set_values(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for name, param in _trainables(model):
            param.copy_(seeded(name, param.shape, seed))


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def zero(stage: int, kind: str, offload: bool = False, bf16: bool = False) -> dict[str, Any]:
    import deepspeed

    model = Wrapper(tiny_peft(kind).to(torch.bfloat16) if bf16 else tiny_peft(kind))
    settings: dict[str, Any] = {"stage": stage}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    if offload:
        settings |= {f"offload_{what}": {"device": "cpu"} for what in ("param", "optimizer")}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        },
    )
    if bf16:
        return _zero_bf16(engine)
    if stage == 3:
        _forbid_frozen(list(engine.parameters()))
    facts = check_gather(engine, kind, 1)
    _set_zero(engine, 2)
    facts |= check_gather(engine, kind, 2)
    if stage == 3:
        assert all(p.ds_status.name == "NOT_AVAILABLE" for p in engine.parameters()), "a tensor stayed whole"
        facts["fallback"] = _zero_fallback(engine, kind)
        _allow_frozen(list(engine.parameters()))
    engine.backward(engine(torch.arange(12).reshape(1, 12)))
    engine.step()
    tensors, stats = gather_adapter_with_stats(engine)
    if dist.get_rank() == 0:
        moved = [k for k, v in tensors.items() if not torch.equal(v, reference(kind, 2)[k])]
        assert len(moved) == len(tensors), "an update did not reach the gathered adapter"
    facts["moved_after_step"] = stats.moved_bytes
    return facts


def _zero_bf16(engine: Any) -> dict[str, Any]:
    tensors, _ = gather_adapter_with_stats(engine)
    expected = {k: v.to(torch.bfloat16) for k, v in reference("lora", 1).items()}
    assert dist.get_rank() != 0 or same(tensors, expected)
    return {"ok": True}


def _set_zero(engine: Any, seed: int) -> None:
    import deepspeed

    trainables = list(_trainables(engine))
    whole = [p for _, p in trainables]
    with deepspeed.zero.GatheredParameters(whole, modifier_rank=0), torch.no_grad():
        for name, param in trainables:
            if param.numel():
                param.copy_(seeded(name, param.shape, seed))


def _forbid_frozen(params: list[Any]) -> None:
    """DeepSpeed hangs its gather of a list of parameters on each one: a frozen one in the list now raises."""

    def watch(gather: Any) -> Any:
        def checked(param_list: Any = None, *rest: Any, **options: Any) -> Any:
            assert param_list is not None
            assert all(p.requires_grad for p in param_list), "a frozen parameter was gathered"
            return gather(param_list, *rest, **options)

        return checked

    for param in params:
        param.kept = (param.all_gather, param.all_gather_coalesced)
        param.all_gather, param.all_gather_coalesced = watch(param.all_gather), watch(param.all_gather_coalesced)


def _allow_frozen(params: list[Any]) -> None:
    for param in params:
        param.all_gather, param.all_gather_coalesced = param.kept


def _zero_fallback(engine: Any, kind: str) -> dict[str, Any]:
    """A partition that is not laid out as we know it goes through DeepSpeed's own gather, still only the adapter."""
    aligned = {p: p.ds_numel_aligned for p in engine.parameters() if p.requires_grad}
    for param in aligned:
        param.ds_numel_aligned = -1
    facts = check_gather(engine, kind, 2)
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in engine.parameters())
    for param, numel in aligned.items():
        param.ds_numel_aligned = numel
    return facts


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def fsdp2(kind: str, columns: bool = False, replicas: int = 1) -> dict[str, Any]:
    """`fully_shard` on a CPU mesh; `columns` shards lora_A by columns, `replicas` > 1 is HSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    world = dist.get_world_size()
    sizes, names = ((replicas, world // replicas), ("replica", "shard")) if replicas > 1 else ((world,), ("shard",))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    model = Wrapper(tiny_peft(kind))

    def place(param: nn.Parameter) -> Shard:
        return Shard(1 if columns and param.ndim == 2 and param.shape[0] == 4 else 0)

    inner: Any = model.inner
    for layer in inner.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    facts = check_gather(model, kind, 1)
    for name, param in _trainables(model):
        value = seeded(name, param.shape, 2)
        with torch.no_grad():
            from torch.distributed.tensor import distribute_tensor

            param.copy_(distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None))
    facts |= check_gather(model, kind, 2)
    with torch.no_grad():
        model(torch.arange(12).reshape(1, 12))
    # after a forward pass the outermost group (lm_head) may be whole; the gather must put it back first
    facts |= check_gather(model, kind, 2)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return facts


def small_buckets() -> dict[str, Any]:
    """Tensors larger than a bucket are cut: 5 MiB of weights in buckets of 1 MiB."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Module()
    model.lora_A = nn.Parameter(seeded("a", torch.Size((1301, 1000)), 1))
    model.lora_B = nn.Parameter(seeded("b", torch.Size((7, 11)), 1))
    model.frozen = nn.Parameter(torch.zeros(500, 500), requires_grad=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    tensors, stats = gather_adapter_with_stats(model, bucket_mib=1)
    expected = {"lora_A": seeded("a", torch.Size((1301, 1000)), 1), "lora_B": seeded("b", torch.Size((7, 11)), 1)}
    assert same(tensors, expected if dist.get_rank() == 0 else {})
    return {"moved": stats.moved_bytes, "size": stats.tensor_bytes, "buckets": stats.buckets}
