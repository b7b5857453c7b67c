"""Exports are the model that was trained: read by transformers and PEFT alone, and compared here once more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

from phi3_dist.adapters.loading import load_adapter
from phi3_dist.errors import AdapterError, RunFolderError
from phi3_dist.exports import exporting, merged
from phi3_dist.exports.drift import rows_for, tokenizer_of
from phi3_dist.exports.exporting import export
from phi3_dist.exports.gguf_file import read_gguf_adapter
from phi3_dist.exports.open_adapter import open_adapter
from phi3_dist.exports.weight_updates import Update
from phi3_dist.modeling.lora import quiet_peft
from phi3_dist.modeling.rope import pin_longrope
from tests.export_cases import CASES, LONGROPE, small_adapter, small_base

IDS = torch.arange(3, 63)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def lora(base: Path) -> Path:
    return small_adapter(base.parent / "lora", base)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits[0]


def plain_peft(model: Any, adapter: Path) -> Any:
    with quiet_peft():
        return PeftModel.from_pretrained(model, adapter)


def live(base: Path, adapter: Path) -> torch.Tensor:
    return logits(load_adapter(Phi3ForCausalLM.from_pretrained(base), adapter))


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


# --- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_is_the_live_one_for_transformers_alone(name: str, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, **CASES[name])
    done = export(adapter, tmp_path / "merged", "merged")
    ours = live(base, adapter)
    assert off(ours, logits(Phi3ForCausalLM.from_pretrained(tmp_path / "merged"))) < 1e-5
    assert off(ours, logits(Phi3ForCausalLM.from_pretrained(base))) > 1e-2, "the adapter must show"
    assert done.drift.error < 1e-5 < done.drift.effect
    assert done.drift.loss_live == pytest.approx(done.drift.loss_export, rel=1e-5)


def test_a_merged_folder_is_sealed_and_says_how_far_it_is(lora: Path, tmp_path: Path) -> None:
    done = export(lora, tmp_path / "merged", "merged")
    sums = json.loads((tmp_path / "merged" / "checksums.json").read_text())["sha256"]
    there = {p.name for p in (tmp_path / "merged").iterdir()} - {"checksums.json"}
    assert set(sums) == there
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors"} <= there
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"{done.drift.error:.2e} off the live model's" in card
    assert str(tmp_path) not in card
    assert "trained on the base as it is, merged into the base's own weights" in done.what
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_an_adapter_that_peft_saved_with_its_grown_tables_is_exported_too(tmp_path: Path) -> None:
    """PEFT 0.21 saves embedding and head whole once they have grown, and no header that says how far."""
    base = small_base(tmp_path / "base", vocab_size=270)  # as many rows as its tokenizer has ids
    ours = small_adapter(tmp_path / "ours", base, new_tokens=("<|a|>",))
    model = load_adapter(Phi3ForCausalLM.from_pretrained(base), ours)
    theirs = tmp_path / "theirs"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(theirs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ours / name, theirs)
    table = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    tensors = load_file(theirs / "adapter_model.safetensors")
    assert table in tensors
    drifts = [export(folder, tmp_path / f"{folder.name}_{kind}", kind).drift
              for folder in (ours, theirs) for kind in ("merged", "one-rank")]  # fmt: skip
    assert all(drift.error < 1e-4 and drift.effect > 0.1 for drift in drifts)
    tensors[table][7] += 1
    save_file(tensors, theirs / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="is another table than the base's"):
        open_adapter(theirs)
    config = json.loads((theirs / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": [280]}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="has a trained token row 280, and the base has 270 rows"):
        open_adapter(theirs)


def test_taught_tokens_bring_enlarged_tables_and_the_tokenizer(base: Path, tmp_path: Path) -> None:
    tokens = tuple(f"<|t{i}|>" for i in range(55))  # the base has 320 rows for 270 ids
    adapter = small_adapter(tmp_path / "adapter", base, new_tokens=tokens)
    export(adapter, tmp_path / "merged", "merged")
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == 325 == model.get_input_embeddings().weight.shape[0]
    assert "<|t54|>" in (tmp_path / "merged" / "tokenizer.json").read_text()
    ids = torch.tensor([[5, 270, 324, 9]])
    with torch.no_grad():
        ours = load_adapter(Phi3ForCausalLM.from_pretrained(base), adapter)(input_ids=ids).logits
        assert off(ours, model(input_ids=ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ["tokens", "head", "lora_head"])
def test_tied_tables_stay_tied_where_both_changed_and_part_where_one_did(name: str, tmp_path: Path) -> None:
    base = small_base(tmp_path / "base", tie_word_embeddings=True)
    more: dict[str, Any] = {
        "tokens": {"new_tokens": ("<|a|>",)},
        "head": {"modules_to_save": ("lm_head",)},
        "lora_head": {"targets": ("lm_head", "o_proj")},
    }[name]
    adapter = small_adapter(tmp_path / "adapter", base, **more)
    export(adapter, tmp_path / "merged", "merged")
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings == (name == "tokens")
    assert off(live(base, adapter), logits(model)) < 1e-5


@pytest.mark.parametrize("factors", ["short", "long"])
def test_longropes_factors_are_compared_as_trained(factors: str, tmp_path: Path) -> None:
    base = small_base(tmp_path / "base", rope_parameters=LONGROPE)
    adapter = small_adapter(tmp_path / "adapter", base, facts={"longrope": factors})
    done = export(adapter, tmp_path / "merged", "merged")
    assert done.drift.error < 1e-5
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "merged")
    pin_longrope(model, 0, factors)  # type: ignore[arg-type]
    assert off(live(base, adapter), logits(model)) < 1e-5
    assert f"LongRoPE's {factors} factors" in (tmp_path / "merged" / "README.md").read_text()


def test_the_16_bit_base_gives_a_16_bit_model(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base", torch.bfloat16)
    adapter = small_adapter(tmp_path / "adapter", base)
    done = export(adapter, tmp_path / "merged", "merged")
    assert "bfloat16" in done.what
    assert Phi3ForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    assert 1e-4 < done.drift.error < exporting.ROUNDED


def test_an_nf4_adapter_goes_into_nf4s_weights_or_with_more_drift_into_the_base(base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, quantization="nf4")
    exact = export(adapter, tmp_path / "nf4", "merged")
    drifted = export(adapter, tmp_path / "base", "merged", into="base")
    assert "trained on the base in NF4, merged into the dequantised NF4 weights" in exact.what
    assert "trained on the base in NF4, merged into the base's own weights" in drifted.what
    assert exact.drift.error < 1e-5
    assert drifted.drift.error > 1e-3
    assert exact.drift.loss_export == pytest.approx(exact.drift.loss_live, rel=1e-4)
    assert drifted.drift.loss_export != pytest.approx(drifted.drift.loss_live, rel=1e-4)


def test_loftq_is_merged_into_nf4_alone(base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, facts={"quantization": "nf4", "start": "loftq"})
    with pytest.raises(AdapterError, match="applied twice") as refused:
        export(adapter, tmp_path / "out", "merged", into="base")
    assert refused.value.problems[0].fix == "--into nf4"
    assert not (tmp_path / "out").exists()


def test_shards_bound_what_is_in_memory(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "SHARD_BYTES", 100_000)
    sizes = []
    write = merged.write_tensors
    monkeypatch.setattr(
        merged, "write_tensors", lambda path, t: (sizes.append(sum(x.nbytes for x in t.values())), write(path, t))
    )
    export(lora, tmp_path / "merged", "merged")
    assert len(sizes) > 3
    assert max(sizes) <= 100_000
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(sizes)
    assert index["metadata"]["total_size"] == sum(sizes)
    assert off(live(lora.parent / "base", lora), logits(Phi3ForCausalLM.from_pretrained(tmp_path / "merged"))) < 1e-5


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_export_that_is_not_the_live_model_gets_no_name(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Update.of
    monkeypatch.setattr(Update, "of", lambda self, weight: right(self, weight) * 1.01)
    with pytest.raises(AdapterError, match="would not be the model that was trained"):
        export(lora, tmp_path / "merged", "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_stopped_leaves_nothing_and_clears_what_dead_ones_left(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "merged.tmp-4194304"  # above the highest number that Linux gives
    (dead / "deep").mkdir(parents=True)
    mine = tmp_path / "merged.tmp-mine"
    mine.mkdir()
    seen: list[str] = []

    def stop(opened: Any, rows: Any) -> None:
        seen.extend(p.name for p in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "live_logits", stop)
    with pytest.raises(KeyboardInterrupt):
        export(lora, tmp_path / "merged", "merged")
    assert len(seen) == 2, "the weights were being compared, under no name that anybody takes for a model's"
    assert "merged" not in seen
    assert [p.name for p in tmp_path.iterdir()] == ["merged.tmp-mine"]


@pytest.mark.full
def test_a_killed_export_leaves_nothing_that_looks_finished(lora: Path, tmp_path: Path) -> None:
    """Killed while it compares: all weights are there by then."""
    code = (
        "import os, signal, sys; from phi3_dist.exports import exporting\n"
        "exporting.live_logits = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "exporting.export(sys.argv[1], sys.argv[2], 'merged')"
    )
    done = subprocess.run([sys.executable, "-c", code, lora, tmp_path / "merged"], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("merged.tmp-")
    export(lora, tmp_path / "merged", "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["merged"], "what the dead one left is gone"


def test_a_target_that_exists_is_left_alone(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(AdapterError, match="mine: exists"):
        export(lora, tmp_path / "mine", "merged")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_adapter_of_another_base_is_told_at_once(lora: Path, tmp_path: Path) -> None:
    other = small_base(tmp_path / "other", hidden_size=32)
    with pytest.raises(AdapterError, match=r"was trained on another base than .*other: .* \(\d+ more\)") as refused:
        export(lora, tmp_path / "out", "merged", base=str(other))
    assert len(refused.value.problems) == 1
    assert "--base" in refused.value.problems[0].fix


def test_a_base_that_is_gone_is_told_with_the_option_that_names_it(lora: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(lora, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "no")}))
    with pytest.raises(AdapterError, match="its base can't be used") as refused:
        export(adapter, tmp_path / "out", "merged")
    assert "--base FOLDER" in refused.value.problems[0].fix
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say what base"):
        export(adapter, tmp_path / "out", "merged")


def test_an_unfinished_run_and_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".phi3_dist_run").write_text('{"phi3_dist_run": "1"}')
    with pytest.raises(RunFolderError, match="has not finished") as refused:
        open_adapter(tmp_path / "run")
    assert "phi3-dist adapter" in refused.value.problems[0].fix
    with pytest.raises(AdapterError, match="neither a run's folder nor an adapter's"):
        open_adapter(tmp_path)
    with pytest.raises(AdapterError, match="no such folder"):
        open_adapter(tmp_path / "none")


def test_data_that_can_not_be_read_is_told_and_rows_of_ones_own_are_taken(lora: Path, tmp_path: Path) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    assert export(lora, tmp_path / "out", "one-rank", data=str(rows)).drift.origin == "1 rows of mine.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 1000, "completion": "b" * 1000}) + "\n")
    opened = open_adapter(lora)
    found = rows_for(opened, tokenizer_of(opened), str(rows))
    assert len(found.ids[0]) == 256
    assert 0 < found.supervised[0].index(True) < 200, "of a long row its answer's beginning, too"


# --- other forms of the adapter -------------------------------------------------------------------------------------

SHORT = (("patterns", "split"), ("rslora", "one-rank"), ("some_layers", "one-rank"))
FORMS = [
    pytest.param(name, form, marks=() if (name, form) in SHORT else pytest.mark.full)
    for name in CASES
    for form in ("split", "one-rank")
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_another_form_is_the_same_update(name: str, form: Any, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, **CASES[name])
    done = export(adapter, tmp_path / "out", form)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert done.drift.error < 1e-5
    if form == "one-rank":
        with_peft = plain_peft(Phi3ForCausalLM.from_pretrained(base), tmp_path / "out")
        assert off(live(base, adapter), logits(with_peft)) < 1e-5


def as_llama(base: Path) -> LlamaForCausalLM:
    """The same weights under Llama's names."""
    phi3 = Phi3ForCausalLM.from_pretrained(base)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    config = LlamaConfig(**{k: getattr(phi3.config, k) for k in (*keys, *more)}, bos_token_id=None, eos_token_id=None)
    state = {}
    for name, weight in phi3.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip(("q", "k", "v"), weight.split([64, 32, 32]), strict=True):
                state[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), weight.chunk(2), strict=True):
                state[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            state[name] = weight
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "name", ["dora", *(pytest.param(n, marks=pytest.mark.full) for n in ("lora", "patterns", "embedding"))]
)
def test_a_split_adapter_is_right_on_the_base_with_llamas_names(name: str, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, **CASES[name])
    export(adapter, tmp_path / "split", "split")
    split = plain_peft(as_llama(base), tmp_path / "split")
    assert off(live(base, adapter), logits(split)) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["rslora", "embedding", *(pytest.param(n, marks=pytest.mark.full) for n in ("lora", "patterns", "some_layers"))],
)
def test_a_gguf_adapter_says_the_same_update(name: str, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter(tmp_path / "adapter", base, **CASES[name])
    done = export(adapter, tmp_path / "gguf", "gguf")
    assert done.drift.error < 1e-5
    back = read_gguf_adapter(tmp_path / "gguf" / "adapter.gguf")
    ours = open_adapter(adapter).contents.updates
    assert set(ours) == set(back.updates)
    for module, update in ours.items():
        assert torch.allclose(update.delta(), back.updates[module].delta(), atol=1e-6), module
    lines = (tmp_path / "gguf" / "Modelfile").read_text().splitlines()
    assert "ADAPTER ./adapter.gguf" in lines
    assert lines.index("FROM ./base.gguf") < lines.index("ADAPTER ./adapter.gguf")


def test_the_modelfile_holds_the_context_of_the_short_factors(tmp_path: Path) -> None:
    base = small_base(tmp_path / "base", rope_parameters=LONGROPE)
    adapter = small_adapter(tmp_path / "adapter", base, facts={"longrope": "short"})
    export(adapter, tmp_path / "gguf", "gguf")
    assert "\nPARAMETER num_ctx 4096\n" in (tmp_path / "gguf" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("name", "said"), [("dora", "of DoRA"), ("whole_head", "trained in full"), ("tokens", "has new tokens")]
)
def test_what_llama_cpp_can_not_say_is_refused_with_the_way_that_works(
    name: str, said: str, base: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = CASES.get(name, {"new_tokens": ("<|a|>",)})
    adapter = small_adapter(tmp_path / "adapter", base, **more)
    with pytest.raises(AdapterError, match=said) as refused:
        export(adapter, tmp_path / "out", "gguf")
    assert "--as gguf-merged" in refused.value.problems[0].fix
    assert not (tmp_path / "out").exists()


def test_adapters_are_combined_by_pefts_methods(base: Path, lora: Path, tmp_path: Path) -> None:
    other = small_adapter(tmp_path / "other", base, seed=2, r=3)
    done = export(lora, tmp_path / "both", "combine", others=[other], weights=[0.7, 0.3])
    assert "cat of 0.7 of lora, 0.3 of other; rank 7" in done.what
    assert done.drift.error < 1e-5
    first, second = (open_adapter(folder).contents.updates for folder in (lora, other))
    for name, update in open_adapter(tmp_path / "both").contents.updates.items():
        wanted = 0.7 * first[name].delta() + 0.3 * second[name].delta()
        assert torch.allclose(update.delta(), wanted, atol=1e-5), name
    with pytest.raises(AdapterError, match="PEFT does not combine them by linear"):
        export(lora, tmp_path / "out", "combine", others=[other], method="linear")
    dora = small_adapter(tmp_path / "dora", base, dora=True)
    with pytest.raises(AdapterError, match="holds more than A and B") as refused:
        export(lora, tmp_path / "out", "combine", others=[dora], weights=[1.0], method="mean")
    assert {p.where for p in refused.value.problems} == {"--weights", "--method", str(dora)}
