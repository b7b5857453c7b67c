"""LoRA's relatives: patterns, layers, LoRA+, LoRA-FA, and the starts that are computed (PiSSA, LoftQ, EVA).

Whole runs of each: test_relatives_runs.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from transformers import Phi3ForCausalLM

from phi3_dist.adapters.files import save_adapter
from phi3_dist.adapters.reading import read_metadata
from phi3_dist.config.schema import LoraConfig, OptimConfig, RunConfig
from phi3_dist.errors import DataError, ModelError, TrainingError
from phi3_dist.family.variants import Shape
from phi3_dist.modeling.base import find_base, load_full, tiny_config
from phi3_dist.modeling.lora import Adapted, adapted, add_lora, fill_adapter, peft_config, quiet_peft
from phi3_dist.modeling.lora_init import eva_init, loftq_init, pissa_init, saved_names, subtract_from_base
from phi3_dist.planning.memory import adapter_parameters
from phi3_dist.training.checkpoints.compatibility import identity
from phi3_dist.training.engines.optimizer import make_optimizer, set_lr
from phi3_dist.training.shared_init import LORA_INIT_FILE, computed_lora_init

IDS = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(0))
TINY = Shape.of(tiny_config().to_dict())


def tiny() -> Any:
    return load_full(find_base("tiny-random"), torch.float32, torch.device("cpu"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def reloaded(folder: Path, base: Any = None) -> Any:
    """As somebody without this toolkit loads it: plain PEFT on the plain base."""
    with quiet_peft():
        return PeftModel.from_pretrained(tiny() if base is None else base, str(folder))


def learn(model: Any, ids_1T: torch.Tensor = IDS, steps: int = 3) -> None:
    optimizer = make_optimizer(model, OptimConfig(lr=0.01), torch.device("cpu"))
    for _ in range(steps):
        out = model.train()(input_ids=ids_1T, labels=ids_1T, use_cache=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


ALONE = SimpleNamespace(
    rank=0, world=1, cut=None, is_main=True, device=torch.device("cpu"), dtype=torch.float32, plan=SimpleNamespace()
)


def started(lora: LoraConfig, folder: Path, *, resumed: bool = False) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model at its start, and what was computed for it."""
    base, plain = find_base("tiny-random"), tiny()
    cfg = RunConfig.model_validate({"model": {"source": "tiny-random"}, "data": {"train": "x"}, "lora": lora})
    start = computed_lora_init(cfg, plain, base, ALONE, packs=None, folder=folder, resumed=resumed)  # type: ignore[arg-type]
    model = add_lora(plain, lora, "tiny-random")
    if start:
        subtract_from_base(model, adapted(plain, model.peft_config["default"]), start)
    fill_adapter(model, 0, None, start)
    return model, start


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4, dropout=0.0, rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.*": 3.5}),
        LoraConfig(r=4, dropout=0.0, layers=(1,), rslora=True),
        LoraConfig(r=4, dropout=0.0, freeze_a=True),
        LoraConfig(r=4, dropout=0.0, dora=True, freeze_a=True),
        LoraConfig(r=4, dropout=0.0, init="pissa"),
        LoraConfig(r=4, dropout=0.0, init="pissa_niter_4", freeze_a=True),
        LoraConfig(r=4, dropout=0.0, init="pissa", rslora=True, rank_pattern={"o_proj": 2}, alpha_pattern={"mlp.*": 9}),
    ],
    ids=lambda lora: "-".join(f"{k}={v}" for k, v in lora.model_dump(exclude_unset=True).items() if k != "dropout"),
)
def test_a_relative_starts_as_the_plain_base_and_trains_what_is_counted(lora: LoraConfig, tmp_path: Path) -> None:
    model, _ = started(lora, tmp_path)
    torch.testing.assert_close(logits(model), logits(tiny()), atol=2e-5, rtol=1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_A." in name for name in trained) is not lora.freeze_a
    count = adapter_parameters(
        TINY, 4, dora=lora.dora, rank_pattern=lora.rank_pattern, layers=lora.layers, freeze_a=lora.freeze_a
    )
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_pissa_starts_as_peft_does_and_never_writes_to_the_weights_it_was_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Phi3ForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    base = find_base(str(tmp_path / "base"))
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    config = PeftLoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], init_lora_weights="pissa")
    with quiet_peft():
        theirs: Any = get_peft_model(load_full(find_base(base.source), torch.float32, torch.device("cpu")), config)
    plain = load_full(base, torch.float32, torch.device("cpu"))
    ours = add_lora(plain, LoraConfig(r=4, alpha=6, targets=("o_proj",)), str(tmp_path / "base"))
    modules = adapted(plain, ours.peft_config["default"])
    pairs = {m.name: pissa_init(base.weights.whole(f"{m.name}.weight"), m, None, 0) for m in modules}
    start = {n: t for m in modules for n, t in zip(saved_names(m), pairs[m.name], strict=True)}
    subtract_from_base(ours, modules, start)
    fill_adapter(ours, 0, None, start)
    their_weights = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(param, their_weights[name], atol=1e-5, rtol=1e-4)
    product = pairs[modules[0].name][1] @ pairs[modules[0].name][0]
    theirs_b, theirs_a = (their_weights[f"base_model.model.{modules[0].name}.lora_{x}.default.weight"] for x in "BA")
    torch.testing.assert_close(product, theirs_b @ theirs_a, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_the_approximate_decomposition_is_close_and_drawn_by_name() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 6) @ torch.randn(6, 30) + 0.01 * torch.randn(40, 30)
    module = Adapted("model.layers.0.mlp.down_proj", 6, 0.5)
    exact, near = (pissa_init(weight, module, niter, 0) for niter in (None, 8))
    torch.testing.assert_close(0.5 * near[1] @ near[0], 0.5 * exact[1] @ exact[0], atol=1e-3, rtol=1e-3)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(pissa_init(weight, module, 8, 0), near, strict=True))


def test_loftq_makes_up_for_what_quantisation_lost() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = bnb.functional.dequantize_4bit(packed, state)
    lost = [
        (weight - plain - 2.0 * b @ a).norm()
        for a, b in (loftq_init(weight, plain, Adapted("x", r, 2.0)) for r in (4, 16, 64))
    ]
    assert lost[0] < 0.95 * (weight - plain).norm()
    assert lost[1] < lost[0]
    assert lost[2] < 1e-4


def test_eva_finds_the_directions_that_peft_finds() -> None:
    torch.manual_seed(0)
    rows = [torch.randint(0, 300, (1, 40)) for _ in range(6)]
    plain = tiny()
    modules = adapted(plain, peft_config(plain, LoraConfig(r=3, targets=("qkv_proj", "down_proj")), "tiny"))
    found = eva_init(
        plain,
        modules,
        lambda: [({"input_ids": ids, "use_cache": False}, torch.arange(40)) for ids in rows],
        lambda batch: plain(**batch),
    )
    config = PeftLoraConfig(
        r=3,
        target_modules=["qkv_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, use_label_mask=False),
    )
    theirs = get_eva_state_dict(
        tiny(), [{"input_ids": ids} for ids in rows], config, show_progress_bar=False,
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=lambda x, *_: x[0].reshape(-1, x[0].shape[-1]),
    )  # fmt: skip
    assert set(theirs) == {m.name for m in modules}
    for module in modules:
        ours = found[saved_names(module)[0]]
        assert ours.shape == (3, plain.get_submodule(module.name).in_features)
        # the spans agree; they stop at another batch, since PEFT looks at the first one twice
        overlap = torch.linalg.svdvals(ours @ theirs[module.name].T.float())
        assert overlap.min() > 0.9, module.name


def test_eva_says_when_no_pack_has_enough_supervised_tokens() -> None:
    plain = tiny()
    modules = adapted(plain, peft_config(plain, LoraConfig(r=8), "tiny"))
    with pytest.raises(DataError, match="8 supervised tokens in one pack"):
        eva_init(plain, modules, lambda: [({"input_ids": IDS}, torch.arange(5))], lambda batch: plain(**batch))


def test_a_resumed_run_reads_its_start_and_says_when_it_is_gone(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, init="pissa_niter_2")
    _, first = started(lora, tmp_path)
    _, again = started(lora, tmp_path, resumed=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    (tmp_path / LORA_INIT_FILE).write_bytes(b"torn")
    with pytest.raises(TrainingError, match=LORA_INIT_FILE):
        started(lora, tmp_path, resumed=True)


def test_b_learns_faster_by_the_ratio_at_every_learning_rate() -> None:
    model = add_lora(tiny(), LoraConfig(r=2, dora=True), "tiny-random")
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.1), torch.device("cpu"), plus_ratio=16)
    names = {id(p): n for n, p in model.named_parameters()}
    for lr in (1e-3, 2e-4):
        set_lr(optimizer, lr)
        rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert set(rates) == {n for n, p in model.named_parameters() if p.requires_grad}
        for name, rate in rates.items():
            assert rate == pytest.approx(lr * (16 if ".lora_B." in name else 1)), name
    assert len(make_optimizer(model, OptimConfig(), torch.device("cpu")).param_groups) == 2


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraConfig(rank_pattern={"q_proj": 4}), "lora.rank_pattern: 'q_proj' matches none of the adapted modules"),
        (LoraConfig(alpha_pattern={"layers.7.*": 4}), "lora.alpha_pattern: 'layers.7"),
        (LoraConfig(layers=(0, 2)), "lora.layers: names layer 2, and the model has 2"),
        (LoraConfig(layers=(0,), targets=("o_proj", "1.mlp.down_proj")), "'1.mlp.down_proj' is in none of lora.layers"),
    ],
)
def test_what_matches_nothing_is_refused(lora: LoraConfig, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        peft_config(tiny(), lora, "tiny")
    assert said in str(caught.value)


def test_facts_of_the_run_stand_in_the_header_of_the_weights(tmp_path: Path) -> None:
    model, _ = started(LoraConfig(r=2), tmp_path)
    save_adapter(model, tmp_path / "adapter", metadata={"longrope": "long"})
    assert read_metadata(tmp_path / "adapter") == {"format": "pt", "longrope": "long"}
    assert np.isfinite(logits(reloaded(tmp_path / "adapter")).numpy()).all()


def test_a_frozen_a_that_another_file_brings_is_part_of_the_runs_identity(tmp_path: Path) -> None:
    """It is in no checkpoint: a resumed run takes it from the adapter's folder again."""
    prepared: Any = SimpleNamespace(fingerprint="data", train=SimpleNamespace(packs=[0]), held_out=None)
    found = []
    for seed in (0, 1):
        model = add_lora(tiny(), LoraConfig(r=2, freeze_a=True), "tiny-random")
        fill_adapter(model, seed)
        save_adapter(model, tmp_path / "adapter")
        model_section = {"source": "tiny-random", "adapter": str(tmp_path / "adapter")}
        for freeze_a in (True, False):
            lora = {"r": 2, "freeze_a": freeze_a}
            cfg = RunConfig.model_validate({"model": model_section, "data": {"train": "x"}, "lora": lora})
            facts = {"weights": "weights", "precision": "fp32", "kernels": "torch"}
            found.append(identity(cfg, prepared, find_base("tiny-random"), **facts))
    assert found[0]["frozen A"] != found[2]["frozen A"]
    assert found[1] == found[3]
