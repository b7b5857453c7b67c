"""Base weights (base.py), LoRA, attention/, loss, and what is computed by other means (kernels/, passes.py,
fused_*.py)."""
