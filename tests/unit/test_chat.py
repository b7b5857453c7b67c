"""Ids are those a server makes of the same conversation; the mask covers answers and what ends them, no more."""

from __future__ import annotations

from typing import Literal

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from phi3_dist.data.read.row_formats import BadRow, Chat
from phi3_dist.data.read.turns import Message
from phi3_dist.data.render.encode import Encoded, encode_blocks, encode_chats, encode_rows
from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.errors import DataError
from phi3_dist.modeling.tokenizer import tiny_tokenizer

PHI3 = tiny_tokenizer()
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Phi-3-medium's form: the answer's header belongs to the user's turn, and system messages vanish
MEDIUM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chatml(merge_newlines: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and ChatML's two control tokens, without Phi-3's rstrip; on demand two newlines become one token."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ")] if merge_newlines else []
    vocab |= {a + b: len(vocab) for a, b in merges}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def chat(*contents: str, system: str = "", weights: tuple[int, ...] = (), place: str = "a.jsonl:1") -> Chat:
    messages = [Message("system", system)] if system else []
    for i, content in enumerate(contents):
        weight = weights[i // 2] if i % 2 and weights else 1
        messages.append(Message(("user", "assistant")[i % 2], content, weight))
    return Chat(tuple(messages), place)


def learned(tokenizer: PreTrainedTokenizerFast, row: Encoded) -> str:
    """The text of supervised tokens, with | where something unsupervised stands between."""
    text, open_ = "", False
    for token, supervised in zip(row.ids, row.supervised, strict=True):
        if supervised:
            text += ("" if open_ or not text else "|") + tokenizer.decode([token], skip_special_tokens=False)
        open_ = supervised
    return text


def test_format_of_phi3() -> None:
    fmt = ChatFormat.of(PHI3)
    names = PHI3.convert_ids_to_tokens([fmt.end_of_turn, fmt.final_end, *fmt.generation_prompt])
    assert names == ["<|end|>", "<|endoftext|>", "<|assistant|>"]
    assert (fmt.added_turns, fmt.added_turns_with_system, fmt.system, fmt.notices) == (0, 1, "kept", ())


def test_format_of_chatml() -> None:
    tokenizer = chatml()
    fmt = ChatFormat.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(fmt.end_of_turn) == "<|im_end|>"
    assert fmt.final_end is None
    assert tokenizer.decode(list(fmt.generation_prompt)) == "\n<|im_start|>assistant\n"
    assert (fmt.added_turns, fmt.added_turns_with_system, fmt.system) == (1, 1, "kept")
    assert "default system message" in fmt.notices[0]


@pytest.mark.parametrize(
    ("row", "supervise", "phi3", "plain"),
    [
        (chat("Q", "A one"), "all", "A one<|end|><|endoftext|>", "A one<E>"),
        (chat("Q", "A", "R", "B"), "all", "A<|end|>|B<|end|><|endoftext|>", "A<E>|B<E>"),
        (chat("Q", "A", "R", "B"), "last", "B<|end|><|endoftext|>", "B<E>"),
        (chat("Q", "A", "R", "B", system="S"), "all", "A<|end|>|B<|end|><|endoftext|>", "A<E>|B<E>"),
        (chat("Q", "A", "R", "B", weights=(0, 1)), "all", "B<|end|><|endoftext|>", "B<E>"),
        (chat("Q", "A", "R", "B", weights=(1, 0)), "all", "A<|end|>", "A<E>"),
        (chat("Q", "A", "R"), "all", "A<|end|>", "A<E>"),
        (chat("Q", "A", "R"), "last", "A<|end|>", "A<E>"),
        (chat("A", "A", "A", "A"), "last", "A<|end|><|endoftext|>", "A<E>"),
        (chat("Q", "A\n\nB \n"), "all", "A\n\nB \n<|end|><|endoftext|>", "A\n\nB \n<E>"),
    ],
)
def test_what_is_learned(row: Chat, supervise: str, phi3: str, plain: str) -> None:
    for tokenizer, expected in ((PHI3, phi3), (chatml(), plain.replace("<E>", "<|im_end|>"))):
        (encoded,) = encode_chats(tokenizer, [row], supervise)  # type: ignore[arg-type]
        assert learned(tokenizer, encoded) == expected


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(str.strip)


@given(
    st.lists(CONTENT, min_size=2, max_size=5), st.sampled_from(["", "Be brief"]), st.sampled_from(["phi3", "chatml"])
)
@settings(max_examples=60, deadline=None)
def test_ids_are_a_servers_and_prompts_end_where_answers_begin(contents: list[str], system: str, form: str) -> None:
    tokenizer = PHI3 if form == "phi3" else chatml()
    row = chat(*contents, system=system)
    turns = [{"role": m.role, "content": m.content} for m in row.messages]

    def served(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    (encoded,) = encode_chats(tokenizer, [row], "all")
    assert encoded.ids == served(turns, prompt=False)
    starts = [0, *(i for i in range(1, len(encoded.ids)) if encoded.supervised[i] and not encoded.supervised[i - 1])]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert len(starts) - 1 == len(answers)
    for start, i in zip(starts[1:], answers, strict=True):
        assert encoded.ids[:start] == served(turns[:i], prompt=True)


def test_many_rows_keep_their_order() -> None:
    rows = encode_chats(PHI3, [chat(f"Q{i}", f"A{i}") for i in range(30)], "all")
    assert [learned(PHI3, row) for row in rows] == [f"A{i}<|end|><|endoftext|>" for i in range(30)]
    assert encode_chats(PHI3, [], "all") == []


@pytest.mark.parametrize("form", ["phi3", "chatml", "medium"])
@pytest.mark.parametrize("supervise", ["all", "last"])
def test_rows_in_blocks_are_the_rows_one_by_one(form: str, supervise: Literal["all", "last"]) -> None:
    tokenizer = {"phi3": PHI3, "chatml": chatml(merge_newlines=True), "medium": with_template(MEDIUM)}[form]
    fmt = ChatFormat.of(tokenizer)
    chats = [
        chat(
            *("xyz"[: 1 + i % 3] * (1 + i % 4) for _ in range(2 + i % 5)),
            system="S" * (i % 2),
            weights=(1, i % 3 % 2, 1),
        )
        for i in range(40)
    ]
    chats[7:7] = [chat("<|end|>", "<|im_end|>"), chat("Q", "\nA", "R", "\nB")]
    blocks = list(encode_blocks(fmt, tokenizer, chats, supervise, 9))
    assert [len(chunk) for chunk, _ in blocks] == [9, 9, 9, 9, 6]
    found: list[Encoded | BadRow] = []
    for chunk, block in blocks:
        for i, one in enumerate(chunk):
            span = slice(*block.offsets[i : i + 2])
            good = Encoded(block.ids[span].tolist(), block.supervised[span].tolist())
            found.append(BadRow(one.place, block.reasons[i]) if block.reasons[i] else good)
    alone = [encode_rows(fmt, tokenizer, [one], supervise)[0] for one in chats]
    assert found == alone
    assert isinstance(alone[7], BadRow)
    assert isinstance(alone[8], BadRow) == (form == "chatml")


def test_rows_that_cannot_be_masked_are_all_named() -> None:
    rows = [
        chat("Q", "A", place="a:1"),
        chat("say <|end|>", "A", place="a:2"),
        chat("Q", "</s>", place="a:3"),
        chat("Q", "A", "R", "B", weights=(1, 0), place="a:4"),
    ]
    with pytest.raises(DataError) as caught:
        encode_chats(PHI3, rows, "last")
    problems = caught.value.problems
    assert [p.where for p in problems[:-1]] == ["a:2", "a:3", "a:4"]
    assert "messages[0]: content holds '<|end|>'" in problems[0].what
    assert "'</s>'" in problems[1].what
    assert "supervises nothing" in problems[2].what


def test_white_space_that_merges_with_the_header_is_named() -> None:
    tokenizer = chatml(merge_newlines=True)
    assert len(encode_chats(tokenizer, [chat("Q", "A\n\nB")], "all")) == 1
    with pytest.raises(DataError, match="assistant turn 2 begins with white space"):
        encode_chats(tokenizer, [chat("Q", "A", "R", "\nB")], "all")


def test_a_template_that_drops_system_messages_says_so() -> None:
    tokenizer = with_template(MEDIUM)
    fmt = ChatFormat.of(tokenizer)
    assert fmt.system == "dropped"
    assert fmt.notices == ("the chat template drops system messages: the model never sees them",)
    for row in (chat("Q", "A", "R", "B"), chat("Q", "A", "R", "B", system="S")):
        assert learned(tokenizer, encode_chats(tokenizer, [row], "all")[0]) == "A<|end|>|B<|end|>"


def test_refusals_name_what_is_wrong() -> None:
    two_answers = Chat((Message("user", "Q"), Message("assistant", "A"), Message("assistant", "B")), "a:1")
    with pytest.raises(DataError, match="assistant turn 2 follows assistant, and the chat template begins it only"):
        encode_chats(with_template(MEDIUM), [two_answers], "all")
    asks = "{% for m in messages %}{% if m['content'] %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
    empty = Chat((Message("system", ""), *two_answers.messages[:2]), "a:1")
    with pytest.raises(DataError, match="makes 2 turns of it where 3 are due: it leaves out the empty system message"):
        encode_chats(with_template(asks), [empty], "all")


def test_a_template_that_refuses_system_messages() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = with_template(refusing + PHI3.chat_template)
    assert "refuses system messages" in ChatFormat.of(tokenizer).notices[0]
    with pytest.raises(DataError, match=r"a\.jsonl:1: has a system message"):
        encode_chats(tokenizer, [chat("Q", "A", system="S")], "all")


TURN = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|system|>{% endif %}",
            "beginning",
        ),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no control token"),
        (
            "{% for m in messages %}{% if not (m['role'] == 'assistant' and not loop.last) %}"
            + TURN
            + "{% endif %}{% endfor %}"
            + PROMPT,
            "turns",
        ),
        (
            "{% for m in messages %}"
            + TURN
            + "{% endfor %}{% if not add_generation_prompt %}<|end|>{% endif %}"
            + PROMPT,
            "exactly",
        ),
        ("{{ raise_exception('never') }}", "stops with never"),
        (
            "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "begins an assistant's turn",
        ),
    ],
)
def test_templates_that_cannot_be_masked_safely(template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"chat template: can't be used.*{reason}"):
        encode_chats(with_template(template), [chat("Q", "A")], "all")


def tool_row() -> Chat:
    turns = (("user", "2+3?"), ("assistant", "add(2,3)"), ("tool", "5"), ("tool", "really 5"), ("assistant", "It is 5"))
    return Chat(tuple(Message(role, content) for role, content in turns), "a.jsonl:1")


def test_a_tools_words_are_rendered_and_never_learned() -> None:
    tokenizer = chatml()
    (row,) = encode_chats(tokenizer, [tool_row()], "all")
    assert learned(tokenizer, row) == "add(2,3)<|im_end|>|It is 5<|im_end|>"
    messages = [{"role": m.role, "content": m.content} for m in tool_row().messages]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    assert "really 5" in text
    assert row.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


REFUSES_TOOLS = "{% for m in messages if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"


@pytest.mark.parametrize(
    ("before", "reason"),
    [("", "the chat template drops: the model would never see it"), (REFUSES_TOOLS, "the chat template refuses")],
)
def test_a_tool_message_that_a_template_does_not_render_is_refused(before: str, reason: str) -> None:
    tokenizer = with_template(before + PHI3.chat_template)
    with pytest.raises(DataError, match=rf"messages\[2\]: role tool, which {reason}"):
        encode_chats(tokenizer, [tool_row()], "all")
