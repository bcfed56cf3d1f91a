"""Text to token ids and back, with the files of the model's directory.

Uses the `tokenizers` library directly: importing transformers' AutoTokenizer would bring torch into the router.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..core.errors import ModelError
from .chat import ChatTemplate, Message
from .detokenizer import ByteDetokenizer, Detokenizer, KeepingDetokenizer, WindowDetokenizer
from .model_info import read_json
from .structured import GrammarChecker

LONG_TEXT = 20_000  # characters from which on encoding leaves the event loop


class TextTokenizer:
    """The tokenizer of the served model.

    template  None when the model has none
    grammars  what checks structured output for this tokenizer
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None = None, grammars: GrammarChecker | None = None
    ) -> None:
        self.template = template
        self.grammars = grammars or GrammarChecker(None)
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._specials = {entry.content: token for token, entry in added.items() if entry.special}
        self._added = {entry.content: token for token, entry in added.items()}
        self._bytes = _byte_table(tokenizer)
        self._longest = _longest_token(tokenizer, self._bytes)

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template. Raises ModelError."""
        path = directory / "tokenizer.json"
        if path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare exceptions
                raise ModelError(f"{path} cannot be read: {error}") from error
        else:
            tokenizer = _converted(directory)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        template = ChatTemplate.load(directory, read_json(directory / "tokenizer_config.json"))
        return cls(tokenizer, template, GrammarChecker(path if path.is_file() else None))

    async def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`. Long texts are encoded on a thread, so that the loop goes on."""
        if len(text) < LONG_TEXT:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def least_tokens(self, text: str) -> int:
        """A bound that costs nothing: `text` has at least this many tokens. 0 where the tokenizer allows no bound."""
        return len(text) // self._longest if self._longest else 0

    async def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()) -> tuple[int, ...]:
        """Token ids of a conversation rendered with the model's chat template. Raises InvalidRequest."""
        if self.template is None:
            raise ChatTemplate.missing()
        return await self.encode(self.template.render(messages, tools), add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of all `tokens` without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def detokenizer(self, kept: Iterable[str] = ()) -> Detokenizer:
        """A fresh incremental decoder for one sequence. `kept` special tokens have their text, unlike the others."""
        texts = {self._specials[text]: text for text in kept if text in self._specials}
        return KeepingDetokenizer(self._plain_detokenizer, texts) if texts else self._plain_detokenizer()

    def mark_id(self, text: str) -> int | None:
        """The token that a grammar has to name where it means this text; None where it can spell the text.

        The grammar library takes added tokens in angle brackets as special ones, whatever the tokenizer says of them.
        """
        bracketed = text.startswith("<") and text.endswith(">")
        return self._added.get(text) if bracketed else self._specials.get(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, special or not; empty for an id that no token has."""
        if self._bytes is not None and token in self._bytes:
            return self._bytes[token]
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are no character of their own become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _plain_detokenizer(self) -> Detokenizer:
        return WindowDetokenizer(self.decode) if self._bytes is None else ByteDetokenizer(self._bytes)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Unlike `encode`, a batch lets other threads run meanwhile.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)


def _converted(directory: Path) -> Tokenizer:
    """A tokenizer of an older format, converted by transformers: slow to import, so only where it is needed."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except Exception as error:
        raise ModelError(f"{directory} has no tokenizer.json, and what it has cannot be converted: {error}") from error
    if not isinstance(tokenizer, Tokenizer):
        raise ModelError(f"{directory} has no tokenizer.json, and its tokenizer has no fast version")
    return tokenizer


def _byte_table(tokenizer: Tokenizer) -> Mapping[int, bytes] | None:
    """Bytes of every ordinary token of a byte-level BPE tokenizer; None for tokenizers of other kinds.

    Special tokens have no text, so they are not in the table, as `decode(skip_special_tokens=True)` has it.
    """
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    alphabet = _byte_alphabet()
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    table = {}
    for text, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token not in special:
            # A token with a character outside the byte alphabet (an added one) stands for its own text.
            known = all(character in alphabet for character in text)
            table[token] = bytes(alphabet[character] for character in text) if known else text.encode()
    return table


def _longest_token(tokenizer: Tokenizer, table: Mapping[int, bytes] | None) -> int | None:
    """The most characters that one token can stand for; None when a token can swallow any number of them."""
    added = tokenizer.get_added_tokens_decoder().values()
    if table is None or tokenizer.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
        return None
    return max((*map(len, table.values()), *(len(token.content) for token in added)), default=None)


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes bytes (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
