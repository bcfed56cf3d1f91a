"""Text to tokens and back."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from baton.api.tokenizer import LONG_TEXT, TextTokenizer
from baton.core.errors import ModelError
from baton.tests.router.router_process import tokenizer


async def test_encode_and_decode() -> None:
    shipped = tokenizer()
    tokens = await shipped.encode("Hello wörld 🙂")
    assert tokens[0] == 0  # <|bos|>
    assert shipped.decode(tokens) == "Hello wörld 🙂"
    assert await shipped.encode("Hello wörld 🙂", add_special_tokens=False) == tokens[1:]


async def test_long_texts_give_the_same_tokens() -> None:
    shipped = tokenizer()
    text = "word " * (LONG_TEXT // 4)
    assert shipped.decode(await shipped.encode(text)) == text


def test_single_tokens() -> None:
    shipped = tokenizer()
    assert shipped.token_text(0) == "<|bos|>"
    assert shipped.token_bytes(10**6) == b""
    assert b"".join(shipped.token_bytes(token) for token in range(5, 4096) if shipped.token_bytes(token) == b"\xe2") == b"\xe2"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer.load(tmp_path)


def test_router_process_imports_no_torch() -> None:
    """Start-up time and memory of a router depend on it."""
    code = "import sys, baton.deploy.router_process; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


async def test_least_tokens_is_a_lower_bound() -> None:
    shipped = tokenizer()
    for text in ("", "a", "def f(x): return x\n" * 50, "🙂" * 40, "<|assistant|>" * 30, " " * 500):
        assert shipped.least_tokens(text) <= len(await shipped.encode(text, False))
    assert shipped.least_tokens("a b" * 10_000) > 1000


async def test_long_texts_leave_the_event_loop_alone() -> None:
    """The thread must not hold the interpreter: the loop turns many times while it encodes."""
    turns = 0
    encoding = asyncio.create_task(tokenizer().encode("hello world " * 50_000))
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20
