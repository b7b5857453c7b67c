"""Combinations of fields that cannot be, in a run file whose fields are each valid: one function a section."""

from __future__ import annotations

import re
from collections.abc import Iterator

from phi3_dist.config.schema import RunConfig
from phi3_dist.config.unsafe_texts import Cross, is_folder
from phi3_dist.family.variants import LINEARS, TINY_RANDOM

__all__ = ["cross_checks"]


def cross_checks(cfg: RunConfig) -> list[Cross]:
    """Every impossible combination in a config whose fields are each valid.

    DoRA goes with quantised weights (PEFT 0.21 adapts `Linear4bit` and `Linear8bitLt` with it), so it is not here.
    """
    return [*_model_pairs(cfg), *_token_faults(cfg), *_lora_pairs(cfg), *_train_pairs(cfg), *_save_pairs(cfg)]


def _model_pairs(cfg: RunConfig) -> Iterator[Cross]:
    source, revision = cfg.model.source, cfg.model.revision
    if not source.strip():
        yield Cross(("model.source",), "is empty", "name a local folder, a hub id, or tiny-random")
    if revision is not None and source == TINY_RANDOM:
        yield Cross(("model.revision", "model.source"), f"is {revision!r}, but tiny-random has none", "remove it")
    elif revision is not None and (source.startswith((".", "/", "~")) or is_folder(source)):
        what = f"is {revision!r}, but model.source is the local folder {source}"
        yield Cross(("model.revision", "model.source"), what, "remove it, or name a hub id as model.source")
    kept = cfg.model.dequantized_layers
    if kept != "auto" and kept > 0 and cfg.model.quantization != "nf4":
        what = f"is {kept}, and model.quantization is {cfg.model.quantization}: no weight is in NF4"
        yield Cross(("model.dequantized_layers", "model.quantization"), what, "leave it out")
    if cfg.model.compile is True and not cfg.model.fused_layers:
        what = "is true, but only the fused layers' passes are compiled, and model.fused_layers is false"
        yield Cross(("model.compile", "model.fused_layers"), what, "leave out one of them")


def _lora_pairs(cfg: RunConfig) -> Iterator[Cross]:
    targets = cfg.lora.targets
    yield from _pattern_faults(cfg)
    yield from _lora_init_pairs(cfg)
    if targets == ():
        yield Cross(("lora.targets",), "is an empty list: nothing would be adapted", "use all-linear")
    elif isinstance(targets, tuple) and "all-linear" in targets:
        fix = f"write `targets: all-linear`, or a list out of {', '.join(LINEARS)}"
        yield Cross(("lora.targets",), "all-linear is inside a list", fix)


def _pattern_faults(cfg: RunConfig) -> Iterator[Cross]:
    for name, pattern in (("rank_pattern", cfg.lora.rank_pattern), ("alpha_pattern", cfg.lora.alpha_pattern)):
        for key in pattern:
            try:
                re.compile(key)
            except (re.error, OverflowError, RecursionError) as error:
                what = f"{key!r} is not a regular expression: {error}"
                yield Cross((f"lora.{name}",), what, "write the end of a module's name, such as down_proj")
    layers = cfg.lora.layers
    if layers == ():
        yield Cross(("lora.layers",), "is an empty list: nothing would be adapted", "leave it out for every layer")
    elif layers is not None and len(set(layers)) < len(layers):
        yield Cross(("lora.layers",), "names a layer twice", f"use {sorted(set(layers))}")


def _lora_init_pairs(cfg: RunConfig) -> Iterator[Cross]:
    lora = cfg.lora
    if lora.freeze_a and lora.plus_ratio != 1:
        what = f"is {lora.plus_ratio:g}, and lora.freeze_a leaves no A that could learn more slowly than B"
        yield Cross(("lora.plus_ratio", "lora.freeze_a"), what, "keep one of them, and raise optim.lr for B")
    if lora.init == "default":
        return
    if cfg.model.adapter is not None:
        what = f"is {lora.init}, and model.adapter already gives the starting weights"
        yield Cross(("lora.init", "model.adapter"), what, "leave it out when training on from an adapter")
    if lora.dora and lora.init != "eva":
        what = f"is {lora.init}, and DoRA's magnitudes start from the plain weight, which that start takes apart"
        yield Cross(("lora.init", "lora.dora"), what, "leave out one of them")
    other = [t for t in lora.targets if t.rsplit(".", 1)[-1] not in LINEARS] if lora.targets != "all-linear" else []
    if other and lora.init != "eva":
        what = f"is {lora.init}, which starts decoder linears only, and lora.targets has {other[0]}"
        yield Cross(("lora.init", "lora.targets"), what, f"keep to {', '.join(LINEARS)}")


def _token_faults(cfg: RunConfig) -> Iterator[Cross]:
    tokens, place = cfg.model.new_tokens, ("model.new_tokens",)
    if len(set(tokens)) < len(tokens):
        yield Cross(place, "names a token twice", "keep one of them")
    for token in tokens:
        if not token or token != token.strip():
            what = f"has {token!r}, " + ("which begins or ends with white space" if token.strip() else "which is empty")
            yield Cross(place, what, "write the token alone, such as <|tool|>")
    named = {name.rsplit(".", 1)[-1] for name in cfg.lora.modules_to_save}
    if cfg.lora.targets != "all-linear":
        named |= {name.rsplit(".", 1)[-1] for name in cfg.lora.targets}
    both = sorted(named & {"embed_tokens", "lm_head"})
    if tokens and both:
        what = f"trains single rows of embed_tokens and lm_head, and lora adapts {' and '.join(both)} as a whole"
        yield Cross((*place, "lora.modules_to_save", "lora.targets"), what, f"take {both[0]} out of the lora section")


def _train_pairs(cfg: RunConfig) -> Iterator[Cross]:
    train, warmup = cfg.train, cfg.optim.warmup
    if train.epochs is not None and train.max_steps is not None:
        what = f"is {train.epochs:g}, and train.max_steps is {train.max_steps}: both say when to stop"
        yield Cross(("train.epochs", "train.max_steps"), what, "keep one of them")
    if isinstance(train.micro_batch, int) and train.global_batch % train.micro_batch:
        below = train.global_batch // train.micro_batch * train.micro_batch
        near = f"{below} or {below + train.micro_batch}" if below else str(train.micro_batch)
        what = f"is {train.global_batch}, which is not a multiple of train.micro_batch ({train.micro_batch})"
        yield Cross(("train.global_batch", "train.micro_batch"), what, f"use {near}")
    if warmup >= 1 and warmup != int(warmup):
        yield Cross(("optim.warmup",), f"is {warmup}: from 1 on it counts whole steps", f"use {round(warmup)}")
    if train.max_steps is not None and warmup >= 1 and warmup >= train.max_steps:
        what = f"is {warmup:g} steps, and train.max_steps is {train.max_steps}: the learning rate would only rise"
        yield Cross(("optim.warmup", "train.max_steps"), what, "use a share below 1, such as 0.03")
    if train.eval_every > 0 and cfg.data.validation is None and cfg.data.validation_share == 0:
        what = f"is {train.eval_every}, but data.validation_share is 0 and there is no data.validation to measure on"
        fix = "set train.eval_every to 0, or give held-out rows"
        yield Cross(("train.eval_every", "data.validation_share", "data.validation"), what, fix)
    yield from _needs_held_out(cfg)


def _needs_held_out(cfg: RunConfig) -> Iterator[Cross]:
    nothing = cfg.data.validation is None and cfg.data.validation_share == 0
    best = cfg.save.final == "best"
    for key, asked in (("train.patience", cfg.train.patience), ("save.final", best and "best")):
        if asked and not cfg.train.eval_every:
            what = f"is {asked}, and train.eval_every is 0: the held-out loss is measured only at the end"
            yield Cross((key, "train.eval_every"), what, "set train.eval_every to a number of steps")
    if cfg.train.min_improvement and not cfg.train.patience:
        what = f"is {cfg.train.min_improvement:g}, and train.patience is 0: no run ends early"
        yield Cross(("train.min_improvement", "train.patience"), what, "set train.patience, or leave it out")
    if best and not cfg.save.every:
        what = "is best, and save.every is 0: there are no checkpoints to take it from"
        yield Cross(("save.final", "save.every"), what, "set save.every to a number of steps")
    if cfg.eval.generate and nothing:
        what = f"is {cfg.eval.generate}, and no rows are held out whose answers could be scored"
        yield Cross(("eval.generate", "data.validation_share", "data.validation"), what, "give held-out rows")


def _save_pairs(cfg: RunConfig) -> Iterator[Cross]:
    if not cfg.save.folder.strip():
        yield Cross(("save.folder",), "is empty", "name a folder, such as runs/{name}")
    other = [name for name in re.findall(r"\{([^}]*)\}", cfg.save.folder) if name != "name"]
    if other:
        yield Cross(("save.folder",), f"has the placeholder {{{other[0]}}}", "only {name} is filled in")
    if "/" in cfg.name or cfg.name in (".", ".."):
        yield Cross(("name",), f"is {cfg.name!r}, which cannot name a folder", "leave out the slash")
