"""transformers' and PEFT's own step on fake CUDA tensors, counted as ours is: what fitcheck plans.

One row of tokens, all of them labels, LoRA on every linear, AdamW, and what is not quantised in float32, as PEFT's
guide has it; no packs, no fused layers, all logits at once.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phi3_dist.bench.memory_cells import GIB, MemoryCell, config_of

__all__ = ["rehearse_stock"]


def rehearse_stock(cell: MemoryCell) -> dict[str, float]:
    """GiB that live at the peak of its second step, by kind. For a process that has called `import_all`."""
    import torch
    from peft import LoraConfig, get_peft_model

    from phi3_dist.bench.counting import Watch
    from phi3_dist.bench.fake_device import fake_cuda
    from phi3_dist.bench.fake_weights import fake_base, fake_quantized_loading
    from phi3_dist.modeling.base import load_full, load_quantized

    config, watch = config_of(cell), Watch()
    config._attn_implementation = "sdpa"
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(fake_cuda(watch.wait))
        base = fake_base(config, scratch / "base")
        stack.enter_context(fake_quantized_loading(base))
        stack.enter_context(watch)
        device = torch.device("cuda", 0)
        if cell.quantization == "none":
            model: Any = load_full(base, torch.bfloat16, device)
        else:
            model = load_quantized(base, cell.quantization, torch.bfloat16, device)
            for param in model.parameters():  # as PEFT's prepare_model_for_kbit_training does
                if not hasattr(param, "quant_state"):
                    param.data = param.data.float()
        model.config._attn_implementation = "sdpa"
        if cell.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        lora = LoraConfig(
            r=cell.r,
            lora_alpha=2 * cell.r,
            lora_dropout=cell.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora).train()
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.ones((1, cell.length), dtype=torch.int64, device=device)
        for step in range(2):
            watch.phase = "forward"
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            watch.phase = "backward"
            loss.backward()
            watch.phase = "update"
            optimizer.step()
            optimizer.zero_grad()
            del loss
            if step == 0:
                watch.name_tensors(model, optimizer)
                watch.restart()
        return {kind: size / GIB for kind, size in watch.live.peak["cuda"].items() if size}
