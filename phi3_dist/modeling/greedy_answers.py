"""Greedy answers to conversations, many at a time.

Shapes: B conversations of a batch, T tokens of the longest prompt, N new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from phi3_dist.modeling.stop_ids import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["answer"]

Prompt = Sequence[Mapping[str, str]]
"""Messages of role and content; the last one is the user's."""


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[str]:
    """The greedy answer to each conversation, in order, without control tokens and white space around it.

    `model` is a Phi3ForCausalLM or a PeftModel around one, with a plain attention backend (the packed ones have no
    cache). Prompts are padded on the left and masked, so that a batch gives what one by one would. An answer ends at
    a stop id or after `max_new_tokens` tokens. The model's training mode is as before afterwards. Raises ValueError
    for counts below 1 and for a conversation that does not end with the user.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
    for i, chat in enumerate(chats):
        if not chat or chat[-1]["role"] != "user":
            raise ValueError(f"conversation {i} does not end with a user message: there is nothing to answer")
    if not chats:
        return []
    stops = stop_ids(model, tokenizer)
    prompts = _prompt_ids(tokenizer, chats)
    # neighbours of one length need the least padding; the order is undone below
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        new_BN = _greedy(model, [prompts[i] for i in batch], stops, max_new_tokens)
        for i, ids_N in zip(batch, new_BN, strict=True):
            answers[i] = tokenizer.decode(_until_stop(ids_N, stops), skip_special_tokens=True).strip()
    model.train(was_training)
    return answers


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Prompt]) -> list[list[int]]:
    texts = [
        str(tokenizer.apply_chat_template([dict(m) for m in chat], tokenize=False, add_generation_prompt=True))
        for chat in chats
    ]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _greedy(model: Any, prompts: list[list[int]], stops: list[int], max_new_tokens: int) -> list[list[int]]:
    """The new tokens of each prompt; after its stop id a row goes on with `stops[0]` until all rows have one."""
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    fill = stops[0]  # masked away on the left, cut off on the right: any id will do
    ids_BT = torch.tensor([[fill] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=fill, use_cache=True
    )
    out = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
    rows: list[list[int]] = out[:, longest:].tolist()
    return rows


def _until_stop(ids_N: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids_N) if token in stops), len(ids_N))
    return ids_N[:end]
