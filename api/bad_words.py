"""Bad words as the token sequences that workers ban.

A word is banned at the beginning of a text and after a space, since most tokenizers spell it differently there;
as vLLM does. Other spellings of the same word are other words.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import InvalidRequest
from .tokenizer import TextTokenizer
from .validation import MAX_BAD_WORD_LENGTH, MAX_BAD_WORDS


async def bad_word_tokens(words: Sequence[str], tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """One or two token sequences per word, without repetitions. Raises InvalidRequest."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"bad_words: at most {MAX_BAD_WORDS} words are allowed, not {len(words)}", "bad_words")
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        if not 1 <= len(bare) <= MAX_BAD_WORD_LENGTH:
            raise InvalidRequest(
                f"bad_words: a word has 1 to {MAX_BAD_WORD_LENGTH} characters besides leading spaces, not {len(bare)}",
                "bad_words",
            )
        for text in (bare, f" {bare}"):
            sequences[await tokenizer.encode(text, add_special_tokens=False)] = None
    sequences.pop((), None)  # a tokenizer may drop characters that it does not know
    return tuple(sequences)
