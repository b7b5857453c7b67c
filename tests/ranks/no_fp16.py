"""`phi3-dist` as on a machine whose accelerator has no fp16: an AMD EPYC, for one. DeepSpeed asks for it."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.accelerator import get_accelerator

from phi3_dist.cli import main

accelerator = get_accelerator()
accelerator.is_fp16_supported = lambda: False
assert not accelerator.is_fp16_supported()

if __name__ == "__main__":
    main()
