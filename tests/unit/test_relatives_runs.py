"""Every relative of LoRA, by a whole run: what its card loads has the trained model's logits, a resumed run its bits.

The runs are made in this process by the loop that `phi3-dist train` calls, on a base in a folder as a user has it. On
several ranks: tests/ranks/test_relatives_ranks.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from phi3_dist.adapters.files import write_adapter
from phi3_dist.adapters.loading import load_adapter
from phi3_dist.adapters.reading import read_adapter
from phi3_dist.adapters.select import find_peft_model
from phi3_dist.config.load import load_run
from phi3_dist.errors import AdapterError, ModelError
from phi3_dist.family.variants import Shape
from phi3_dist.machine.probe import probe
from phi3_dist.modeling.base import tiny_config
from phi3_dist.modeling.lora import quiet_peft
from phi3_dist.planning.facts import LaunchFacts, MachineFacts
from phi3_dist.planning.memory import GIB
from phi3_dist.training import final_adapter, whole_run
from tests.ranks.launcher import REPO
from tests.ranks.test_resume import interrupted, same_bits
from tests.ranks.test_strategies import rows, tiny_base

STEPS, SAVED = 4, 2
IDS_1T = torch.randint(0, 250, (1, 24), generator=torch.Generator().manual_seed(0))
COMMON = (
    "model.precision=fp32",
    "lora.dropout=0.1",
    f"train.max_steps={STEPS}",
    "train.global_batch=2",
    "train.micro_batch=1",
    "data.max_rows=12",
    "data.pack_length=260",
    "save.every=2",
    "save.keep=9",
    "log.trackers=[]",
)
RELATIVES = {
    "plain": ("lora.r=4",),
    "rslora": ("lora.rslora=true",),
    "dora": ("lora.dora=true",),
    "dora_frozen": ("lora.dora=true", "lora.freeze_a=true"),
    "pissa": ("lora.init=pissa",),
    "pissa_niter": ("lora.init=pissa_niter_4", "lora.freeze_a=true"),
    "pissa_patterns": (
        "lora.init=pissa",
        "lora.rslora=true",
        "lora.rank_pattern={o_proj: 2}",
        "lora.alpha_pattern={'mlp.*': 9}",
    ),
    "eva": ("lora.init=eva",),
    "eva_frozen": ("lora.init=eva", "lora.freeze_a=true"),
    "plus": ("lora.plus_ratio=8", "optim.lr=1e-3"),
    "frozen": ("lora.freeze_a=true",),
    "patterns": ("lora.rank_pattern={down_proj: 4}", "lora.alpha_pattern={'layers.1.*': 3.5}"),
    "layers": ("lora.layers=[1]", "lora.rslora=true"),
    "head": ("lora.modules_to_save=[lm_head]",),
    "tokens": ("model.new_tokens=[LATTE]",),
    "rows": ("model.new_tokens=[LATTE]",),
    "longrope": ("model.longrope=long",),
    "embedding": ("lora.targets=[embed_tokens, o_proj, lm_head]",),
}
"""LATTE stands in the rows as text. With `rows` the base has no row to spare."""
ON_NF4 = ("rslora", "dora", "dora_frozen", "eva", "plus", "frozen", "patterns", "layers", "tokens", "rows")
ON_INT8 = ("rslora", "eva", "plus", "frozen", "patterns", "layers", "rows")
RELATIVES |= {f"{name}_nf4": (*RELATIVES[name], "model.quantization=nf4") for name in ON_NF4}
RELATIVES |= {f"{name}_int8": (*RELATIVES[name], "model.quantization=int8") for name in ON_INT8}
RELATIVES["loftq"] = ("lora.init=loftq", "model.quantization=nf4")


def relatives(*in_make_test: str) -> list[object]:
    return [pytest.param(name, marks=() if name in in_make_test else pytest.mark.full) for name in RELATIVES]


@dataclasses.dataclass(frozen=True)
class Ran:
    """A run that has ended: its folder, its run file with overrides, and the logits of the live model at its end."""

    folder: Path
    base: Path
    overrides: tuple[str, ...]
    logits: torch.Tensor


@functools.cache
def here() -> MachineFacts:
    return probe()


def train(overrides: tuple[str, ...], folder: Path, *, resume: bool = False, allow: tuple[str, ...] = ()) -> None:
    cfg = load_run(REPO / "configs" / "run" / "debug.yaml", [*COMMON, *overrides, f"save.folder={folder}"])
    whole_run.train(cfg, here(), LaunchFacts(), resume=resume, allow_changed=allow, cache=folder.parent / "cache")


def logits(model: Any, **packed: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS_1T, use_cache=False, **packed).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def made(vocab_size: int) -> Path:
        return tiny_base(tmp_path_factory.mktemp("tiny") / "base", vocab_size=vocab_size)

    @functools.cache
    def longrope() -> Path:
        """With long factors that move every logit, and an original context beyond every row here."""
        folder = tiny_base(tmp_path_factory.mktemp("longrope") / "base")
        config = json.loads((folder / "config.json").read_text())
        scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
        config["rope_parameters"] = {**scaling, "short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
        (folder / "config.json").write_text(json.dumps({**config, "original_max_position_embeddings": 1024}))
        return folder

    def of(name: str) -> Path:
        return longrope() if name == "longrope" else made(270 if name.startswith("rows") else 320)

    return of


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, base: Callable[[str], Path]) -> Callable[[str], Ran]:
    """A relative's run, made once."""

    @functools.cache
    def made(name: str) -> Ran:
        found: list[torch.Tensor] = []

        def watch(model: Any, *args: Any, **more: Any) -> Any:
            length = IDS_1T.shape[1]
            found.append(logits(find_peft_model(model), position_ids=torch.arange(length)[None], lengths=(length,)))
            return saves(model, *args, **more)

        saves = final_adapter.save_adapter
        overrides = (f"model.source={base(name)}", *RELATIVES[name])
        folder = tmp_path_factory.mktemp(name) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(final_adapter, "save_adapter", watch)
            train(overrides, folder)
        return Ran(folder, base(name), overrides, *found)

    return made


def by_its_card(run: Ran) -> Any:
    """The model that the adapter's own card loads, with the paths filled in: transformers and plain PEFT."""
    card = (run.folder / "adapter" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for placeholder, path in (("path/to/base", run.base), ("path/to/this/folder", run.folder / "adapter")):
        assert placeholder in code
        code = code.replace(placeholder, str(path))
    assert "phi3_dist" not in code
    names: dict[str, Any] = {}
    with quiet_peft():
        exec(code, names)
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50's kernel for eval mode on CPUs with AVX512-BF16 rounds to bf16
            module.support_avx512bf16_for_cpu = False
    return names["model"]


CARDS = (
    "longrope",
    "rslora",
    "dora",
    "pissa_patterns",
    "eva",
    "plus",
    "frozen",
    "patterns",
    "layers",
    "head",
    "rows",
    "loftq",
)


@pytest.mark.parametrize("name", relatives(*CARDS, "longrope", "rslora_int8"))
def test_what_the_card_loads_gives_the_trained_models_logits(name: str, ran: Callable[[str], Ran]) -> None:
    if RELATIVES[name][-1].startswith("model.quantization"):
        pytest.importorskip("bitsandbytes")
    run = ran(name)
    assert rows(run.folder)[-1]["loss"] < rows(run.folder)[0]["loss"], "nothing was learned"
    model = by_its_card(run)
    # int8 rounds activations too, and fused sums differ in their last bits
    atol = 2e-3 if name.endswith("int8") else 2e-5
    torch.testing.assert_close(logits(model), run.logits, atol=atol, rtol=1e-4)
    with model.disable_adapter():
        assert (logits(model) - run.logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", relatives("dora", "pissa_patterns", "eva", "plus", "frozen", "rows", "loftq"))
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    name: str, ran: Callable[[str], Ran], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ran(name)
    again = interrupted(run.folder, tmp_path / "again", step=SAVED)
    capsys.readouterr()
    train(run.overrides, again, resume=True)
    assert f"resumed after step {SAVED} of {STEPS}" in capsys.readouterr().out
    same_bits(again, run.folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_the_long_factors_is_loaded_on_them_for_a_short_prompt(ran: Callable[[str], Ran]) -> None:
    run = ran("longrope")
    facts = json.loads((run.folder / "adapter" / "base_facts.json").read_text())
    assert facts == {"longrope": "long"}
    plain = AutoModelForCausalLM.from_pretrained(run.base)
    with quiet_peft():
        unpinned = logits(PeftModel.from_pretrained(copy.deepcopy(plain), run.folder / "adapter"))
    assert (unpinned - run.logits).abs().max() > 2e-3, "the factors make no difference here"
    loaded = load_adapter(plain, run.folder / "adapter")
    torch.testing.assert_close(logits(loaded), run.logits, atol=2e-5, rtol=1e-4)
    together = loaded.generate(input_ids=IDS_1T, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for length in range(IDS_1T.shape[1], together.shape[1]):  # with a cache it goes on as without one
        with torch.no_grad():
            assert loaded(input_ids=together[:, :length], use_cache=False).logits[0, -1].argmax() == together[0, length]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "trained with pissa_niter_4 beside a base that it had changed"),
        ({"init_lora_weights": "olora"}, "beside a base that it had changed"),
        ({"alora_invocation_tokens": [5]}, "trained with alora_invocation_tokens"),
        ({"lora_bias": True, "use_qalora": True}, "trained with lora_bias, use_qalora"),
    ],
)
def test_an_adapter_that_means_something_else_is_not_trained_on_from(
    changes: dict[str, Any], why: str, ran: Callable[[str], Ran], tmp_path: Path
) -> None:
    """Names and shapes of its tensors fit, and the losses would be other ones without a word."""
    first = ran("head")
    tensors, config = read_adapter(first.folder / "adapter")
    write_adapter(tmp_path / "adapter", tensors, {**config, **changes}, card="")
    with pytest.raises(ModelError, match=why):
        train((*first.overrides, f"model.adapter={tmp_path / 'adapter'}"), tmp_path / "on")


def test_factors_that_the_base_has_not_are_refused(ran: Callable[[str], Ran], tmp_path: Path) -> None:
    tensors, config = read_adapter(ran("longrope").folder / "adapter")
    for said, why in (("long", "and this base has none"), ("middle", "which is neither short nor long")):
        write_adapter(tmp_path / said, tensors, config, card="", metadata={"longrope": said})
        base = ran("plain").base
        with pytest.raises(AdapterError, match=why):
            load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / said)


def test_the_plan_of_a_run_counts_the_rows_that_its_base_lacks(ran: Callable[[str], Ran]) -> None:
    shape = dataclasses.replace(Shape.of(tiny_config().to_dict()), vocab=271)
    terms = json.loads((ran("rows").folder / "plan.json").read_text())["memory"]
    assert [t["gib"] * GIB for t in terms if t["name"] == "base weights"] == [4 * shape.parameters]


WRITERS = ("ours", "peft")
BASE_TOO = ("embedding",)
"""PEFT saves an adapted embedding's own table too, which has no place in an adapter's file here."""


def of_its_config(adapter: Path) -> tuple[str, ...]:
    """The `lora` section that a saved adapter asks for, of PiSSA's another one than it was trained with."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    said = {"r": config["r"], "alpha": config["lora_alpha"], "init": "default"}
    said |= {key: json.dumps(config[key]) for key in ("rank_pattern", "alpha_pattern") if config[key]}
    return tuple(f"lora.{key}={value}" for key, value in said.items())


def as_peft_saves_it(run: Ran, folder: Path) -> Path:
    by_its_card(run).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        *((name, "ours") for name in ("dora", "pissa_patterns", "head", "rows", "embedding", "loftq")),
        ("dora", "peft"),
        *(pytest.param(name, writer, marks=pytest.mark.full) for name in RELATIVES for writer in WRITERS),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT, of a table that has grown
def test_training_on_from_an_adapter_starts_where_it_ended(
    name: str, writer: str, ran: Callable[[str], Ran], tmp_path: Path
) -> None:
    """From every kind of adapter that a run saves, and from the same one saved by PEFT."""
    if "quantization" in RELATIVES[name][-1]:
        pytest.importorskip("bitsandbytes")
    first, adapter = ran(name), ran(name).folder / "adapter"
    taught = (f"model.tokenizer={adapter}",) if "new_tokens" in RELATIVES[name][0] else ()
    if writer == "peft":
        if name in BASE_TOO:
            pytest.skip("PEFT saves the base's tables beside it")
        adapter = as_peft_saves_it(first, tmp_path / "saved")
    more = (f"model.adapter={adapter}", *taught, *of_its_config(adapter), "optim.lr=1e-12", "train.max_steps=1")
    train((*first.overrides, *more), tmp_path / "on")
    ended, again = (rows(folder, "eval")[-1]["heldout_loss"] for folder in (first.folder, tmp_path / "on"))
    assert again == pytest.approx(ended, rel=1e-3 if name.endswith("int8") else 1e-6)
    if name.startswith("rows"):
        model = by_its_card(dataclasses.replace(first, folder=tmp_path / "on"))
        torch.testing.assert_close(logits(model), first.logits, atol=2e-5, rtol=1e-4)
