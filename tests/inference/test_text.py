"""Tokens to text, piece by piece, against decoding everything at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayft.inference.text import TextStream

TEXTS = [
    "Plain words, nothing else.",
    "Grüße aus Köln — 你好世界 🙂👩‍👩‍👧 नमस्ते",
    "tab\tline\n\n  spaces   and \u00a0 more",
]


def pieces(tokenizer: Any, ids: list[int], **arguments: Any) -> list[str]:
    """What each token adds, and what the end does."""
    stream = TextStream(tokenizer, **arguments)
    parts = []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            return parts
    return [*parts, stream.finish()]


def bytes_of_sentencepiece() -> Any:
    """Words with a leading space mark, and one token per byte for all else, as Llama-2 has it."""
    words = ["▁Hello", "▁world", "▁", "H", "i"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocabulary |= {word: len(vocabulary) + number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_character_is_sent_and_nothing_is_lost(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(bool(part) for part in parts) > len(text) / 4  # it comes piece by piece


def test_characters_of_several_byte_tokens_and_leading_spaces_of_sentencepiece() -> None:
    tokenizer = bytes_of_sentencepiece()
    words = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world", "▁"])
    characters = [1 + byte for byte in "你好🙂".encode()]
    ids = [words[0], words[1], words[2], *characters, words[1]]
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == "Hello world 你好🙂 world"
    assert [part for part in parts if part] == ["Hello", " world", " ", "你", "好", "🙂", " world"]


def test_random_tokens_give_the_text_of_all_of_them(tokenizer: Any) -> None:
    generator = random.Random(0)
    broken = 0
    for _ in range(200):
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(1, 40))]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(tokenizer, ids)) == whole
        broken += "\ufffd" in whole
    assert broken > 100


def test_a_stop_text_may_span_tokens_and_is_never_sent(tokenizer: Any) -> None:
    generator = random.Random(1)
    stopped = 0
    for _ in range(300):
        text = "".join(generator.choice("abcd") for _ in range(20))
        ids = tokenizer.encode(text)
        marks = ["".join(generator.choice("abcd") for _ in range(generator.randrange(1, 5))) for _ in range(2)]
        sent = "".join(pieces(tokenizer, ids, stop=marks))
        count = next((n for n in range(len(ids) + 1) if any(m in tokenizer.decode(ids[:n]) for m in marks)), None)
        if count is None:
            assert sent == text
            continue
        stopped += 1
        until = tokenizer.decode(ids[:count])
        assert sent == until[: min(until.index(mark) for mark in marks if mark in until)]
    assert 100 < stopped < 300


def test_text_is_held_back_only_while_it_may_become_a_stop_text(tokenizer: Any) -> None:
    ids = [token for letter in "xEN.ENDy" for token in tokenizer.encode(letter)]
    assert pieces(tokenizer, ids, stop=["END"]) == ["x", "", "", "EN.", "", "", ""]
    assert pieces(tokenizer, ids[:3], stop=["END"]) == ["x", "", "", "EN"]
    assert pieces(tokenizer, ids, stop=["END"], min_tokens=5)[-1] == ""  # END begins with the fifth token
    assert "".join(pieces(tokenizer, ids, stop=["END"], min_tokens=5)) == "xEN.ENDy"


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    ids = [*tokenizer.encode("a 你"), 1, *tokenizer.encode(" b"), 2]
    assert "".join(pieces(tokenizer, ids)) == "a 你 b"
