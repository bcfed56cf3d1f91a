"""Chat templates: the shipped one, Hugging Face's extras, and templates that misbehave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from baton.api.chat import ChatTemplate, Message
from baton.api.tokenizer import TextTokenizer
from baton.core.errors import InvalidRequest, ModelError
from baton.tests.router.router_process import MODEL, tokenizer

USER = Message("user", "Hi")


async def test_shipped_template() -> None:
    shipped = tokenizer()
    tokens = await shipped.encode_chat([Message("system", "Be brief."), USER, Message("assistant", "Yes"), USER])
    text = "<|bos|><|user|>Be brief.\n\nHi<|end|><|assistant|>Yes<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokens == await shipped.encode(text, add_special_tokens=False)


def test_extras_of_the_format() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render([Message("skip", "x"), Message("user", "<é>")])
    assert rendered == '<s>{"role": "user", "content": "<é>"}%'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no systems') }}", "no systems"),
        ("{{ messages.append(1) }}", "messages"),  # immutable sandbox
        ("{{ messages.__class__.__mro__ }}", "messages"),
        ("{{ 1 // 0 }}", "refuses"),
        ("{{ messages[5].role.x }}", "refuses"),
    ],
)
def test_template_failures_are_the_clients_to_know(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        ChatTemplate(source, {}).render([USER])
    assert refused.value.field == "messages"


def test_broken_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% if %}", {})


async def test_where_templates_are_found(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]}
    named = ChatTemplate.load(tmp_path, {**config, "eos_token": {"content": "<e>"}})
    assert named is not None
    assert named.render([USER]) == "D<e>"
    (tmp_path / "chat_template.jinja").write_text("FILE")
    from_file = ChatTemplate.load(tmp_path, config)
    assert from_file is not None
    assert from_file.render([USER]) == "FILE"


async def test_model_without_a_template_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await TextTokenizer.load(tmp_path).encode_chat([USER])
