"""An Ollama Modelfile: its FROM line, what ends an answer, the context, and the chat template in Ollama's language."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from phi3_dist.data.render.template_probe import ChatFormat
from phi3_dist.exports.open_adapter import Opened

__all__ = ["MODELFILE", "modelfile"]

MODELFILE = "Modelfile"
_SYSTEM, _USER, _ANSWER, _NEXT = "s\u2063ystem", "u\u2063ser", "a\u2063nswer", "n\u2063ext"


def modelfile(opened: Opened, tokenizer: Any, head: tuple[str, ...]) -> str:
    """`head` are its first lines, FROM among them."""
    lines = [*head, "PARAMETER temperature 0", *(f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer))]
    factors = opened.metadata.get("longrope")
    if factors is not None:
        rope = opened.base.config.rope_parameters
        original = rope.get("original_max_position_embeddings", opened.base.config.max_position_embeddings)
        how = "up to this context" if factors == "short" else f"above a context of {original}"
        lines += [f"# LongRoPE: llama.cpp takes the {factors} factors, which it was trained with, {how}",
                  f"PARAMETER num_ctx {original if factors == 'short' else 2 * original}"]  # fmt: skip
    template = ollama_template(tokenizer)
    lines.append(
        f'TEMPLATE """{template}"""' if template else "# this chat template can't be said in Ollama's language"
    )
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Any) -> list[str]:
    """What ends a turn of the chat template, and what ends a text."""
    ids = [ChatFormat.of(tokenizer).end_of_turn, tokenizer.eos_token_id]
    return [tokenizer.convert_ids_to_tokens(i) for i in dict.fromkeys(ids) if i is not None]


def ollama_template(tokenizer: Any) -> str | None:
    """The chat template as Ollama's of one exchange, which it repeats; None where it is of no such form."""
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, following = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}

    def rendered(*messages: dict[str, str]) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    try:
        first, _, before_answer = rendered(user).partition(_USER)
        whole = rendered(user, answer, following)
        beginning, _, rest = rendered(system, user).partition(_SYSTEM)
    except (TemplateError, ValueError):
        return None
    between, _, end = whole.partition(_ANSWER)[2].partition(_NEXT)
    after_system = rest.partition(_USER)[0]
    unlike = (
        whole != f"{first}{_USER}{before_answer}{_ANSWER}{between}{_NEXT}{end}"
        or end != before_answer
        or not between.endswith(first)
        or not after_system.endswith(first)
        or '"""' in whole
        or "{{" in whole
    )
    if unlike:
        return None
    after_answer = between.removesuffix(first)
    said = f"{beginning}{{{{ .System }}}}{after_system.removesuffix(first)}"
    exchange = f"{first}{{{{ .Prompt }}}}{before_answer}{{{{ .Response }}}}{after_answer}"
    return f"{{{{ if .System }}}}{said}{{{{ end }}}}{exchange}"
