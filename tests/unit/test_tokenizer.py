"""The tokenizer gives the ids of its published file, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import tokenizers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer

from phi3_dist.errors import ModelError
from phi3_dist.modeling.tokenizer import load_tokenizer, tiny_tokenizer, tokenizer_hash

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🙂\n"},
    {"role": "assistant", "content": "Sure thing"},
]


def phi3_like(folder: Path) -> Path:
    """Files in the published form: a normalizer, role tokens with rstrip, and the class name that misleads."""
    words = ["▁Sure", "Sure", "▁thing", "▁", *"Surething▁Hilo"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    vocab |= {"<unk>": 256}
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = []
    for word in ("▁Sure", "▁thing"):
        for i in range(2, len(word) + 1):
            vocab.setdefault(word[:i], len(vocab))
            merges.append((word[: i - 1], word[i - 1]))
    for i in range(2, 5):
        vocab.setdefault("Sure"[:i], len(vocab))
        merges.append(("Sure"[: i - 1], "Sure"[i - 1]))
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    for content, rstrip in (
        ("<unk>", False),
        ("<s>", False),
        ("<|endoftext|>", False),
        ("<|assistant|>", True),
        ("<|end|>", True),
        ("<|user|>", True),
    ):
        backend.add_special_tokens([tokenizers.AddedToken(content, rstrip=rstrip, normalized=False, special=True)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": tiny_tokenizer().chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def message(source: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(source))
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_files_are_honoured_where_autotokenizer_is_not(tmp_path: Path) -> None:
    folder = phi3_like(tmp_path / "phi3")
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    text = tokenizer.apply_chat_template(TURNS[1:], tokenize=False)
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    sure = expected[expected.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1]
    assert tokenizer.convert_ids_to_tokens(sure) == "▁Sure"
    auto = AutoTokenizer.from_pretrained(str(folder))
    assert auto(text, add_special_tokens=False)["input_ids"] != expected  # why this project doesn't use it


def test_roles_are_the_files(tmp_path: Path) -> None:
    folder = phi3_like(tmp_path / "phi3")
    edit_config(folder, pad_token={"content": "<unk>"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<s>"}), encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<unk>", "<|endoftext|>", "<s>")


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = phi3_like(tmp_path / "phi3")
    token = {"content": "thing", "special": False, "normalized": False, "rstrip": False}
    edit_config(folder, added_tokens_decoder={"400": {**token, "lstrip": False, "single_word": False}})
    assert "other ids than its tokenizer.json" in message(folder)


@pytest.mark.parametrize("longest", [[], "4096", True, -1, {}, 0])
def test_a_longest_length_that_is_not_a_number_is_refused(tmp_path: Path, longest: object) -> None:
    folder = phi3_like(tmp_path / "phi3")
    edit_config(folder, model_max_length=longest)
    assert f"model_max_length is {json.dumps(longest)}; expected a number above 0" in message(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = phi3_like(tmp_path / "phi3")
    assert "did you mean" in message(tmp_path / "phi33")
    assert "is a file" in message(folder / "tokenizer.json")
    edit_config(folder, chat_template=None)
    assert "no chat template" in message(folder)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert "tokenizer_config.json is broken" in message(folder)
    (folder / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    assert "tokenizer.json is broken" in message(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in message(folder)


def test_hub_out_of_reach_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = message("nobody/no-such-model")
    assert "HF_HUB_OFFLINE" in text
    assert "HF_ENDPOINT" in text
    assert "not a hub id" in message("no such folder!")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GatedRepoError, "gated"),
        (RepositoryNotFoundError, "no such model on the hub"),
        (RevisionNotFoundError, "has no revision 'v9'"),
        (HfHubHTTPError, "holds it back"),
    ],
)
def test_what_the_hub_says_is_one_message(
    monkeypatch: pytest.MonkeyPatch, error: type[HfHubHTTPError], expected: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise error.__new__(error, "no")  # its constructor wants a response of whichever HTTP library the hub uses

    monkeypatch.setattr("phi3_dist.modeling.tokenizer.snapshot_download", refuse)
    with pytest.raises(ModelError, match=expected) as caught:
        load_tokenizer("owner/name", "v9")
    assert caught.value.problems[0].fix


def test_tiny_tokenizer_is_phi3s_form() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 270
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert (
        text
        == "<|system|>\nBe brief.<|end|>\n<|user|>\nGrüße 🙂\n<|end|>\n<|assistant|>\nSure thing<|end|>\n<|endoftext|>"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # the newline after a role token vanishes, the one at the end of the content stays
    assert tokenizer.decode(ids) == text.replace(">\n", ">")
    assert max(ids) < 320
    assert (
        tokenizer_hash(tokenizer) == "739aa7ea33d92e931f5715ab148cdca5f8b8c604c528514fe5cbabab898e4980"
    )  # the same on every machine


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny-random")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves settings in the backend
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert tokenizer_hash(again) == before
    again.chat_template += " "
    assert tokenizer_hash(again) != before
