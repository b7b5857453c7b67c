"""Greedy answers: a batch gives what one by one gives, and ends where the template says. Scores over them."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from phi3_dist.config.schema import DataConfig, LoraConfig
from phi3_dist.data.blocks import read_chats
from phi3_dist.data.prepare import prepare
from phi3_dist.demo.chats import make_rows, write_rows
from phi3_dist.demo.score import Score, exact_match, perplexity, samples, score, side_by_side
from phi3_dist.modeling.attention.backend import use_backend
from phi3_dist.modeling.base import find_base, load_full
from phi3_dist.modeling.greedy_answers import answer
from phi3_dist.modeling.lora import add_lora
from phi3_dist.modeling.loss import PackedLoss
from phi3_dist.modeling.stop_ids import stop_ids
from phi3_dist.modeling.tokenizer import tiny_tokenizer
from phi3_dist.training.train_step import to_device

TOKENIZER = tiny_tokenizer()
PROMPTS = [
    [{"role": "user", "content": content}]
    for content in ("Hi.", "A rather longer question than the others, is it not?", "Two lattes to go", "x")
]


def _tiny() -> Any:
    """A random model that says something: seeded, and with weights large enough for its answers to vary."""
    model = load_full(find_base("tiny-random"), torch.float32, torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return model


@torch.no_grad()
def _one_by_one(model: Any, prompt: list[dict[str, str]], stops: list[int], count: int) -> list[int]:
    """The same greedy answer without batch, padding, cache or `generate`."""
    text = TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < count:
        token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


def _text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_answers_as_one_by_one(batch_size: int) -> None:
    model = _tiny()
    stops = stop_ids(model, TOKENIZER)
    expected = [_text(_one_by_one(model, prompt, stops, 12)) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert answer(model, TOKENIZER, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_a_peft_model_answers_with_its_adapter() -> None:
    model = add_lora(_tiny(), LoraConfig(dropout=0.5), "tiny-random")
    plain = answer(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.2)
    model.train()
    adapted = answer(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    assert isinstance(model, PeftModel)
    assert model.training
    assert adapted != plain
    with model.disable_adapter():
        assert answer(model, TOKENIZER, PROMPTS, max_new_tokens=12) == plain


def test_an_answer_ends_at_the_models_own_stop_ids() -> None:
    model = _tiny()
    ids = _one_by_one(model, PROMPTS[0], stop_ids(model, TOKENIZER), 12)
    assert len(ids) == 12
    stop = next(token for token in ids[4:] if token not in ids[:4])
    model.generation_config.eos_token_id = [stop]
    assert stop in stop_ids(model, TOKENIZER)
    assert answer(model, TOKENIZER, PROMPTS[:1], max_new_tokens=12) == [_text(ids[: ids.index(stop)])]


def test_stop_ids_hold_the_templates_end_of_turn_and_end() -> None:
    tokens = TOKENIZER.convert_ids_to_tokens(stop_ids(_tiny(), TOKENIZER))
    assert {"<|end|>", "<|endoftext|>"} <= set(tokens)


def test_nothing_to_answer_is_refused() -> None:
    model = _tiny()
    assert answer(model, TOKENIZER, []) == []
    with pytest.raises(ValueError, match="conversation 1"):
        answer(
            model, TOKENIZER, [PROMPTS[0], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
        )
    with pytest.raises(ValueError, match="batch_size"):
        answer(model, TOKENIZER, PROMPTS, batch_size=0)


def test_perplexity_is_that_of_the_packed_loss(tmp_path: Path) -> None:
    """The second opinion on the trainer's held-out loss agrees with it."""
    path = write_rows(tmp_path / "rows.jsonl", make_rows(12, "score"))
    cfg = DataConfig(train=str(path), validation_share=0, pack_length=512)
    plain = perplexity(_tiny(), TOKENIZER, read_chats(cfg).train)
    packed_model = _tiny()
    use_backend(packed_model, "sdpa")
    packs = prepare(cfg, TOKENIZER, None).train
    nll_sum = 0.0
    for which in range(len(packs)):
        with torch.no_grad():
            nll_sum += float(PackedLoss(packed_model)(**to_device(packs, [which], torch.device("cpu"))))
    assert math.log(plain) == pytest.approx(nll_sum / int(packs.targets.sum()), rel=1e-5)


def test_a_score_counts_exact_answers_alone(tmp_path: Path) -> None:
    assert exact_match(["a", " b\n", "c "], ["a", "b", "d"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no answers"):
        exact_match([], [])
    path = write_rows(tmp_path / "rows.jsonl", make_rows(4, "score"))
    chats = read_chats(DataConfig(train=str(path), validation_share=0)).train
    before = score(_tiny(), TOKENIZER, chats, max_new_tokens=4)
    assert before.exact_match == 0
    assert len(before.answers) == 4
    after = Score(1.25, 1.0, tuple(chat.messages[-1].content for chat in chats))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(side_by_side(before, after))
    console.print(samples(chats, {"before": before, "after": after}, 2))
    console.file.close()
    text = console.export_text()
    assert "exact match" in text
    assert "1.25" in text
    assert "100%" in text
    assert text.count(after.answers[0]) == 2  # the answer after, and the wanted one
    assert after.answers[2] not in text
