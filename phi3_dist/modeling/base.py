"""Base weights: found, checked, and read straight to where they stay.

A plain or DDP rank maps the safetensors file: ranks of a node share its pages. Under ZeRO-3 and FSDP2 each rank reads
its own part of every tensor, and no rank ever holds the whole base. Remote code is never run: the native
`Phi3ForCausalLM` is the only class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from phi3_dist.errors import ModelError, Problem
from phi3_dist.family.base_config import read_config
from phi3_dist.family.variants import TINY_RANDOM
from phi3_dist.modeling.weights import Weights, freed_memory_goes_back

__all__ = [
    "Base",
    "checkpoint_activations",
    "find_base",
    "load_full",
    "load_into_fsdp2",
    "load_quantized",
    "load_zero3",
    "meta_model",
    "own_rows",
    "rows_of_rank",
    "tiny_config",
    "zero3_unseen",
]

_PATTERNS = ["*.safetensors", "*.json", "tokenizer*"]
# buffers that old checkpoints hold and the model computes itself
_IGNORED = ("rotary_emb.inv_freq",)
_QUANTISED = (
    *(".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".SCB", ".weight_format"),
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_packed"),
)
"""Ends of names beside quantised weights: bitsandbytes', then GPTQ's, AWQ's and those of FP8 and packed formats."""


@dataclass(frozen=True)
class Base:
    """A base model before it is loaded: its configuration, where its weights are, and how it is called."""

    source: str
    config: Phi3Config
    folder: Path | None
    weights: Weights

    @property
    def enlarged_rows(self) -> int | None:
        """Rows of the tables where this run has enlarged them (modeling/new_tokens.py), else None."""
        return int(self.config.vocab_size) if self.weights.added else None


def tiny_config() -> Phi3Config:
    """The shape of `tiny-random`: a Phi-3 in everything but size. Its vocabulary is the byte tokenizer's, padded."""
    return Phi3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        sliding_window=None,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def _tiny_base() -> Base:
    config = tiny_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = Phi3ForCausalLM(config).state_dict()
    return Base(TINY_RANDOM, config, None, Weights({}, tensors))


def _hub_folder(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    def refuse(what: str, fix: str) -> ModelError:
        return ModelError(Problem(f"model.source: {source}", what, fix))

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_PATTERNS))
    except GatedRepoError as error:
        raise refuse("the model is gated", "accept its terms on the hub, then `hf auth login` or HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise refuse(
            "neither a folder here nor a model on the hub", "check the spelling; a private model needs a token"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise refuse(
            f"not a folder here, not in the cache, and the hub was not reached ({type(error).__name__})",
            "download it where the hub is reachable and give the folder, or set HF_ENDPOINT to a mirror",
        ) from error
    except ValueError as error:
        raise refuse("neither a folder here nor a hub id", "give a folder with config.json, or owner/name") from error


def find_base(source: str, revision: str | None = None) -> Base:
    """Locate a base model and read its configuration, not yet its weights.

    Raises ModelError when it is missing, gated, unreachable, damaged, or not of the Phi-3 class.
    """
    if source == TINY_RANDOM:
        return _tiny_base()
    where = f"model.source: {source}"
    try:
        local = Path(source).expanduser()
        folder = local if local.is_dir() else _hub_folder(source, revision)
    except (OSError, RuntimeError, ValueError) as error:  # not allowed, too long; no home; a null character
        what = f"cannot be looked at: {getattr(error, 'strerror', None) or error}"
        raise ModelError(Problem(where, what, "name a folder that you may read, or a hub id")) from error
    raw = read_config(folder, where)
    activation = raw.get("hidden_act", "silu")
    if activation not in ACT2FN:
        what = f"config.json: hidden_act is {activation[:60]!r}, which transformers does not know"
        raise ModelError(Problem(where, what, "Phi-3's is silu"))
    try:
        config = Phi3Config.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        what = f"config.json is not a valid Phi-3 configuration: {' '.join(str(error).split())[:300]}"
        raise ModelError(Problem(where, what, "download it again")) from error
    return Base(source, config, folder, Weights.of_folder(folder))


def _empty(base: Base, dtype: torch.dtype) -> Phi3ForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = Phi3ForCausalLM(copy.deepcopy(base.config))  # its tables may grow, the base stays as it is
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    # what PEFT writes into adapter_config.json as the base
    model.name_or_path = base.source
    # transformers saves this into config.json and PEFT into the adapter's card
    model.config.dtype = dtype
    return model


def meta_model(base: Base, dtype: torch.dtype) -> Phi3ForCausalLM:
    """The model without storage: shapes and names only, compared with the files'.

    Raises ModelError for a weight that is missing, has no place in the model, or has another shape.
    """
    with torch.device("meta"):
        model = _empty(base, dtype)
    _check_names(base, model)
    _check_shapes(base, model)
    return model


def _check_names(base: Base, model: nn.Module) -> None:
    have = {n for n in base.weights.names() if not n.endswith(_IGNORED)}
    tied = {"lm_head.weight"} if base.config.tie_word_embeddings else set()
    want = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing, extra = sorted(want - have - tied), sorted(have - want - tied)
    if any(name.endswith(_QUANTISED) for name in extra):
        what = f"its weights are quantised already ({next(name for name in extra if name.endswith(_QUANTISED))})"
        fix = "name the 16-bit model it was made of; model.quantization: nf4 or int8 quantises it while it is loaded"
        raise ModelError(Problem(f"model.source: {base.source}", what, fix))
    problems = [
        Problem(f"model.source: {base.source}", f"{len(names)} weights {verdict}, first {names[0]}", fix)
        for names, verdict, fix in (
            (missing, "missing in the files", "download the model again"),
            (extra, "in the files that the model has no place for", "check config.json against the weights"),
        )
        if names
    ]
    if problems:
        raise ModelError(*problems)


def _check_shapes(base: Base, model: nn.Module) -> None:
    for name, param in model.named_parameters():
        found = base.weights.shape(name)
        if found != param.shape:
            raise ModelError(
                Problem(
                    f"model.source: {base.source}",
                    f"weight {name} has shape {tuple(found)}, the configuration says {tuple(param.shape)}",
                    "config.json and the weights are of different models",
                )
            )


def load_full(base: Base, dtype: torch.dtype, device: torch.device) -> Phi3ForCausalLM:
    """The whole base on `device`. On a CPU in the file's own dtype it is the mapped file itself, not a copy."""
    model = meta_model(base, dtype)
    state = {name: base.weights.whole(name).to(device=device, dtype=dtype) for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    base.weights.close()
    _finish(model, device)
    return model


def checkpoint_activations(model: Any, **more: Any) -> None:
    """Compute each decoder layer again for its backward. `more` goes to `torch.utils.checkpoint.checkpoint`.

    transformers 5.24 has another name for what it called gradient_checkpointing_enable.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **more})


def _finish(model: Phi3ForCausalLM, device: torch.device) -> None:
    # the rotary tables are computed, not stored: on the meta device they hold nothing
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.tie_weights()
    model.eval()


def load_zero3(base: Base, dtype: torch.dtype, ds_config: Mapping[str, Any]) -> Phi3ForCausalLM:
    """The base sharded by DeepSpeed ZeRO-3: each rank reads its own shards from the files. Collective.

    While the model is made, the largest weight is whole on each rank for a moment, and empty.
    """
    import deepspeed

    meta_model(base, dtype)  # a fault of the files is found by every rank, outside of any collective
    with freed_memory_goes_back():
        # told no dtype it reads its configuration's; deepspeed 0.19.8 takes bf16 for any other that it is told, where
        # the accelerator has no fp16 (`dtype or float16 if fp16 else bf16`)
        with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
            model = _empty(base, dtype)
        for name, param in model.named_parameters():
            _fill_zero3_shard(param, base.weights.whole(name), dtype)
            base.weights.close()
    _finish(model, torch.device("cpu"))
    return model


def _fill_zero3_shard(param: Any, whole: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy this rank's part of a weight. DeepSpeed cuts the flat weight into equal parts, the last one padded."""
    shard, rank = param.ds_tensor, torch.distributed.get_rank(param.ds_process_group)
    assert shard.dtype == dtype, f"DeepSpeed keeps a weight as {shard.dtype}, and {dtype} was planned"
    start = rank * shard.ds_numel
    mine = whole.reshape(-1)[start : start + shard.ds_numel]
    with torch.no_grad():
        shard.view(-1)[: mine.numel()].copy_(mine)


def rows_of_rank(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [start, stop) that FSDP2's `Shard(0)` gives to a rank: `torch.chunk`'s arithmetic."""
    size = -(-rows // world)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def own_rows(shard: Any) -> slice:
    """The rows of the whole tensor that this rank's part of an FSDP2 shard (a DTensor) holds."""
    return slice(*rows_of_rank(shard.shape[0], shard.device_mesh.get_local_rank(), shard.device_mesh.size()))


def _base_name(name: str) -> str | None:
    """The name in the checkpoint of a parameter of the PEFT model; None for an adapter's own."""
    if ".lora_" in name or ".trainable_tokens_delta." in name:
        return None
    for part in ("token_adapter.", "base_layer.", "original_module.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name.split("base_model.model.", 1)[-1]


def load_into_fsdp2(model: nn.Module, base: Base) -> None:
    """Fill the shards of a `fully_shard`ed model: each rank reads its own rows from the files. No communication."""
    from torch.distributed.tensor import DTensor

    for name, param in _named(model):
        source = _base_name(name)
        if source is None:
            continue
        assert isinstance(param, DTensor), name
        if source == "lm_head.weight" and base.config.tie_word_embeddings:
            source = "model.embed_tokens.weight"
        rows = own_rows(param)
        with torch.no_grad():
            param.to_local().copy_(base.weights.rows(source, rows.start, rows.stop))
        base.weights.close()


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, param in model.named_parameters():
        yield name.removeprefix("model.") if name.startswith("model.base_model.") else name, param


@contextmanager
def zero3_unseen(zero3: Any) -> Iterator[None]:
    """Let transformers and PEFT take no notice of ZeRO-3 inside: both ask a global, transformers' `zero3`
    (HfDeepSpeedConfig). Where that is None, nothing is done."""
    if zero3 is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(zero3)


def load_quantized(
    base: Base, kind: str, dtype: torch.dtype, device: torch.device, zero3: Any = None
) -> Phi3ForCausalLM:
    """A bitsandbytes base: `nf4` (double quantised, storage in `dtype` so that all of a shard is one dtype) or `int8`.

    `device` is always said: told none, transformers takes a GPU where there is one. Under ZeRO-3 it refuses to be told
    (`zero3` is its HfDeepSpeedConfig), though it loads quantised weights the same way: they are sharded later.
    """
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    if base.folder is None:
        raise ModelError(
            Problem(
                "model.quantization",
                f"{TINY_RANDOM} has no folder to quantise from",
                "name a saved base in model.source, or set model.quantization: none",
            )
        )
    with zero3_unseen(zero3):
        model: Phi3ForCausalLM = Phi3ForCausalLM.from_pretrained(
            base.folder, config=_as_filed(base), quantization_config=config, dtype=dtype, device_map={"": device}
        )
    _enlarge(model, base)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # in eval mode bitsandbytes 0.50 repacks weights in place for a kernel that has no gradient, and training
            # goes on with it after the first held-out loss, on CPUs that have AVX512-BF16
            module.support_avx512bf16_for_cpu = False
    return model


def _as_filed(base: Base) -> Phi3Config:
    """The configuration that was checked and read, with the rows that the files have."""
    config = copy.deepcopy(base.config)
    if base.weights.added:
        config.vocab_size = int(base.config.vocab_size) - max(base.weights.added.values())
    return config


def _enlarge(model: Phi3ForCausalLM, base: Base) -> None:
    """Give a model that came from the folder itself the rows that `base` adds."""
    if not base.weights.added:
        return
    for name in base.weights.added:
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        old = module.weight
        more = base.weights.rows(name, len(old), base.config.vocab_size)
        module.weight = nn.Parameter(torch.cat((old.data, more.to(old))), requires_grad=old.requires_grad)
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(module.weight))
    base.weights.close()
    model.config.vocab_size = model.vocab_size = base.config.vocab_size
    model.tie_weights()
