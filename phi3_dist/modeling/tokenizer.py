"""The tokenizer, exactly as its published file says.

`AutoTokenizer` in transformers 5 reads `tokenizer_class: LlamaTokenizer` from Phi-3's files, rebuilds the tokenizer
from that class and drops the file's normalizer: the first word after every role token then gets other ids than any
server produces. `PreTrainedTokenizerFast` keeps tokenizer.json as it is; `load_tokenizer` proves that on each load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tokenizers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedTokenizerFast

from phi3_dist.config.json_text import parse_json
from phi3_dist.errors import ModelError, Problem
from phi3_dist.family.variants import TINY_RANDOM

__all__ = ["load_tokenizer", "tiny_tokenizer", "tokenizer_hash"]

TAUGHT = "taught_tokens"
"""Key of tokenizer_config.json: tokens that were taught (`model.new_tokens`)."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

# Phi-3-mini's special tokens in the order of their ids, with (rstrip, special), and its template.
# Source: tokenizer_config.json of microsoft/Phi-3-mini-4k-instruct.
_PHI3_TOKENS: tuple[tuple[str, bool, bool], ...] = (
    ("<unk>", False, True),
    ("<s>", False, True),
    ("</s>", True, False),
    ("<|endoftext|>", False, True),
    ("<|assistant|>", True, True),
    ("<|placeholder1|>", True, True),
    ("<|placeholder2|>", True, True),
    ("<|placeholder3|>", True, True),
    ("<|placeholder4|>", True, True),
    ("<|system|>", True, True),
    ("<|end|>", True, True),
    ("<|placeholder5|>", True, True),
    ("<|placeholder6|>", True, True),
    ("<|user|>", True, True),
)
_PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def load_tokenizer(
    folder_or_id: str, revision: str | None = None, new_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder, a hub id, or `tiny-random`, with the ids of its own tokenizer.json.

    `new_tokens` become special tokens, after the ids that it has, where it lacks them. Rows may hold them as text.

    Hub files come through `huggingface_hub`, which honours HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN.
    Raises ModelError, with the fix, where the files are missing, gated or unreachable, where there is no
    tokenizer.json or no chat template, and where transformers and the `tokenizers` library give different ids.
    """
    if folder_or_id == TINY_RANDOM:
        return _teach(tiny_tokenizer(), new_tokens)
    folder = _folder_of(folder_or_id, revision)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            Problem(
                folder_or_id,
                "has no tokenizer.json",
                "name a folder or hub id that holds one, in model.source or model.tokenizer; a SentencePiece "
                "tokenizer.model alone is not supported",
            )
        )
    reference = _reference(file, folder_or_id)
    config = _config_of(folder, folder_or_id)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(Problem(folder_or_id, f"its tokenizer files can't be loaded: {error}")) from error
    _keep_the_files_roles(tokenizer, config)
    if not tokenizer.chat_template:
        raise ModelError(
            Problem(
                folder_or_id,
                "its tokenizer has no chat template",
                "use an instruct model's tokenizer (model.tokenizer), or add chat_template.jinja to the folder",
            )
        )
    _check(tokenizer, reference, folder_or_id)
    return _teach(tokenizer, new_tokens)


def _teach(tokenizer: PreTrainedTokenizerFast, new_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    known = tokenizer.get_vocab()
    fresh = [tokenizers.AddedToken(token, special=True, normalized=False) for token in new_tokens if token not in known]
    tokenizer.add_tokens(fresh, special_tokens=True)
    if new_tokens:
        # saved with it: whoever loads the adapter's tokenizer may write them in a text too
        tokenizer.init_kwargs[TAUGHT] = list(new_tokens)
    return tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, with Phi-3's special tokens and chat template; 270 ids.

    The same on every machine and made without any file: ids 0-255 are bytes, the rest are Phi-3's special tokens in
    their order, with their `rstrip`.
    """
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for content, rstrip, special in _PHI3_TOKENS:
        token = tokenizers.AddedToken(content, rstrip=rstrip, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = _PHI3_TEMPLATE
    return tokenizer


def tokenizer_hash(tok: PreTrainedTokenizerFast) -> str:
    """sha256 (hex) over all that decides ids: the backend's serialisation and the chat template."""
    backend = json.loads(tok.backend_tokenizer.to_str())
    # Calls leave their truncation and padding behind in the backend; they are no part of what the tokenizer is.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    taught = tok.init_kwargs.get(TAUGHT)
    text = json.dumps([backend, tok.chat_template, *([taught] if taught else [])], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _folder_of(source: str, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(Problem(source, "is a file, not a folder", f"name its folder: {path.parent}"))
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(Problem(source, "no such folder", _near(path)))
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        what = "this model is gated"
        fix = f"accept its terms on the hub's page of {source}, then `hf auth login` or set HF_TOKEN"
        raise ModelError(Problem(source, what, fix)) from error
    except RevisionNotFoundError as error:
        raise ModelError(Problem(source, f"has no revision {revision!r}", "check model.revision")) from error
    except RepositoryNotFoundError as error:
        fix = "check the spelling; a private model needs `hf auth login` or HF_TOKEN" + _near(path, "; ")
        raise ModelError(Problem(source, "no such model on the hub, and no such local folder", fix)) from error
    except HFValidationError as error:
        raise ModelError(Problem(source, "no such folder, and not a hub id (owner/name)", _near(path))) from error
    except (LocalEntryNotFoundError, OSError) as error:
        what = f"no such local folder, and the hub can't be reached or holds it back: {error}"
        fix = (
            "download it where there is a network (`hf download`) and name the folder, or set HF_ENDPOINT to a "
            "mirror; HF_HUB_OFFLINE=1 uses the local cache alone" + _near(path, "; ")
        )
        raise ModelError(Problem(source, what, fix)) from error


def _near(path: Path, before: str = "") -> str:
    names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=3)
    return before + "did you mean " + " or ".join(str(path.parent / name) for name in near) + "?" if near else ""


def _reference(file: Path, source: str) -> tokenizers.Tokenizer:
    try:
        reference = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower than Exception
        raise ModelError(
            Problem(source, f"its tokenizer.json is broken: {error}", "download the file again")
        ) from error
    reference.no_padding()
    reference.no_truncation()
    return reference


def _config_of(folder: Path, source: str) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(Problem(source, f"its tokenizer_config.json is broken: {error}")) from error
    if not isinstance(config, dict):
        raise ModelError(Problem(source, "its tokenizer_config.json is not an object"))
    longest = config.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0):
        what = f"its tokenizer_config.json: model_max_length is {json.dumps(longest)[:40]}; expected a number above 0"
        raise ModelError(Problem(source, what, "take the tokenizer's files from a published revision"))
    return config


def _keep_the_files_roles(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> None:
    """bos, eos, unk and pad stay what tokenizer_config.json says; transformers may have put its own there."""
    for role in _ROLES:
        value = config.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and getattr(tokenizer, role) != content:
            setattr(tokenizer, role, content)


def _probes(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    yield from ("Sure thing", " leading space", "two  spaces\n\nand lines\n", "Grüße, 你好 🙂 1234", "")
    for token in tokenizer.added_tokens_decoder.values():
        yield f"{token.content}Sure"
        yield f"text {token.content}\nSure thing {token.content} Hello\n"
    turns = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Sure, hello"}]
    yield str(tokenizer.apply_chat_template(turns, tokenize=False))


def _check(tokenizer: PreTrainedTokenizerFast, reference: tokenizers.Tokenizer, source: str) -> None:
    try:
        probes = list(_probes(tokenizer))
    except Exception as error:  # the template is a program out of the folder: it can raise anything
        what = f"its chat template fails on a plain chat: {error}"
        raise ModelError(Problem(source, what, "take the tokenizer's files from a published revision")) from error
    for text in probes:
        ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        files = reference.encode(text, add_special_tokens=False).ids
        if ours != files:
            raise ModelError(
                Problem(
                    source,
                    f"transformers gives other ids than its tokenizer.json: {text!r} becomes {ours}, not {files}",
                    "the folder's tokenizer files contradict each other (tokens added in one and not the other?): "
                    "take all of them from one published revision",
                )
            )
