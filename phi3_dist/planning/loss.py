"""What computes `lm_head` and the cross-entropy: this toolkit's chunks, or Liger's kernel where it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["INSTALL", "LIGER", "choose_loss", "why_not_liger"]

LIGER = "liger-kernel"
INSTALL = "pip install 'phi3-dist[kernels]'"


def why_not_liger(
    device: str, packages: Mapping[str, str], *, targets: Collection[str], saved: Collection[str], new_tokens: bool
) -> tuple[str, str]:
    """Why Liger's `LigerFusedLinearCrossEntropyFunction` can't compute the loss, and the fix; both empty where it can.

    `targets` and `saved` are `lora.targets` and `lora.modules_to_save`. The kernel takes one plain frozen weight: for a
    trained head it would add up the gradients of its chunks in the weight's own dtype (read in version 0.8.5).
    """
    plain = "model.loss=chunked"
    if device != "cuda":
        return f"its Triton kernels need CUDA, and the device is {device}", plain
    if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
        return "lm_head has an adapter, and the kernel takes a plain weight", plain
    if "lm_head" in saved:
        return "lm_head trains, and the kernel adds up its gradient in 16 bits", plain
    if new_tokens:
        return "model.new_tokens trains rows of lm_head, and the kernel takes a plain weight", plain
    for name in (LIGER, "triton"):
        if name not in packages:
            return f"{name} is not installed", INSTALL
    return "", ""


def choose_loss(asked: str, obstacle: str) -> tuple[str, str]:
    """`chunked` or `liger`, and the reason. What is asked for and has an obstacle is the caller's to refuse."""
    if asked != "auto":
        return asked, "as the run file says"
    other = obstacle or "not timed beside it on a card yet; model.loss=liger takes it"
    return "chunked", f"one chunk of logits at a time; Liger's kernel: {other}"
