"""From tokens to text, piece by piece: whole characters only, and never a part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are no character, or not yet."""


class TextStream:
    """The answer of one request as text. `push` each token, then `finish`; what they return, joined, is the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        """min_tokens: stop texts count only where they begin after that many tokens."""
        self.tokenizer, self.stop, self.min_tokens = tokenizer, tuple(stop), min_tokens
        self.stopped = False
        """Whether a stop text was met: nothing comes after it."""
        self._ids: list[int] = []
        self._context = self._read = 0
        """Begin and end, in the ids, of the last piece of whole characters. The next one is decoded behind it: its
        leading space, or what its bytes mean, can depend on it."""
        self._decoded = ""
        """The part of the text of ``ids[context:]`` that went on to `_send`."""
        self._pending = ""
        """Certain text that is not sent, since it may be the beginning of a stop text."""

    def push(self, token: int) -> str:
        """What is certain now to belong to the answer."""
        self._ids.append(token)
        text = self._decode(self._context)
        whole = text.rstrip(BROKEN)
        added = whole[len(self._decoded) :]
        if not added:
            return ""
        if whole == text:
            self._context, self._read = self._read, len(self._ids)
            self._decoded = self._decode(self._context)
        else:
            self._decoded = whole
        return self._send(added)

    def finish(self) -> str:
        """The rest: half characters, and what might have become a stop text."""
        if self.stopped:
            return ""
        sent = self._send(self._decode(self._context)[len(self._decoded) :])
        rest, self._pending = sent + self._pending, ""
        return rest

    def _send(self, added: str) -> str:
        text = self._pending + added
        if len(self._ids) <= self.min_tokens:
            return text
        if found := [text.index(mark) for mark in self.stop if mark in text]:
            self.stopped, self._pending = True, ""
            return text[: min(found)]
        held = self._beginning_of_a_stop(text)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]

    def _beginning_of_a_stop(self, text: str) -> int:
        """How many characters at the end of ``text`` a stop text begins with."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in self.stop)), 0)

    def _decode(self, start: int) -> str:
        text: str = self.tokenizer.decode(
            self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
