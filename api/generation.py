"""A router stream as text: detokenised, cut at stop strings, ended early when one is met."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from ..core.request import FinishReason, TokenLogprob
from ..observability.records import StageTimes
from ..router.sequence import Update
from ..router.service import RouterService
from ..router.stream import Stream, Submission
from .detokenizer import StopStrings
from .tokenizer import TextTokenizer
from .validation import Parameters


@dataclass(slots=True)  # made for every message to a client, and freezing it would cost as much again; nobody changes one
class Piece:
    """What is new for one sequence. `text` may lag behind `tokens` by what could still become something else.

    The first piece of a sequence carries the log probabilities of the prompt, where they were asked for.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Generation:
    """One request that runs. Iterate for its pieces; `cancel` it on every way out (harmless when it is over).

    With best_of more than n, the pieces are n whole sequences, the likeliest first, when all have ended.
    """

    def __init__(self, service: RouterService, submission: Submission, parameters: Parameters, tokenizer: TextTokenizer) -> None:
        self._stream: Stream = service.submit(submission)
        self._parameters = parameters
        self._sequences = [_TextSequence(submission, parameters, tokenizer) for _ in range(submission.n)]
        self._returned = list(range(submission.n))  # which sequence is which of those that are returned

    @property
    def id(self) -> str:
        """The router's id of the request."""
        return self._stream.id

    @property
    def client_id(self) -> str:
        return self._stream.client_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._stream.submission.prompt)

    @property
    def num_cached_tokens(self) -> int:
        return max(sequence.cached_tokens for sequence in self._stream.sequences)

    @property
    def num_sampled_tokens(self) -> int:
        """Of all sequences, returned or not."""
        return sum(sequence.num_tokens for sequence in self._sequences)

    def num_output_tokens(self, index: int) -> int:
        return self._sequences[self._returned[index]].num_tokens

    def stages(self, index: int) -> StageTimes:
        return self._stream.sequences[self._returned[index]].stages()

    def num_attempts(self, index: int) -> int:
        return self._stream.sequences[self._returned[index]].num_attempts

    def cancel(self) -> None:
        self._stream.cancel()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces() if len(self._sequences) == self._parameters.n else self._best()

    async def _pieces(self) -> AsyncIterator[Piece]:
        stream = self._stream
        while True:
            if not stream.fresh:
                if stream.done:
                    return
                await stream.news()
            update = stream.poll()
            if update is None:
                continue
            sequence = self._sequences[update.index]
            piece = sequence.push(update)
            if sequence.stopped:
                self._stream.finish(update.index)
            if piece.tokens or piece.text or piece.finish is not None or piece.prompt_logprobs:
                yield piece

    async def _best(self) -> AsyncIterator[Piece]:
        """The n sequences of the highest log probability per token; the earlier of equals."""
        parts: list[list[Piece]] = [[] for _ in self._sequences]
        async for piece in self._pieces():
            parts[piece.index].append(piece)
        sequences = [joined(each) for each in parts]
        sequences.sort(key=_mean_logprob, reverse=True)
        del sequences[self._parameters.n :]
        self._returned = [piece.index for piece in sequences]
        for index, piece in enumerate(sequences):
            logprobs = () if self._parameters.logprobs is None else piece.logprobs
            yield replace(piece, index=index, logprobs=logprobs)


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one sequence, at least one, in one."""
    return Piece(
        index=pieces[0].index,
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        finish=pieces[-1].finish,
        prompt_logprobs=pieces[0].prompt_logprobs,
    )


async def merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several requests as they come, each with the number of its request."""
    if len(generations) == 1:
        async for piece in generations[0]:
            yield 0, piece
        return
    waiting = {
        asyncio.ensure_future(anext(pieces)): (number, pieces)
        for number, pieces in enumerate(generation.__aiter__() for generation in generations)
    }
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, pieces = waiting.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(pieces))] = number, pieces
                yield number, piece
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _mean_logprob(piece: Piece) -> float:
    """Log probability per token."""
    return sum(entry.logprob for entry in piece.logprobs) / max(1, len(piece.logprobs))


class _TextSequence:
    """Text state of one sequence."""

    def __init__(self, submission: Submission, parameters: Parameters, tokenizer: TextTokenizer) -> None:
        self._detokenizer = tokenizer.detokenizer(parameters.kept_tokens)
        self._stops = StopStrings(parameters.stop, parameters.include_stop)
        self._stopping = bool(parameters.stop)
        self._prompt_only = parameters.prompt_only
        self._min_tokens = submission.sampling.min_tokens
        self._stop_tokens = frozenset(submission.sampling.stop_token_ids)
        self.num_tokens = 0
        self.stopped = False

    def push(self, update: Update) -> Piece:
        """Token by token, so that the output ends with the very token that completed a stop string."""
        if self._prompt_only:
            reason = FinishReason.LENGTH if update.finish is FinishReason.STOP else update.finish
            return Piece(update.index, (), "", (), reason, update.prompt_logprobs)
        if not self._stopping:
            return self._plain_piece(update)
        text: list[str] = []
        for count, token in enumerate(update.tokens, 1):
            self.num_tokens += 1
            ends = update.finish is FinishReason.STOP and count == len(update.tokens) and token in self._stop_tokens
            if not ends:  # a stop token belongs to the output, its text does not
                self._add(self._detokenizer.push(token), text)
            if self.stopped:
                logprobs = update.logprobs[:count]
                return Piece(
                    update.index, update.tokens[:count], "".join(text), logprobs, FinishReason.STOP, update.prompt_logprobs
                )
        finish = update.finish
        if finish is not None:
            self._add(self._detokenizer.flush(), text)
            if self.stopped:
                finish = FinishReason.STOP
            else:
                text.append(self._stops.flush())
        return Piece(update.index, update.tokens, "".join(text), update.logprobs, finish, update.prompt_logprobs)

    def _plain_piece(self, update: Update) -> Piece:
        """`push` where nothing can stop the text, which is most of the time."""
        finish, tokens = update.finish, update.tokens
        self.num_tokens += len(tokens)
        shown = tokens[:-1] if finish is FinishReason.STOP and tokens and tokens[-1] in self._stop_tokens else tokens
        text = "".join(map(self._detokenizer.push, shown))
        if finish is not None:
            text += self._detokenizer.flush()
        return Piece(update.index, tokens, text, update.logprobs, finish, update.prompt_logprobs)

    def _add(self, new: str, text: list[str]) -> None:
        if self.num_tokens <= self._min_tokens:  # stop strings count from here on, as stop tokens do
            text.append(new)
            return
        out, self.stopped = self._stops.push(new)
        text.append(out)
