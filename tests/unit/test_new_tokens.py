"""Tokens that are taught: only their rows train, and plain PEFT finds them again on the plain base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi3_dist.adapters.files import save_adapter
from phi3_dist.adapters.gather import gather_adapter
from phi3_dist.adapters.loading import load_adapter, rows_fact
from phi3_dist.adapters.reading import read_adapter, read_metadata
from phi3_dist.config.load import load_run
from phi3_dist.config.schema import DataConfig, LoraConfig, RunConfig
from phi3_dist.data.prepare import prepare
from phi3_dist.errors import AdapterError, ConfigError, DataError, ModelError
from phi3_dist.family.variants import Shape
from phi3_dist.modeling.base import Base, find_base, load_full, load_quantized, tiny_config
from phi3_dist.modeling.lora import add_lora, fill_adapter
from phi3_dist.modeling.new_tokens import enlarged, new_token_ids, token_rows
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer
from phi3_dist.planning.memory import GIB, Workload, adapter_parameters, memory_terms
from phi3_dist.planning.preview import shape_of_source
from phi3_dist.training.build import adapter_values
from phi3_dist.training.checkpoints.compatibility import base_fingerprint
from tests.unit.test_relatives import learn, reloaded

TOKENS = ("<|tool|>", "<|call|>")


@pytest.fixture(params=[(False, 320), (True, 320), (False, 271), (True, 270)], ids=str)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    """Untied and tied, with rows to spare, with one, and with none: the tokenizer has 270 tokens."""
    config = tiny_config()
    config.tie_word_embeddings, config.vocab_size = request.param
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return find_base(str(tmp_path / "base"))


def plain(base: Base) -> Any:
    return load_full(base, torch.float32, torch.device("cpu"))


def test_only_the_new_rows_train_and_the_adapter_loads_on_the_plain_base(base: Base, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base.source, new_tokens=TOKENS)
    ids = new_token_ids(tokenizer, TOKENS, base)
    assert ids == [270, 271]
    files = {path.name: path.read_bytes() for path in Path(base.source).iterdir()}
    large = enlarged(base, ids)
    rows = token_rows(large, ids)
    tied = base.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)
    model = add_lora(plain(large), LoraConfig(r=2, dropout=0.0), base.source, ids)
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
    learn(model, ids_1T)
    live = model.eval()(input_ids=ids_1T, use_cache=False).logits
    assert (live - plain(large)(input_ids=ids_1T, use_cache=False).logits).abs().max() > 1e-2
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer, metadata=rows_fact(large))
    tensors, config = read_adapter(tmp_path / "adapter")
    assert set(rows) <= set(tensors)
    assert set(tensors) == set(gather_adapter(model))
    assert config["trainable_token_indices"]["embed_tokens"] == ids
    for again in (by_plain_peft(base, tmp_path / "adapter"), load_adapter(plain(base), tmp_path / "adapter")):
        torch.testing.assert_close(again.eval()(input_ids=ids_1T, use_cache=False).logits, live, atol=1e-5, rtol=1e-4)
    saved_tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    assert list(saved_tokenizer(text, add_special_tokens=False)["input_ids"]) == ids_1T[0].tolist()
    assert {path.name: path.read_bytes() for path in Path(base.source).iterdir()} == files


def by_plain_peft(base: Base, folder: Path) -> Any:
    """As the card says, on a base that transformers loads."""
    model = Phi3ForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    rows = read_metadata(folder).get("base_rows")
    assert (rows is None) == (base.config.vocab_size == 320)
    if rows is not None:
        assert rows == "272"
        model.resize_token_embeddings(int(rows), mean_resizing=False)
    return reloaded(folder, model)


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


def test_a_base_gets_exactly_the_rows_it_lacks(base: Base) -> None:
    assert enlarged(base, []) is base
    assert enlarged(base, [base.config.vocab_size - 1]) is base
    large = enlarged(base, [base.config.vocab_size + 2])
    names = ["model.embed_tokens.weight"] + ([] if base.config.tie_word_embeddings else ["lm_head.weight"])
    for name in names:
        old = base.weights.whole(name)
        want = torch.cat((old, old.mean(0).expand(3, -1)))
        torch.testing.assert_close(large.weights.whole(name), want)
        assert large.weights.shape(name) == want.shape == (base.config.vocab_size + 3, 64)
        for rows in range(len(want)):
            cut = large.weights.rows(name, max(rows - 2, 0), rows)
            torch.testing.assert_close(cut, want[max(rows - 2, 0) : rows])
        torch.testing.assert_close(large.weights.rows(name, 0, len(want)), want)
    other = "model.norm.weight"
    assert torch.equal(large.weights.whole(other), base.weights.whole(other))
    assert large.weights.shape(other) == (64,)
    assert base_fingerprint(large, Path(base.source) / "cache") == base_fingerprint(base, Path(base.source) / "cache")


@pytest.mark.parametrize("tokens", [TOKENS, ("<|call|>", "<|placeholder1|>"), ("<|placeholder1|>",), ()])
def test_the_plan_before_a_run_counts_the_rows_that_the_base_lacks(base: Base, tokens: tuple[str, ...]) -> None:
    """Bytes of the frozen tables too, as the model has them."""
    section = {"source": base.source, "new_tokens": tokens}
    cfg = RunConfig.model_validate({"model": section, "data": {"train": "x"}})
    large = enlarged(base, new_token_ids(load_tokenizer(base.source, new_tokens=tokens), tokens, base))
    shape = shape_of_source(cfg)
    assert isinstance(shape, dict)
    terms = {term.name: term.gib for term in memory_terms(Shape.of(shape), 0, Workload("single", 1, "fp32"))}
    assert terms["base weights"] * GIB == 4 * sum(p.numel() for p in plain(large).parameters())


def test_a_plan_says_when_a_tokenizers_file_has_no_ids(base: Base) -> None:
    section = {"source": base.source, "new_tokens": TOKENS}
    for content, what in (('{"model": {"vocab": [["a", 1]]}}', "which token has which id"), ("{", "is not JSON")):
        (Path(base.source) / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match=what):
            shape_of_source(RunConfig.model_validate({"model": section, "data": {"train": "x"}}))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_gets_the_same_rows(kind: str, base: Base) -> None:
    pytest.importorskip("bitsandbytes")
    large = enlarged(base, [base.config.vocab_size])
    model = load_quantized(large, kind, torch.float32, torch.device("cpu"))
    full = load_full(large, torch.float32, torch.device("cpu"))
    for found, want in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        (full.get_input_embeddings(), full.get_output_embeddings()),
        strict=True,
    ):
        torch.testing.assert_close(found.weight.float(), want.weight)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == base.config.tie_word_embeddings
    assert model(input_ids=torch.tensor([[base.config.vocab_size]])).logits.shape[-1] == base.config.vocab_size + 1


def test_a_token_that_nobody_teaches_gets_no_row(base: Base) -> None:
    tokenizer = load_tokenizer("tiny-random", new_tokens=[f"<|t{i}|>" for i in range(50)])
    if base.config.vocab_size == 320:
        assert new_token_ids(tokenizer, ["<|t49|>"], base) == [319]
    else:
        with pytest.raises(ModelError, match=r"table has 27[01] rows, and the tokenizer has (48|49) more tokens, as "):
            new_token_ids(tokenizer, ["<|t49|>"], base)


def test_a_tokenizer_with_more_tokens_than_the_base_has_rows_is_refused(base: Base) -> None:
    rows = base.config.vocab_size
    fits = load_tokenizer("tiny-random", new_tokens=[f"<|t{i}|>" for i in range(rows - 270)])
    assert new_token_ids(fits, [], base) == []
    other = load_tokenizer("tiny-random", new_tokens=[f"<|t{i}|>" for i in range(rows - 268)])
    with pytest.raises(
        ModelError, match=rf"model.tokenizer: the base's table has {rows} rows, and the tokenizer has 2 "
    ):
        new_token_ids(other, [], base)


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
    cfg = going_on(tmp_path / "adapter")
    fill_adapter(model, 0, adapter_values(cfg, base, [270]))
    for ids in ([], [271], [270, 271]):
        with pytest.raises(ModelError, match=r"the adapter in .* has taught \[270\]"):
            adapter_values(cfg, base, ids)


def going_on(adapter: Path) -> RunConfig:
    section = {"source": "tiny-random", "adapter": str(adapter)}
    return RunConfig.model_validate({"model": section, "data": {"train": "x"}, "lora": {"r": 2}})


def test_training_on_needs_the_rows_that_the_adapter_says(tmp_path: Path) -> None:
    base = find_base("tiny-random")
    large = enlarged(base, [320])
    model = add_lora(plain(large), LoraConfig(r=2), "tiny-random", [320])
    fill_adapter(model, 0, None, token_rows(large, [320]))
    save_adapter(model, tmp_path / "adapter", metadata=rows_fact(large))
    fill_adapter(model, 0, adapter_values(going_on(tmp_path / "adapter"), large, [320]))
    with pytest.raises(ModelError, match=r"has 320 rows of embedding, and the adapter in .* up to row 321"):
        adapter_values(going_on(tmp_path / "adapter"), base, [320])
    save_adapter(model, tmp_path / "adapter", metadata={"base_rows": "many"})
    with pytest.raises(AdapterError, match="not a number of rows"):
        load_adapter(plain(base), tmp_path / "adapter")
