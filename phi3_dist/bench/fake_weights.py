"""A base of any shape without its numbers: fake weights, and a quantised one where bitsandbytes' own classes can't be.

bitsandbytes' parameters are tensor subclasses, which no fake tensor can be. So transformers' own `from_pretrained` runs
until it would read the weights: it has taken or refused the arguments and decided about the device by then. From there
on its modules are made here: bitsandbytes' linears, whose weights come from bitsandbytes' quantising operators on fake
tensors, as plain parameters with the same attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import numpy as safetensors_numpy
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.initialization import no_init_weights

from phi3_dist.modeling.base import Base
from phi3_dist.modeling.weights import Weights

__all__ = ["fake_base", "fake_quantized_loading"]


def fake_base(config: Phi3Config, folder: Path) -> Base:
    """A base of this shape whose weights are fake, and a folder that looks like one. Inside the fake devices."""
    import numpy as np

    with torch.device("meta"), no_init_weights():
        shapes = {name: param.shape for name, param in Phi3ForCausalLM(config).named_parameters()}
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device="cpu") for name, shape in shapes.items()}
    config.save_pretrained(folder)
    safetensors_numpy.save_file({"x": np.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    return Base(str(folder), config, folder, Weights({}, tensors))


class _WouldReadWeights(Exception):  # noqa: N818 -- no error: where the stand-in takes over
    def __init__(self, model: Any, device_map: Any, quantizer: Any) -> None:
        super().__init__()
        self.model, self.device_map, self.quantizer = model, device_map, quantizer


def _stop(quantizer: Any, model: Any, device_map: Any = None, **_: Any) -> None:
    quantizer.modules_to_not_convert = quantizer.get_modules_to_not_convert(
        model, quantizer.quantization_config.llm_int8_skip_modules, model._keep_in_fp32_modules
    )
    raise _WouldReadWeights(model, device_map, quantizer)


def _parameter(data: Tensor, **attributes: Any) -> nn.Parameter:
    param = nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def _four_bit(weight: Tensor, asked: Any) -> Any:
    """bitsandbytes' Linear4bit with this weight quantised."""
    import bitsandbytes as bnb

    kind, storage = asked.bnb_4bit_quant_type, asked.bnb_4bit_quant_storage
    options = {"compress_statistics": asked.bnb_4bit_use_double_quant, "quant_type": kind, "quant_storage": storage}
    with _disable_current_modes(), torch.device("meta"):
        linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], False, asked.bnb_4bit_compute_dtype, **options)
    data, state = bnb.functional.quantize_4bit(weight, **options)
    del linear.weight
    linear.weight = _parameter(data, quant_state=state, blocksize=64, bnb_quantized=True, module=linear, **options)
    linear.quant_state = state
    return linear


def _eight_bit(weight: Tensor, asked: Any) -> Any:
    """bitsandbytes' Linear8bitLt with this weight quantised."""
    import bitsandbytes as bnb

    with _disable_current_modes(), torch.device("meta"):
        linear = bnb.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], False, has_fp16_weights=False, threshold=asked.llm_int8_threshold
        )
    data, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    del linear.weight
    linear.weight = _parameter(data, CB=data, SCB=scales, has_fp16_weights=False)
    return linear


def _made(reached: _WouldReadWeights, base: Base, dtype: torch.dtype) -> Phi3ForCausalLM:
    """The model as transformers would have loaded it, on the device that it has settled on."""
    place = (reached.device_map or {"": "cpu"})[""]
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    model, asked = reached.model, reached.quantizer.quantization_config
    make = _four_bit if asked.quantization_method() == "bitsandbytes_4bit" or asked.load_in_4bit else _eight_bit
    skipped = tuple(reached.quantizer.modules_to_not_convert or ())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(skipped):
            model.set_submodule(name, make(base.weights.whole(f"{name}.weight").to(device, dtype), asked))
    quantized = {name for name, param in model.named_parameters() if param.device.type != "meta"}
    state = {n: base.weights.whole(n).to(device, dtype) for n, _ in model.named_parameters() if n not in quantized}
    model.load_state_dict(state, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.tie_weights()
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = make is _four_bit, make is _eight_bit
    model.is_quantized, model.hf_quantizer = True, reached.quantizer
    quantizer = reached.quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    return model.eval()


@contextmanager
def fake_quantized_loading(base: Base) -> Iterator[None]:
    """`Phi3ForCausalLM.from_pretrained` with a bitsandbytes configuration gives a fake model inside."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    real = Phi3ForCausalLM.from_pretrained

    def from_pretrained(folder: Path, *, dtype: torch.dtype, **options: Any) -> Phi3ForCausalLM:
        try:
            real(folder, dtype=dtype, **options)
        except _WouldReadWeights as reached:
            return _made(reached, base, dtype)
        raise AssertionError("transformers has read weights of a quantised base before its quantizer saw the model")

    with ExitStack() as stack:
        for quantizer in (Bnb4BitHfQuantizer, Bnb8BitHfQuantizer):
            stack.enter_context(patch.object(quantizer, "_process_model_before_weight_loading", _stop))
        stack.enter_context(patch.object(Phi3ForCausalLM, "from_pretrained", from_pretrained))
        yield
