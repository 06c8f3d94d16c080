"""Answers of a given form: from a `Grammar` to the tokens that may come next. The parsing is llguidance's.

    guides = Guides(engine.vocabulary)
    mask = guides.guide(Grammar("regex", "[0-9]{4}"), tokenizer, end_ids(model, tokenizer))
    engine.add(request, send, mask)

What costs time is shared: a tokenizer is read once, whatever number of adapters bring it, and a grammar is compiled
once. `guide` may be called from any thread; what it returns is asked by the thread that steps.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar
from rayft.inference.grammar_limits import refused
from rayft.inference.grammar_text import to_llguidance

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Guide:
    """The `TokenMask` of one answer. It keeps its place in the grammar: each call goes on where the last one ended."""

    def __init__(self, matcher: LLMatcher, words: int, vocabulary: int, end_ids: tuple[int, ...]) -> None:
        """words: of 32 bits, that llguidance's masks have."""
        self.end_ids = end_ids
        self.error: str | None = None
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros(words, np.int32)
        self._read = 0
        """Generated ids that the matcher has seen."""

    def allowed(self, generated: Sequence[int]) -> torch.Tensor | None:
        """bool[vocabulary]. End tokens are allowed exactly where the answer is complete; None after an error."""
        if self.error is not None:
            return None
        new, self._read = generated[self._read :], len(generated)
        if new:
            self._matcher.consume_tokens(list(new))
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.error = _lost(self._matcher.get_error())
            return None
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocabulary, bitorder="little")
        mask = torch.from_numpy(bits).view(torch.bool)
        mask[list(self.end_ids)] = self._matcher.is_accepting()
        if not mask.any():
            self.error = _lost("no token of the vocabulary can follow")
            return None
        return mask


class Guides:
    """Compiles grammars for the tokenizers that belong to one model, and keeps the latest of both."""

    def __init__(self, vocabulary: int, *, grammars: int = 256, tokenizers: int = 16) -> None:
        """vocabulary: rows of the model's head, which may be more or fewer than the tokens of a tokenizer."""
        self.vocabulary = vocabulary
        self._tokenizers: _Latest[LLTokenizer] = _Latest(tokenizers)
        self._matchers: _Latest[LLMatcher | UsageError] = _Latest(grammars)
        """Refusals too: to find one can take as long as to compile."""
        self._contents: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """Tokenizer object -> hash of all that it does: adapters bring copies of the same tokenizer."""

    def guide(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> Guide:
        """A mask for one answer. end_ids: tokens that end an answer; the grammar decides where they may.

        Raises:
            UsageError: R817, a grammar that is not valid, too large or not supported, or a tokenizer that llguidance
                cannot read.
        """
        ends = tuple(sorted(token for token in set(end_ids) if token < self.vocabulary))
        if not ends:
            raise refused(grammar.kind, "the model has no end token, so that no answer could end")
        content = self._content(grammar, tokenizer)
        compiled = self._tokenizers.get((content, ends), lambda: self._read(grammar, tokenizer, ends))
        matcher = self._matchers.get((content, ends, grammar), lambda: _compile(grammar, compiled))
        if isinstance(matcher, UsageError):
            raise UsageError(matcher.id, matcher.message, matcher.hint)
        return Guide(matcher.deep_copy(), _words(compiled), self.vocabulary, ends)

    def _content(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase) -> str:
        if not tokenizer.is_fast:
            raise refused(grammar.kind, f"{tokenizer.name_or_path} is not a fast tokenizer (it has no tokenizer.json)")
        if tokenizer not in self._contents:
            self._contents[tokenizer] = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return self._contents[tokenizer]

    def _read(self, grammar: Grammar, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> LLTokenizer:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise refused(grammar.kind, f"llguidance is missing: {error}", "pip install 'rayft[serve]'") from error
        size = max(self.vocabulary, len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        try:
            return from_tokenizer(tokenizer, n_vocab=size, eos_token=list(ends))
        except Exception as error:  # whatever its Rust code says of a tokenizer that it does not know
            raise refused(grammar.kind, f"llguidance cannot read the tokenizer: {_brief(str(error))}") from error


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher | UsageError:
    """At the beginning of an answer, its first mask computed: what that took is in every copy.

    The first two limits, which bound memory (a state takes up to 2 kB), and the last, which bounds the time of a step,
    are lower than llguidance's own. A step that needs more ends its own request and no other one.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_grammar_size=200_000,
        max_lexer_states=50_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=20_000,
        verbose_errors=False,
    )
    try:
        text = to_llguidance(grammar)
    except UsageError as error:
        return error
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return refused(grammar.kind, _brief(matcher.get_error())) if matcher.is_error() else matcher


def _words(tokenizer: LLTokenizer) -> int:
    return (tokenizer.vocab_size + 31) // 32


def _lost(reason: str) -> str:
    return f"the grammar cannot be followed any further: {_brief(reason)}"


def _brief(text: str) -> str:
    line = " ".join(text.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else line[:300] + " ..."


class _Latest(Generic[T]):
    """Values by key, the least recently used given up first. Two threads may make the same one: no harm but time."""

    def __init__(self, size: int) -> None:
        self._size, self._kept = size, OrderedDict[Hashable, T]()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return made
