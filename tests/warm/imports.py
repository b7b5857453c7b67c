"""What a training run imports, by the end of it."""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import tempfile
from pathlib import Path

import phi3_dist

# Besides every module of phi3_dist. Not deepspeed: what it is to run on is read when it is imported, and it is quick.
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.phi3.modeling_phi3",
    "transformers.models.llama.tokenization_llama",
    "peft",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "bitsandbytes",
    "datasets",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "tensorboard",
    # what these import once they are used
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "torch.nn.attention.varlen",
    "torch.utils.cpp_extension",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "rich._emoji_codes",
    "typer._adapters",
    # and what deepspeed imports
    "einops",
    "hjson",
    "msgpack",
    "setuptools",
)
# Programs: they do their work when they are imported, or begin with a setting of their own.
NOT_IMPORTED = ("phi3_dist.bench", "phi3_dist.demo", "phi3_dist.modeling.kernels")


def names() -> list[str]:
    """Every library in the list, and every module of the package that is not a program."""
    modules = (module.name for module in pkgutil.walk_packages(phi3_dist.__path__, "phi3_dist."))
    return [*LIBRARIES, *(m for m in modules if not m.startswith(NOT_IMPORTED) and not m.endswith("__main__"))]


def import_all() -> None:
    """All of them, but for what another version of a library lacks; and what transformers makes for its first model."""
    for name in names():
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("phi3")
    what_a_run_reads_once()


def what_a_run_reads_once() -> None:
    """Versions of packages, and fonts: a picture is drawn into nothing."""
    from phi3_dist.machine.probe import package_versions
    from phi3_dist.report.curves_png import draw_curves
    from phi3_dist.training.run_folder import versions

    package_versions()
    versions()
    row = {"kind": "train", "step": 1, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_s": 100.0}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        draw_curves(Path(folder))
