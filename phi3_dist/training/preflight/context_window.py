"""The longest row against the pack, the model's window, and the factors that LongRoPE serves it with."""

from __future__ import annotations

from transformers import Phi3Config

from phi3_dist.config.schema import RunConfig
from phi3_dist.machine.findings import Finding
from phi3_dist.modeling.rope import regime_for

__all__ = ["context_finding"]


def context_finding(cfg: RunConfig, base: Phi3Config, longest: int) -> Finding:
    """`longest`: tokens of the longest row that was looked at. A warning where the model was made for less."""
    window = int(base.max_position_embeddings)
    what = f"longest row {longest:,} tokens, packs {cfg.data.pack_length:,}, window {window:,}"
    regime = regime_for(base, longest, cfg.model.longrope)
    short = ""
    if regime is not None:
        original = int(base.rope_parameters.get("original_max_position_embeddings", window))
        what += f"; LongRoPE's {regime} factors, and the long ones are for rows above {original:,}"
        if regime == "short" and longest > original:
            short = f"{what}: rows are longer than the short factors serve"
        elif regime == "short" and cfg.model.longrope == "auto" and cfg.data.pack_length > original:
            what += ": one longer row turns the whole run to them"
    if longest > window:
        fix = f"data.pack_length={window} with data.on_long_row=drop or cut_turn"
        return Finding("warn", f"{what}: rows reach beyond what the model was trained for", fix, "context")
    if short:
        return Finding("warn", short, "model.longrope=auto, or shorter rows", "context")
    return Finding("ok", what, check="context")
