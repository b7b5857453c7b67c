"""From the checks' figures to what the plan should choose on this card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["choices_of", "read_rows"]

FORMS = ("shipped", "beta 1", "triton", "padded")
GAINS = 1.01
"""A choice that costs seconds at every start has to gain more than this."""


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "checks.jsonl").read_text("utf-8").splitlines()]


def _one(rows: Sequence[Mapping[str, Any]], group: str, check: str) -> Mapping[str, Any]:
    """The row of a check that went well, or an empty one."""
    return next((r for r in rows if r["group"] == group and r["check"] == check and r.get("ok")), {})


def _ratio(above: Any, below: Any) -> float | None:
    return round(above / below, 3) if above and below else None


def _attention(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fastest backend over documents of chats' length, and what adding up in one order costs it."""
    found: dict[str, float] = {}
    for row in rows:
        name, _, rest = row["check"].partition(", deterministic ")
        if row["group"] == "attention" and row.get("ok") and rest == "True: 8 documents of 512":
            found[name] = row["ms_both"]
    if not found:
        return {}
    best = min(found, key=lambda name: found[name])
    loose = _one(rows, "attention", f"{best}, deterministic False: 8 documents of 512").get("ms_both")
    return {"attention": best, "deterministic_cost": _ratio(found[best], loose), "attention_ms": found}


def _products(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a layer's four linears with dropout, forward and backward, in each form."""
    linears = [row for row in rows if row["check"].startswith("linear ") and row["check"].endswith("dropout 0.05")]
    timed = [row["forward, backward, tflops"] for row in linears if row.get("ok")]
    if len(timed) != 4:
        return {}
    ms = {form: round(sum(sum(one[form][:2]) for one in timed), 4) for form in FORMS if all(form in o for o in timed)}
    return {"lora_form": min(ms, key=lambda form: ms[form]), "lora_form_ms": ms}


def _loss(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    head = _one(rows, "products", "head and cross-entropy")
    chunks = {key.removeprefix("ms_chunk_"): ms for key, ms in head.items() if key.startswith("ms_chunk_")}
    if not chunks:
        return {}
    rows_at_once = min(chunks, key=lambda size: chunks[size])
    liger = head.get("ms_liger")
    faster = "liger" if liger and liger < chunks[rows_at_once] else "chunked"
    return {
        "loss": faster,
        "chunk_rows": int(rows_at_once),
        "loss_ms": {**chunks, **({"liger": liger} if liger else {})},
    }


def choices_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the plan reads (`attention`, `compile`, `kernels`, `loss`) with the figures that say so; what was not
    measured is left out."""
    machine = _one(rows, "facts", "machine")

    def speed(case: str) -> Any:
        return _one(rows, "model", f"LoRA 4096{case}").get("tokens_per_s")

    planned = _one(rows, "model", "LoRA 4096, as planned")
    found: dict[str, Any] = {
        "card": machine.get("gpu"),
        "torch": machine.get("torch"),
        **_attention(rows),
        **_products(rows),
        **_loss(rows),
    }
    compiled = _ratio(speed(", compiled passes"), speed(", torch's kernels"))
    triton = _ratio(speed(", Triton's kernels"), speed(", torch's kernels"))
    found |= {
        "compile": compiled and compiled > GAINS,
        "compile_gain": compiled,
        "kernels": triton and ("triton" if triton > GAINS else "torch"),
        "kernels_gain": triton,
        "dropout_cost": _ratio(speed(", no dropout"), speed(", as planned")),
        "fp8_gain": _ratio(speed(", FP8 base"), speed(", as planned")),
        "tokens_per_s": planned.get("tokens_per_s"),
        "share_of_matrix_rate": planned.get("share"),
        "matrix_rate_tflops": planned.get("rate_tflops"),
        "copy_tb_per_s": machine.get("copy_tb_per_s"),
    }
    return {key: value for key, value in found.items() if value is not None}
