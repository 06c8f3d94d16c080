"""What vLLM sends of one answer, as pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayft.inference.request import Usage
from rayft.serve.job import Finish, Piece, Token, ToolCall
from rayft.serve.tool_parser import ToolParser

_FINISHES: Mapping[str, Finish] = {"stop": "stop", "repetition": "stop", "length": "length", "abort": "cancelled"}


class VllmAnswer:
    """One answer of a job on its way to the client."""

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, parser: ToolParser | None, top: int) -> None:
        """parser: reads tool calls out of the text. top: how many of the likeliest tokens were asked for."""
        self.index, self.tokenizer, self.parser, self.top = index, tokenizer, parser, top
        self.tokens = 0
        self._called = False
        self._reason: str | None = None

    def take(self, choice: Mapping[str, Any]) -> list[Piece]:
        """A piece, or none where nothing is certain yet: what may become a call. choice: of a chunk, or of a whole body
        of `/v1/completions` with `return_token_ids` and `return_tokens_as_token_ids`."""
        self.tokens += len(choice.get("token_ids") or ())
        self._reason = choice.get("finish_reason") or self._reason
        text, calls = self._read(choice["text"])
        tokens = self._tokens(choice.get("logprobs"))
        return [Piece(self.index, text, tokens, calls)] if text or calls or tokens else []

    def end(self, prompt: int, cached: int) -> Piece:
        """The last piece. prompt, cached: tokens of the prompt, and how many of them came from the cache."""
        text, calls = "", ()
        if self.parser is not None:
            text, calls = self.parser.finish()
            self._called = self._called or bool(calls)
        reason: Finish = _FINISHES.get(self._reason or "", "error")
        if reason == "stop" and self._called:
            reason = "tool_calls"
        error = f"vLLM ended the answer with {self._reason}" if reason == "error" else None
        return Piece(self.index, text, (), calls, reason, Usage(prompt, self.tokens, cached), error)

    def _read(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
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
