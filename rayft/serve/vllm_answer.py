"""What vLLM sends of one answer, as pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.inference.request import SamplingParams, Usage
from rayft.inference.text import TextStream
from rayft.serve.job import Finish, Piece, Token, ToolCall
from rayft.serve.tool_parser import ToolParser

_FINISHES: Mapping[str, Finish] = {"stop": "stop", "repetition": "stop", "length": "length", "abort": "cancelled"}


class VllmAnswer:
    """One answer of a job on its way to the client.

    Text is made here, of vLLM's token ids: its own text begins with the prompt where that ends in half a character, and
    is the base's tokenizer's, not the adapter's.
    """

    def __init__(
        self, index: int, tokenizer: PreTrainedTokenizerBase, parser: ToolParser | None, sampling: SamplingParams
    ) -> None:
        """parser: reads tool calls out of the text."""
        self.index, self.tokenizer, self.parser, self.top = index, tokenizer, parser, sampling.top_logprobs
        self.text = TextStream(tokenizer, sampling.stop, sampling.min_tokens)
        self.tokens = 0
        self._called = self._over = False
        self._reason: str | None = None

    def take(self, choice: Mapping[str, Any]) -> list[Piece]:
        """A piece, or none where nothing is certain yet: half a character, what may become a stop text or a call.

        choice: of a chunk, or of a whole body of `/v1/completions` with `return_token_ids` and
        `return_tokens_as_token_ids`.
        """
        if self._over:
            return []
        ids = choice.get("token_ids") or ()
        self._reason = choice.get("finish_reason") or self._reason
        last = len(ids)
        if choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason"), str):
            last -= 1  # the token that ends the answer is no part of it
        text, read = "", 0
        for read, id in enumerate(ids, 1):
            text += self.text.push(id) if read <= last else ""
            if self.text.stopped:
                self._over, self._reason = True, "stop"
                break
        self.tokens += read
        text, calls = self._called_in(text)
        tokens = self._tokens(choice.get("logprobs"))[:read]
        return [Piece(self.index, text, tokens, calls)] if text or calls or tokens else []

    def end(self, prompt: int, cached: int) -> Piece:
        """The last piece. prompt, cached: tokens of the prompt, and how many of them came from the cache."""
        text, calls = self._called_in(self.text.finish())
        if self.text.stopped:  # by the last characters
            self._reason = "stop"
        if self.parser is not None:
            rest, more = self.parser.finish()
            text, calls = text + rest, (*calls, *more)
        self._called = self._called or bool(calls)
        reason: Finish = _FINISHES.get(self._reason or "", "error")
        if reason == "stop" and self._called:
            reason = "tool_calls"
        error = f"vLLM ended the answer with {self._reason}" if reason == "error" else None
        return Piece(self.index, text, (), calls, reason, Usage(prompt, self.tokens, cached), error)

    def _called_in(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        if self.parser is None or not text:
            return text, ()
        text, calls = self.parser.push(text)
        self._called = self._called or bool(calls)
        return text, calls

    def _tokens(self, logprobs: Mapping[str, Any] | None) -> tuple[Token, ...]:
        if not logprobs:
            return ()
        columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        return tuple(self._token(_id(name), logprob, top or {}) for name, logprob, top in columns)

    def _token(self, id: int, logprob: float | None, table: Mapping[str, float]) -> Token:
        """vLLM's table holds the chosen token too, whether or not it is among the likeliest."""
        best: Sequence[tuple[str, float]] = sorted(table.items(), key=lambda item: -item[1])[: self.top]
        top = tuple((_id(name), self.tokenizer.decode([_id(name)]), value) for name, value in best)
        return Token(id, self.tokenizer.decode([id]), logprob, top)


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
