"""Rendering by shape: the same text as the template gives, and only for templates that allow it."""

from __future__ import annotations

from itertools import product

import pytest

from phi3_dist.data.render.fast_template import Renderer, puts_contents_verbatim
from phi3_dist.modeling.tokenizer import tiny_tokenizer

PHI3 = tiny_tokenizer().chat_template
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
SKIPS_EMPTY = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}{{ m.content }}!"
    "{% elif loop.last %}[{{ m.content }}]{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}be good {% endif %}" + CHATML
VERBATIM = [PHI3, CHATML, SKIPS_EMPTY, DEFAULT_SYSTEM, "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"]

NOT_VERBATIM = [
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
    "{% for m in messages %}{{ m['content'][0] }}{% endfor %}",
    "{% for m in messages %}{% if m['content'] == 'a' %}x{% endif %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% if 'a' in m['content'] %}x{% endif %}{{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{% set c = m['content'] %}{{ c | trim }}{% endfor %}",
    "{% set ms = messages %}{% for m in ms %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{% set n = m %}{{ n['content'] | trim }}{% endfor %}",
    "{% filter trim %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endfilter %}",
    "{% set all %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endset %}{{ all | trim }}",
    "{% for m in messages %}{{ m['content'] }}{{ loop.nextitem }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] }}{{ loop.changed(m['content']) }}{% endfor %}",
    "{{ messages }}",
    "{% for m in messages %}{{ m.items() }}{% endfor %}",
    "{% for m in messages if m['content'] != 'a' %}{{ m['content'] }}{% endfor %}",
    "{% for k, v in messages %}{{ v }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{{ m[key] }}{% endfor %}",
    "{% for m in messages %}{{ (m)['content'] if m['content'] > 'b' else 'c' }}{% endfor %}",
    "{% for m in messages %}{% for m in ['x'] %}{{ m['content'] }}{% endfor %}{% endfor %}",
    "{% broken",
]


@pytest.mark.parametrize("template", VERBATIM)
def test_rendered_by_shape_as_by_the_template(template: str) -> None:
    assert puts_contents_verbatim(template)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    contents = ["a", " {{ b }}\n", "\x010\x02", "{% x %}ü🙂"]
    chats = [
        [{"role": role, "content": content} for role, content in zip(roles, row, strict=True)]
        for roles in (("user", "assistant"), ("system", "user", "assistant"), ("user",), ("user", "assistant") * 2)
        for row in product(contents, repeat=len(roles))
    ]
    chats.append([{"role": "system", "content": ""}, *chats[0]])
    renderer = Renderer(tokenizer)
    expected = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    assert renderer.texts(chats) == expected
    assert renderer.texts(chats[::-1]) == expected[::-1]


@pytest.mark.parametrize("template", NOT_VERBATIM)
def test_templates_that_look_at_contents_are_rendered_whole(template: str) -> None:
    assert not puts_contents_verbatim(template)


def test_a_template_that_trims_is_followed() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NOT_VERBATIM[0]
    chats = [[{"role": "user", "content": f" {i} "}] for i in range(3)]
    assert Renderer(tokenizer).texts(chats) == ["0", "1", "2"]
    assert Renderer(tokenizer).texts([]) == []
