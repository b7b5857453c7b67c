"""Tokens that are taught: only their rows train, and plain PEFT finds them again on the plain base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi3_dist.adapters.files import read_adapter, save_adapter
from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.config.families import Shape
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig, LoraConfig, RunConfig
from phi3_dist.data.batches import prepare
from phi3_dist.errors import ConfigError, DataError, ModelError
from phi3_dist.modeling.base import Base, find_base, load_full, tiny_config
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.modeling.tokens import new_token_ids, token_rows
from phi3_dist.planning.memory import adapter_parameters
from phi3_dist.training.build import _adapter_values
from tests.unit.test_relatives import learn

TOKENS = ("<|tool|>", "<|call|>")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    config = tiny_config()
    config.tie_word_embeddings = request.param
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return find_base(str(tmp_path / "base"))


def plain(base: Base) -> Any:
    return load_full(find_base(base.source), torch.float32, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_only_the_new_rows_train_and_the_adapter_loads_on_the_plain_base(base: Base, tmp_path: Path) -> None:
    from peft import PeftModel

    tokenizer = load_tokenizer(base.source, new_tokens=TOKENS)
    ids = new_token_ids(tokenizer, TOKENS, base)
    assert ids == [270, 271]
    rows = token_rows(base, ids)
    tied = base.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    model = add_lora(plain(base), LoraConfig(r=2, dropout=0.0), base.source, ids)
    fill_adapter(model, 0, None, rows)
    table = plain(base).model.embed_tokens.weight
    torch.testing.assert_close(model.get_input_embeddings().weight[ids], table[:270].mean(0).expand(2, -1))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == adapter_parameters(Shape.of(base.config.to_dict()), 2, new_tokens=2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<|tool|>add 1 2<|call|>"}], tokenize=False)
    ids_1T = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert {270, 271} <= set(ids_1T[0].tolist())
    for _ in range(3):
        loss = model.train()(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss
        loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("embed_tokens" in name for name in moved)
    learn(model)
    live = model.eval()(input_ids=ids_1T, use_cache=False).logits
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    tensors, config = read_adapter(tmp_path / "adapter")
    assert set(rows) <= set(tensors)
    assert set(tensors) == set(gather_adapter(model))
    assert config["trainable_token_indices"]["embed_tokens"] == ids
    again = PeftModel.from_pretrained(plain(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(input_ids=ids_1T, use_cache=False).logits, live, atol=1e-5, rtol=1e-4)
    saved_tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    assert list(saved_tokenizer(text, add_special_tokens=False)["input_ids"]) == ids_1T[0].tolist()


def test_rows_may_hold_the_taught_tokens_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<|call|>f"}]}
    file.write_text(json.dumps(row) + "\n")
    cfg = DataConfig(train=str(file), validation_share=0.0)
    with pytest.raises(DataError, match="control token"):
        prepare(DataConfig(train=str(_with(tmp_path, "<|user|>"))), load_tokenizer("tiny-random"), None)
    taught = load_tokenizer("tiny-random", new_tokens=["<|call|>"])
    assert 270 in prepare(cfg, taught, tmp_path / "cache").train.rows.ids
    taught.save_pretrained(tmp_path / "saved")
    assert 270 in prepare(cfg, load_tokenizer(str(tmp_path / "saved")), None).train.rows.ids


def _with(folder: Path, token: str) -> Path:
    file = folder / "control.jsonl"
    turns = [{"role": "user", "content": f"say {token}"}, {"role": "assistant", "content": "no"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    return file


def test_a_token_that_the_tokenizer_has_keeps_its_id() -> None:
    tokenizer = load_tokenizer("tiny-random", new_tokens=["<|placeholder1|>", "<|call|>"])
    assert new_token_ids(tokenizer, ["<|placeholder1|>", "<|call|>"], find_base("tiny-random")) == [261, 270]


def test_more_tokens_than_the_base_has_rows_for_are_refused_with_both_numbers() -> None:
    many = [f"<|t{i}|>" for i in range(60)]
    with pytest.raises(ModelError, match=r"60 tokens, and the base's table of 320 rows has room for 50"):
        new_token_ids(load_tokenizer("tiny-random", new_tokens=many), many, find_base("tiny-random"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.new_tokens=[a, a]", "names a token twice"),
        ("model.new_tokens=[' a']", "begins or ends with white space"),
        ("lora.modules_to_save=[lm_head]", "adapts lm_head as a whole"),
        ("lora.targets=[o_proj, embed_tokens]", "adapts embed_tokens as a whole"),
    ],
)
def test_new_tokens_that_cannot_be(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {source: x, new_tokens: [<a>]}\ndata: {train: x}\n")
    with pytest.raises(ConfigError, match=said):
        load_run(path, [override])


def test_training_on_from_an_adapter_that_taught_other_tokens_is_refused(tmp_path: Path) -> None:
    base = find_base("tiny-random")
    model = add_lora(plain(base), LoraConfig(r=2), "tiny-random", [270])
    fill_adapter(model, 0, None, token_rows(base, [270]))
    save_adapter(model, tmp_path / "adapter")
    model_section = {"source": "tiny-random", "adapter": str(tmp_path / "adapter")}
    cfg = RunConfig.model_validate({"model": model_section, "data": {"train": "x"}, "lora": {"r": 2}})
    fill_adapter(model, 0, _adapter_values(cfg, [270]))
    for ids in ([], [271], [270, 271]):
        with pytest.raises(ModelError, match=r"the adapter in .* has taught \[270\]"):
            _adapter_values(cfg, ids)
