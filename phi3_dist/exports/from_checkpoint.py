"""`phi3-dist adapter`: the PEFT folder of any checkpoint of a run, as the run itself would have written it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3_dist.adapters.files import AdapterReceipt, write_adapter
from phi3_dist.adapters.for_plain_base import on_plain_base
from phi3_dist.adapters.loading import rows_fact, trained_fact
from phi3_dist.adapters.model_card import adapter_card
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.adapters.select import choose
from phi3_dist.config.schema import RunConfig
from phi3_dist.errors import AdapterError, Problem, RunFolderError
from phi3_dist.exports.open_adapter import run_config
from phi3_dist.modeling.base import Base, find_base, meta_model
from phi3_dist.modeling.lora import add_lora, initial_value
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids
from phi3_dist.modeling.tokenizer import load_tokenizer
from phi3_dist.training.checkpoints.files import Checkpoint, find_checkpoint, read_state, verify
from phi3_dist.training.final_adapter import of_base_and_data
from phi3_dist.training.shared_init import LORA_INIT_FILE

__all__ = ["adapter_of_checkpoint", "choose_checkpoint"]


def choose_checkpoint(run: Path, step: int | None = None, *, best: bool = False) -> Checkpoint:
    """The checkpoint of `step`, the one of the least held-out loss, or by default the newest that verifies.

    Raises RunFolderError where it is not there, or does not verify, with those that are.
    """
    root = run / "checkpoints"
    there = sorted(int(p.name[5:]) for p in root.glob("step_*") if p.is_dir() and p.name[5:].isdecimal())
    shown = f"those of step {', '.join(map(str, there))} are there" if there else "there is none"
    newest, passed = find_checkpoint(root)
    if newest is None:
        what = f"has no checkpoint that verifies: {passed[0] if passed else 'none was written'}"
        raise RunFolderError(Problem(str(run), what, "save.every says how often one is written; --resume continues"))
    if best:
        found = newest.trainer.get("best")
        if not found:
            fix = "train.eval_every and held-out rows; or --step N"
            raise RunFolderError(Problem(str(run), "has measured no held-out loss at a checkpoint", f"{fix}: {shown}"))
        step = int(found[1])
    if step is None or step == newest.step:
        return newest
    checked = verify(root / f"step_{step:06d}")
    if isinstance(checked, str):
        kind = "the best checkpoint" if best else "the checkpoint"
        what = f"{kind} of step {step} can't be used: {checked}"
        raise RunFolderError(Problem(str(run), what, f"--step N: {shown}"))
    return checked


def adapter_of_checkpoint(
    run: str | Path, out: str | Path, *, step: int | None = None, best: bool = False
) -> tuple[AdapterReceipt, Checkpoint]:
    """Write the adapter that a checkpoint holds to the new folder `out`; the base's weights are not read.

    Raises RunFolderError (no run, no such checkpoint), ModelError (a base that can't be found any more), AdapterError
    (a target that exists, a checkpoint of something else, a disk that is full). Nothing is left of a target then.
    """
    run, out = Path(run), Path(out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise AdapterError(Problem(str(out), "exists", "choose another folder, or remove it"))
    cfg = run_config(run)
    checkpoint = choose_checkpoint(run, step, best=best)
    base = find_base(cfg.model.source, cfg.model.revision)
    tokenizer = load_tokenizer(cfg.model.tokenizer or cfg.model.source, cfg.model.revision, cfg.model.new_tokens)
    base = enlarged(base, ids := new_token_ids(tokenizer, cfg.model.new_tokens, base))
    peft_model = add_lora(meta_model(base, torch.float32), cfg.lora, base.source, ids)
    initial = _initial_adapter(run, cfg)
    tensors = _tensors(run, peft_model, read_state(checkpoint), cfg, initial)
    config = dict(peft_model.peft_config["default"].to_dict())
    if cfg.lora.init.startswith("pissa") and initial:
        tensors, config = on_plain_base(tensors, config, initial)
    identity = checkpoint.trainer.get("identity") or {}
    factors = identity.get("LongRoPE factors")
    receipt = write_adapter(
        out,
        tensors,
        config,
        card=adapter_card(_card_contents(cfg, base, checkpoint, identity)),
        tokenizer=tokenizer,
        base_hint={"revision": cfg.model.revision} if cfg.model.revision else None,
        metadata={**({"longrope": str(factors)} if factors else {}), **rows_fact(base), **trained_fact(cfg)},
    )
    return receipt, checkpoint


def _initial_adapter(run: Path, cfg: RunConfig) -> dict[str, Tensor]:
    """A and B as they started, where PiSSA's base or a frozen A makes them part of the adapter."""
    computed = cfg.lora.init != "default" and cfg.model.adapter is None
    if not computed or not (cfg.lora.init.startswith("pissa") or cfg.lora.freeze_a):
        return {}
    path = run / LORA_INIT_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        what = f"cannot be read, and the adapter needs what training started from: {error}"
        raise RunFolderError(Problem(str(path), what, "put it back from a copy of the run's folder")) from error


def _tensors(
    run: Path, peft_model: Any, state: Mapping[str, Tensor], cfg: RunConfig, initial: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The checkpoint's weights under PEFT's saved names; what does not train (LoRA-FA's A) from where it came from."""
    names = {id(param): name for name, param in peft_model.named_parameters()}
    frozen = read_adapter(Path(cfg.model.adapter))[0] if cfg.lora.freeze_a and cfg.model.adapter else {}
    tensors, problems = {}, []
    for chosen in choose(peft_model, names_only=True):
        name = names.get(id(chosen.tensor), chosen.key)
        value = state.get(f"weight/{name}")
        if value is None and cfg.lora.freeze_a and ".lora_A." in name:
            value = frozen.get(chosen.key, initial.get(chosen.key))
            value = initial_value(name, chosen.shape, cfg.train.seed) if value is None else value
        if value is None or value.shape != chosen.shape:
            have = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            problems.append(Problem(str(run), f"{chosen.key} {have}, the run file says {tuple(chosen.shape)}"))
        else:
            tensors[chosen.key] = value
    if problems:
        last = Problem("config.yaml", "the checkpoint is of another lora section or base", "--resume says which")
        raise AdapterError(*problems[:3], last)
    return tensors


def _card_contents(cfg: RunConfig, base: Base, checkpoint: Checkpoint, identity: Mapping[str, Any]) -> dict[str, Any]:
    loss = checkpoint.trainer.get("heldout_loss")
    return {
        "name": f"{cfg.name} at step {checkpoint.step}",
        "base": base.source,
        "base_is_local": base.folder is not None and Path(base.source).is_dir(),
        "revision": cfg.model.revision,
        **of_base_and_data(cfg, base),
        "lora": cfg.lora.model_dump(),
        "optim": cfg.optim.model_dump(),
        "steps": checkpoint.step,
        "global_batch": cfg.train.global_batch,
        "pack_length": cfg.data.pack_length,
        "data_fingerprint": identity.get("data"),
        "longrope": identity.get("LongRoPE factors"),
        "base_rows": base.enlarged_rows,
        "quantization": None if cfg.model.quantization == "none" else cfg.model.quantization,
        "precision": identity.get("precision"),
        "strategy": checkpoint.trainer.get("strategy"),
        "world_size": checkpoint.trainer.get("world_size"),
        "heldout_loss": loss,
    }
