"""Made-up question-answer rows whose lengths spread like those of grade-school word problems with worked answers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

TEXT = (
    "a the of and to in is for with each more than how many there are was has then after day week house book apple "
    "train river friend garden money price half total twice left box paper school bread game hour minute water tree"
)
WORDS = TEXT.split()
"""Each is one token of most vocabularies, when a space stands before it."""
SPREAD = 0.32
"""Standard deviation of the logarithm of a row's length, which is log-normal."""
TEMPLATE_TOKENS = 32
"""What SmolLM2's chat template adds to a row: its system prompt and the marks around the turns."""
ANSWER_SHARE = 0.6


def write_rows(path: Path, count: int, *, median: int, spread: float = SPREAD, seed: int = 17) -> None:
    """`count` chats, one JSON object per line, of about `median` tokens; the same seed gives the same bytes."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            wanted = round(math.exp(draw.gauss(math.log(median), spread)))
            words = max(8, wanted - TEMPLATE_TOKENS)
            answer = round(words * min(0.9, max(0.2, draw.gauss(ANSWER_SHARE, 0.1))))
            turns = [("user", words - answer), ("assistant", answer)]
            messages = [{"role": role, "content": _text(draw, length)} for role, length in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))
