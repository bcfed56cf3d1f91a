"""Incremental decoding equals decoding at once; stop strings never leak."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from baton.api.detokenizer import ByteDetokenizer, Detokenizer, StopStrings, WindowDetokenizer
from baton.api.tokenizer import TextTokenizer
from baton.tests.router.router_process import tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

SHIPPED = tokenizer()
VOCAB_SIZE = 4096

# Text whose UTF-8 has one to four bytes a character, cut into tokens at any byte.
TEXTS = st.text(st.sampled_from("ab é€🙂\u0301\n"), max_size=30)


def streamed(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


def bytes_as_tokens(text: str) -> list[int]:
    """One token per byte: every split there is happens."""
    return [token for byte in text.encode() for token in BYTE_TOKENS[byte]]


BYTE_TOKENS = {byte: [t for t in range(VOCAB_SIZE) if SHIPPED.token_bytes(t) == bytes([byte])][:1] for byte in range(256)}


@given(st.lists(st.integers(0, VOCAB_SIZE + 10), max_size=40))
def test_streamed_text_equals_the_whole_for_any_tokens(tokens: list[int]) -> None:
    """Random tokens: invalid UTF-8, special tokens, ids that do not exist."""
    assert "".join(streamed(SHIPPED.detokenizer(), tokens)) == SHIPPED.decode(tokens)


@given(TEXTS)
def test_no_half_characters(text: str) -> None:
    pieces = streamed(SHIPPED.detokenizer(), bytes_as_tokens(text))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@given(TEXTS)
def test_window_detokenizer_agrees(text: str) -> None:
    pieces = streamed(WindowDetokenizer(SHIPPED.decode), bytes_as_tokens(text))
    assert "".join(pieces) == text


def test_window_detokenizer_keeps_the_spaces_of_sentencepiece() -> None:
    """Such tokenizers drop the first space of whatever they decode, so context decides."""
    vocab = {"▁a": 0, "▁b": 1, "c": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "<s>": 6}
    model = Tokenizer(BPE(vocab, [], byte_fallback=True, unk_token="c"))
    model.add_special_tokens(["<s>"])
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    text = TextTokenizer(model)
    assert isinstance(text.detokenizer(), WindowDetokenizer)
    tokens = [6, 0, 1, 6, 1, 2, 3, 4, 5, 1]
    assert streamed(text.detokenizer(), tokens) == ["", "a", " b", "", " b", "c", "", "", "€", " b", ""]
    assert "".join(streamed(text.detokenizer(), tokens)) == text.decode(tokens)


def test_garbage_does_not_wait_for_ever() -> None:
    """A run of broken bytes must come out at last, or memory and time would grow with it."""
    byte = BYTE_TOKENS[0x80][0]
    window = WindowDetokenizer(SHIPPED.decode)
    assert sum(len(window.push(byte)) for _ in range(200)) >= 128
    table = ByteDetokenizer({byte: b"\x80"})
    assert table.push(byte) == "\ufffd"


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
@example(["baa"], ["a", "baa"], False)  # one is met within the other
@example(["a", "b", "c", "d"], ["abcd", "bc"], False)
@example(["xab", "c"], ["ab", "abc"], True)  # one begins with the other
@example(["x", "a", "bc"], ["bc", "abc"], True)  # one ends with the other
def test_stop_strings_cut_at_the_first_match(pieces: list[str], stops: list[str], include: bool) -> None:
    """The match that is complete first counts, and the longest of those, however the text comes in pieces."""
    checker, out, stopped = StopStrings(stops, include), "", False
    for count, piece in enumerate(pieces, 1):
        text, stopped = checker.push(piece)
        out += text
        if stopped:
            whole = "".join(pieces[:count])
            end = next(end for end in range(1, len(whole) + 1) if whole[:end].endswith(tuple(stops)))
            longest = max(len(stop) for stop in stops if whole[:end].endswith(stop))
            assert out == (whole[:end] if include else whole[: end - longest])
            break
        assert not any(stop in "".join(pieces[:count]) for stop in stops)
        assert not any(stop in out for stop in stops)  # nothing of a stop string ever went out
    if not stopped:
        assert out + checker.flush() == "".join(pieces)


def test_a_stop_string_may_be_spread_over_tokens_and_bytes() -> None:
    """Every character of it comes in a token of its own, or in several."""
    stop = "né🙂d"
    for text in (f"o{stop}x", f"on{stop}", f"{stop[:3]}{stop}"):
        for include in (False, True):
            decoder, stops = ByteDetokenizer({byte: bytes([byte]) for byte in range(256)}), StopStrings([stop], include)
            out = ""
            for byte in text.encode():
                new, stopped = stops.push(decoder.push(byte))
                out += new
                if stopped:
                    break
            assert stopped
            assert out == text[: text.index(stop) + (len(stop) if include else 0)]


@pytest.mark.parametrize(("pushed", "out"), [("ab", "a"), ("aab", "aa"), ("abcx", "abcx"), ("xx", "xx")])
def test_only_a_possible_beginning_is_held_back(pushed: str, out: str) -> None:
    assert StopStrings(["bcd"]).push(pushed) == (out, False)
