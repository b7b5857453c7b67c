"""A user's own model of loralib's layers trains and saves on two ranks as it does in one process; a PEFT model too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib as lora
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.loralib.files import convert_file
from phi3_dist.adapters.loralib.state_dicts import lora_state_dict, mark_only_lora_as_trainable
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.ranks
FLAGS = (True, False, True)
STEPS = 3
IDS = torch.arange(12).reshape(4, 3) % 11
BIAS = "lora_only"


class Own(nn.Module):
    """All of loralib's layers that have a PEFT form, or plain ones; seeded, with sizes that leave uneven shards."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            plain = (nn.Embedding(11, 9), nn.Linear(9, 7), nn.Linear(7, 12), nn.Linear(12, 11))
            self.embed, self.fc, self.qkv, self.head = plain
            if kind == "loralib":
                # with merge_weights, eval() would merge shards
                self.embed = lora.Embedding(11, 9, r=3, lora_alpha=6, merge_weights=False)
                self.fc = lora.Linear(9, 7, r=3, lora_alpha=6, merge_weights=False)
                self.qkv = lora.MergedLinear(7, 12, r=3, lora_alpha=6, enable_lora=list(FLAGS), merge_weights=False)
                for new, old in zip((self.embed, self.fc, self.qkv), plain, strict=False):
                    new.load_state_dict(old.state_dict(), strict=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.qkv(torch.tanh(self.fc(self.embed(ids)))))
        return logits


def build(kind: str) -> nn.Module:
    model: Any = Own(kind)
    if kind == "peft":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["embed", "fc", "qkv"]))
    mark_only_lora_as_trainable(model, bias=BIAS)
    return model


def optimizer(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids)
    return nn.functional.cross_entropy(logits.flatten(0, 1), (ids.flatten() * 3 + 1) % 11)


def one_process(kind: str) -> dict[str, Tensor]:
    """What the same steps give here, and proof that each tensor has moved."""
    model = build(kind)
    start = gather_adapter(model, bias=BIAS)
    steps = optimizer(model)
    for _ in range(STEPS):
        loss_of(model, IDS).backward()
        steps.step()
        steps.zero_grad()
    result = lora_state_dict(model, bias=BIAS)
    assert len(result) == 8
    assert all(not torch.equal(result[key], start[key]) for key in result)
    return result


# --- on a rank --------------------------------------------------------------------------------------------------------


def train(folder: str, strategy: str) -> list[str]:
    """Train both kinds under a strategy on this rank's half of the batch; rank 0 saves what it has gathered."""
    if strategy == "zero3":
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    kept = []
    for kind in ("loralib", "peft"):
        ids = IDS.chunk(2)[dist.get_rank()]
        model = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}[strategy](build(kind), ids)
        gathered = lora_state_dict(model, bias=BIAS)
        with torch.no_grad():
            model.eval()
            evaluated = model(ids)
            model.train()
            torch.testing.assert_close(evaluated, model(ids), rtol=0, atol=1e-6)
        if dist.get_rank() == 0:
            torch.save(gathered, Path(folder) / f"{strategy}_{kind}.pt")
        kept += sorted(gathered)
        del model
    dist.barrier()
    dist.destroy_process_group()
    return kept


def _ddp(model: nn.Module, ids: Tensor) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return _steps(DistributedDataParallel(model), ids)


def _fsdp2(model: nn.Module, ids: Tensor) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own: Any = next(module for module in model.modules() if isinstance(module, Own))
    for module in (own.embed, own.fc, own.qkv):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _steps(model, ids)


def _steps(model: nn.Module, ids: Tensor) -> nn.Module:
    steps = optimizer(model)
    for _ in range(STEPS):
        loss_of(model, ids).backward()
        steps.step()
        steps.zero_grad()
    return model


def _zero3(model: nn.Module, ids: Tensor) -> nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in engine.parameters())
    for _ in range(STEPS):
        engine.backward(loss_of(engine, ids))
        engine.step()
    return engine  # type: ignore[no-any-return]


# --- the tests --------------------------------------------------------------------------------------------------------


def check(folder: Path, strategy: str) -> None:
    deepspeed = strategy == "zero3"
    args = {"folder": str(folder), "strategy": strategy}
    first, second = run_ranks("tests.ranks.test_loralib_ranks:train", 2, args=args, deepspeed=deepspeed, timeout_s=100)
    assert second == []
    expected = {kind: one_process(kind) for kind in ("loralib", "peft")}
    assert first == [*sorted(expected["loralib"]), *sorted(expected["peft"])]
    for kind, tensors in expected.items():
        saved = torch.load(folder / f"{strategy}_{kind}.pt", weights_only=True)
        for key, tensor in tensors.items():
            torch.testing.assert_close(saved[key], tensor, rtol=0, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_and_save_as_one_process_does(tmp_path: Path, strategy: str) -> None:
    check(tmp_path, strategy)


@pytest.mark.usefixtures("deepspeed_ops")
def test_zero_3_trains_saves_and_converts(tmp_path: Path) -> None:
    """The file that rank 0 saved is one of loralib's: as an adapter of the plain model it computes the same."""
    check(tmp_path, "zero3")
    convert_file(
        tmp_path / "zero3_loralib.pt",
        tmp_path / "adapter",
        "loralib→peft",
        alpha=6,
        kinds={"embed": "embedding", "fc": "linear"},
        enable_lora={"qkv": FLAGS},
    )
    model = Own("loralib")
    model.load_state_dict(torch.load(tmp_path / "zero3_loralib.pt", weights_only=True), strict=False)
    loaded = PeftModel.from_pretrained(Own("plain"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=1e-6)
