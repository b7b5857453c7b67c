"""Accelerated and distributed LoRA and QLoRA fine-tuning of Microsoft's Phi-3 family. Begin with api.py.

Public: the verbs as functions, `load_run`, `plan`, `train`, `evaluate`, `generate`, `adapter_of_checkpoint`, `export`,
`check`, `push`, `report_page` (api.py); `load_tokenizer`, `gather_adapter`, `save_adapter`, and loralib's two functions
for PEFT models under every strategy, `mark_only_lora_as_trainable` and `lora_state_dict`. They import torch only when
they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_dist.notices import keep_quiet_about_missing_kernel
from phi3_dist.version import __version__

keep_quiet_about_missing_kernel()

if TYPE_CHECKING:
    from phi3_dist.adapters.files import save_adapter
    from phi3_dist.adapters.gather import gather_adapter
    from phi3_dist.adapters.loralib.state_dicts import lora_state_dict, mark_only_lora_as_trainable
    from phi3_dist.api import (
        adapter_of_checkpoint,
        check,
        evaluate,
        export,
        generate,
        load_run,
        plan,
        push,
        report_page,
        train,
    )
    from phi3_dist.modeling.tokenizer import load_tokenizer

__all__ = [
    "__version__",
    "adapter_of_checkpoint",
    "check",
    "evaluate",
    "export",
    "gather_adapter",
    "generate",
    "load_run",
    "load_tokenizer",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "plan",
    "push",
    "report_page",
    "save_adapter",
    "train",
]

_HOME = {
    **dict.fromkeys(
        (
            "adapter_of_checkpoint",
            "check",
            "evaluate",
            "export",
            "generate",
            "load_run",
            "plan",
            "push",
            "report_page",
            "train",
        ),
        "phi3_dist.api",
    ),
    "gather_adapter": "phi3_dist.adapters.gather",
    "load_tokenizer": "phi3_dist.modeling.tokenizer",
    "lora_state_dict": "phi3_dist.adapters.loralib.state_dicts",
    "mark_only_lora_as_trainable": "phi3_dist.adapters.loralib.state_dicts",
    "save_adapter": "phi3_dist.adapters.files",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
