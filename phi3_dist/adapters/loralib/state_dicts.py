"""loralib (microsoft/LoRA, 0.1.2) and PEFT: state dicts in both directions, and loralib's two functions.

What is equal to what stands in `loralib_layers.py`. A state dict of loralib holds neither alpha, nor `enable_lora`, nor
the kind of a layer: they are asked for, never guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from phi3_dist.adapters.for_plain_base import MOVED_BASE
from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.loralib.layers import (
    KINDS,
    Kind,
    Layer,
    Review,
    Update,
    conv2d,
    end,
    from_merged,
    lookup,
    to_merged,
    whole,
)
from phi3_dist.adapters.select import FLOATS, Bias, find_peft_model
from phi3_dist.errors import AdapterError, Problem
from phi3_dist.family.variants import LINEARS, Shape

__all__ = [
    "peft_from_loralib",
    "loralib_from_peft",
    "mark_only_lora_as_trainable",
    "lora_state_dict",
]

_PHI3_KINDS: Mapping[str, Kind] = {**dict.fromkeys((*LINEARS, "lm_head"), "linear"), "embed_tokens": "embedding"}
_PREFIX = "base_model.model."


# --- loralib to PEFT ------------------------------------------------------------------------------------------------


def peft_from_loralib(
    state: Mapping[str, Tensor],
    *,
    alpha: float | Mapping[str, float] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    base: Shape | None = None,
    base_name: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors, under its saved names, and its configuration, from what `loralib.lora_state_dict` returned.

    alpha: loralib's `lora_alpha`, one for all layers or by the end of module names. kinds: the kind of each layer by
    the end of its name; Phi-3's own modules are known. enable_lora: MergedLinear's, by the end of module names.
    base: the base model's shape, checked where it is given. base_name: written into the configuration.
    The bias mode follows from the biases in the file. Dropout is 0 in the configuration: loralib saves none.
    Raises ConfigError naming all that has to be given (alpha, enable_lora, kinds), AdapterError for a file that is not
    loralib's or that no PEFT adapter equals: a Conv2d, a MergedLinear whose groups cut across q, k and v.
    """
    review = Review(base)
    pairs, biases = _read_loralib(state, review)
    said = {"kinds": kinds, "enable_lora": enable_lora, "alpha": alpha if isinstance(alpha, Mapping) else None}
    for argument, values in said.items():
        review.unused(argument, values, pairs)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for module, (a, b) in pairs.items():
        flags = lookup(enable_lora, module)
        layer_alpha = lookup(alpha, module) if isinstance(alpha, Mapping) else alpha
        if layer_alpha is None or layer_alpha <= 0:
            what = "alpha is not in a file of loralib" if layer_alpha is None else "alpha must be above 0"
            review.ask(module, what, "give alpha, the lora_alpha that the layer was built with")
            layer_alpha = 1.0
        conv_bias = f"{module}.conv.bias" in biases
        kind = _kind(module, a, b, kinds=kinds, flags=flags, conv_bias=conv_bias, review=review)
        if kind is None:
            continue
        update = Update(module, kind, a, b)
        if kind == "merged" and flags is not None:
            update = from_merged(update, tuple(flags), review)
        review.size(update)
        last = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{_PREFIX}{module}.{last[0]}": update.a.clone(), f"{_PREFIX}{module}.{last[1]}": update.b.clone()}
        sizes[module] = (update.a.shape[0], layer_alpha * (sum(flags) if flags is not None else 1))
    review.raise_if_any()
    beside = {f"{module}.bias": f"{_PREFIX}{module}.base_layer.bias" for module in pairs}
    tensors |= {beside.get(name, _PREFIX + name): tensor.clone() for name, tensor in biases.items()}
    mode = "all" if biases.keys() - beside.keys() else "lora_only" if biases else "none"
    return tensors, _peft_config(sizes, mode, base, base_name)


def _read_loralib(
    state: Mapping[str, Tensor], review: Review
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Module → (A, B), and the biases under their own names."""
    halves: dict[str, dict[str, Tensor]] = {}
    biases = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if tensor.dtype not in FLOATS:
            review.wrong(name, f"is {tensor.dtype}, which does not train", "save it with lora.lora_state_dict(model)")
        elif last in ("lora_A", "lora_B"):
            if not module or tensor.ndim != 2 or tensor.numel() == 0:
                what = f"has shape {tuple(tensor.shape)} or no module in its name; loralib's have two dimensions"
                review.wrong(name, what)
            else:
                halves.setdefault(module, {})[last] = tensor
        elif last == "bias":
            biases[name] = tensor
        else:
            review.wrong(name, "is not a lora_A, lora_B or bias of loralib", "save with lora.lora_state_dict(model)")
    for module, half in halves.items():
        if len(half) == 1:
            review.wrong(module, f"has {next(iter(half))} alone", "save with lora.lora_state_dict(model)")
    if not halves and not review.found:
        review.wrong("file", "no lora_A and lora_B in it", "give a file saved with lora.lora_state_dict(model)")
    return {m: (h["lora_A"], h["lora_B"]) for m, h in halves.items() if len(h) == 2}, biases


def _kind(
    module: str,
    a: Tensor,
    b: Tensor,
    *,
    kinds: Mapping[str, Kind] | None,
    flags: Sequence[bool] | None,
    conv_bias: bool,
    review: Review,
) -> Kind | None:
    """The kind of a layer that can be converted: as it was said, or as the file shows it.

    Ranks that differ are MergedLinear's alone, `conv.bias` is Conv2d's, and Phi-3's own modules are known. None where
    there is a question or a reason against it, which goes to `review`.
    """
    same_rank = a.shape[0] == b.shape[1]
    seen: Kind | None = "merged" if not same_rank else "conv2d" if conv_bias else _PHI3_KINDS.get(end(module))
    kind: Kind | None = lookup(kinds, module) or ("merged" if flags is not None else seen)
    if kind is None:
        what = f"the kind of layer '{end(module)}' is not in a file of loralib"
        review.ask(module, what, f"give kinds: {end(module)}={'|'.join(KINDS)}")
    elif kind == "merged" and flags is None:
        what = f"enable_lora is not in a file of loralib (lora_A {tuple(a.shape)}, lora_B {tuple(b.shape)})"
        review.ask(module, what, f"give enable_lora, such as {end(module)}=true,false,true for groups 1 and 3 of 3")
    elif kind == "conv2d":
        what = "PEFT's Conv2d of the same rank can't hold a loralib Conv2d, whose lora_B may mix the rows of a kernel"
        review.wrong(module, what, "merge it into its weight with loralib's eval(), or train it with PEFT")
    elif kind != "merged" and flags is not None:
        review.ask(module, f"enable_lora is given for what kinds calls {kind}", "leave one of the two out")
    elif kind != "merged" and not same_rank:
        review.wrong(module, f"lora_A has rank {a.shape[0]}, lora_B {b.shape[1]}: it is not a {KINDS[kind]}")
    else:
        return kind
    return None


def _peft_config(
    sizes: Mapping[str, tuple[int, float]], bias: str, base: Shape | None, base_name: str | None
) -> dict[str, Any]:
    """sizes: module → (r, alpha). The commonest are the defaults, the others patterns."""
    from peft import LoraConfig

    common_r, common_alpha = Counter(sizes.values()).most_common(1)[0][0]
    by_end: dict[str, set[tuple[int, float]]] = {}
    for module, size in sizes.items():
        by_end.setdefault(end(module), set()).add(size)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, (r, alpha) in sizes.items():
        key = end(module) if len(by_end[end(module)]) == 1 else f"^{module}"  # PEFT reads it as a regular expression
        ranks |= {key: r} if r != common_r else {}
        alphas |= {key: whole(alpha)} if alpha != common_alpha else {}
    in_layers = set(by_end) <= {*LINEARS}
    complete = base is not None and in_layers and len(sizes) == base.layers * len(by_end)
    config = LoraConfig(
        r=common_r,
        lora_alpha=whole(common_alpha),
        bias=bias,
        # ends of names only where every layer is known to be there: they would match a layer without an adapter too
        target_modules=sorted(by_end) if complete else sorted(sizes),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM" if base is not None else None,
        base_model_name_or_path=base_name,
    )
    return dict(config.to_dict())


# --- PEFT to loralib ------------------------------------------------------------------------------------------------

_BEYOND: Mapping[str, str] = {
    "use_dora": "DoRA's magnitudes have no place in loralib",
    "lora_bias": "a bias of lora_B has no place in loralib",
    "modules_to_save": "modules trained in full are not part of loralib's files",
    "trainable_token_indices": "trained token rows are not part of loralib's files",
    "target_parameters": "loralib has layers, not single parameters",
    "layer_replication": "loralib does not repeat layers",
    "alora_invocation_tokens": "loralib's layers do not switch on at a token",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "loralib's layers do not compute this",
    ),
}
_PEFT_KEY = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")


def loralib_from_peft(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    r: int | None = None,
    base: Shape | None = None,
) -> tuple[dict[str, Tensor], dict[str, Layer]]:
    """What `load_state_dict(…, strict=False)` of a loralib model takes, and how each of its layers must be built.

    tensors, config: as `read_adapter` returns them. enable_lora: by the end of module names, the layers that become
    MergedLinear; the others become Linear, Embedding or Conv2d, as the tensors say. r: rank of a MergedLinear group,
    by default PEFT's rank, with A repeated for each group; at rank/n a block-diagonal B is taken apart again.
    alpha is read from the configuration and given back in `Layer`, since loralib's files have no place for it.
    Raises AdapterError, with all reasons: what loralib's layers cannot hold (DoRA, modules_to_save, grouped
    convolutions), a MergedLinear whose groups cut across q, k and v or that would lose rows.
    """
    review = Review(base)
    _check_peft_config(config, review)
    updates, biases = _read_peft(tensors, review)
    review.unused("enable_lora", enable_lora, [update.module for update in updates])
    if r is not None and not enable_lora:
        review.ask("r", "is the rank of MergedLinear's groups, and no layer becomes one", "give enable_lora, or no r")
    state: dict[str, Tensor] = {}
    layers: dict[str, Layer] = {}
    for update in updates:
        module, rank = update.module, update.a.shape[0]
        flags = lookup(enable_lora, module)
        if flags is not None:
            new = to_merged(update, tuple(flags), r, review)
        elif update.kind == "conv2d":
            new = conv2d(update, review)
        else:
            new = update
            review.size(update)
        new_r = new.b.shape[1] if new.kind == "merged" else rank
        alpha = _effective_alpha(config, module, rank) * new_r / rank
        layers[module] = Layer(new.kind, new_r, whole(alpha), tuple(flags or ()))
        state |= {f"{module}.lora_A": new.a.clone(), f"{module}.lora_B": new.b.clone()}
    review.raise_if_any()
    for name, tensor in biases.items():
        module = name.removesuffix(".base_layer.bias")
        if module == name:
            state[name] = tensor.clone()
        else:
            convolution = module in layers and layers[module].kind == "conv2d"
            state[f"{module}.conv.bias" if convolution else f"{module}.bias"] = tensor.clone()
    return state, layers


def _check_peft_config(config: Mapping[str, Any], review: Review) -> None:
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        review.wrong("peft_type", f"is {kind}; loralib has LoRA alone")
    if not config.get("lora_alpha"):
        review.wrong("lora_alpha", "is missing in the adapter's configuration")
    for key, why in _BEYOND.items():
        if config.get(key):
            review.wrong(key, why, "merge the adapter instead")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(MOVED_BASE):
        what = f"{start} trains on a base that it has changed; on the plain base the tensors mean something else"
        review.wrong("init_lora_weights", what, "save it with PEFT's path_initial_model_for_weight_conversion first")


def _read_peft(tensors: Mapping[str, Tensor], review: Review) -> tuple[list[Update], dict[str, Tensor]]:
    """The updates, of kind linear, embedding or conv2d, and the biases under the base model's names."""
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    biases: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _PEFT_KEY.fullmatch(name)
        if match:
            halves.setdefault(match[1], {})[match[2] or match[3]] = tensor
            embeddings |= {match[1]} if match[3] else set()
        elif end(name) == "bias" and ".lora_" not in name and ".modules_to_save." not in name:
            biases[name] = tensor
        else:
            review.wrong(key, "has no place in loralib, which saves lora_A, lora_B and biases", "merge the adapter")
    updates = []
    for module, half in halves.items():
        dims = [half[key].ndim for key in sorted(half)]
        if dims not in ([2, 2], [4, 4]):
            what = f"{' and '.join(f'lora_{key}' for key in sorted(half))} with {dims} dimensions"
            review.wrong(module, f"{what}: neither Linear, Embedding nor Conv2d", "merge the adapter")
        else:
            kind: Kind = "conv2d" if dims[0] == 4 else "embedding" if module in embeddings else "linear"
            updates.append(Update(module, kind, half["A"], half["B"]))
    return updates, biases


def _effective_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha that gives PEFT's scale as alpha / rank."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config.get("lora_alpha", 0)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


# --- loralib's functions --------------------------------------------------------------------------------------------


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """loralib's function, for models of its layers and for PEFT models: freeze all but LoRA and the chosen biases.

    bias: `none`, `all`, or `lora_only`, the biases of layers with LoRA. As in loralib, LoRA tensors that are frozen
    stay so. Call it before the optimizer is made and the model is wrapped (DDP, DeepSpeed) or sharded (FSDP2).
    Under ZeRO-3 and FSDP2 build loralib's layers with `merge_weights=False`: else their eval() merges shards, which
    fails, or under ZeRO-3 leaves a Linear's LoRA out without an error (seen with loralib 0.1.2, DeepSpeed 0.19.8).
    On a PEFT model the configuration's `bias` follows, so that what trains is what `save_adapter` saves.
    Raises AdapterError for another mode.
    """
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(Problem("bias", f"{bias!r} is not a mode", "one of none, all, lora_only"))
    peft_model = find_peft_model(model)
    params = dict(model.named_parameters())
    beside = {name.split("lora_")[0] + bias_name for name in params if "lora_" in name for bias_name in _BIAS_NAMES}
    for name, param in params.items():
        if "lora_" in name:
            continue
        # PEFT saves tensors that are called bias, loralib all whose name holds the word
        last = name.rsplit(".", 1)[-1]
        is_bias = (last == "bias" if peft_model is not None else "bias" in last) and ".modules_to_save." not in name
        param.requires_grad_((bias == "all" and is_bias) or (bias == "lora_only" and name in beside))
    if peft_model is not None:
        for adapter in peft_model.active_adapters:
            peft_model.peft_config[adapter].bias = bias


_BIAS_NAMES = ("bias", "base_layer.bias")


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """loralib's function under every sharding strategy: on rank 0 CPU copies of the tensors, elsewhere an empty dict.

    Collective: every rank must call it, between steps. A model of loralib's layers keeps their names, a PEFT model
    gets PEFT's saved names, with what its configuration saves beside LoRA. Raises AdapterError as `gather_adapter`.
    """
    return gather_adapter(model, bias=bias)
