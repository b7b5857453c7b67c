"""Base weights, LoRA, attention/, loss, and what is computed by other means (kernels/, passes.py, fused_*.py).

Begin with base.py, which finds and loads a base; lora.py adds the adapter.
"""
