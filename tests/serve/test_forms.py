"""Grammars and tools through a replica: what a client asks for is what comes back, beside others."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rayft.errors import UsageError
from rayft.inference.grammar import Grammar
from rayft.inference.request import SamplingParams
from rayft.serve.job import Content, Conversation, Job, Piece
from rayft.serve.replica import Replica
from tests.serve.templates import CLOCK, WEATHER

ASKED = Conversation(({"role": "user", "content": "What is the weather in Paris?"},), tools=(WEATHER, CLOCK))
RANDOM = SamplingParams(max_new_tokens=300, temperature=1.0, seed=3)


async def pieces(replica: Replica, job: Job) -> list[Piece]:
    return [piece async for batch in replica.generate(job) for piece in batch]


def test_each_answer_of_a_job_follows_its_grammar(replica_with: Callable[..., Replica], contents: Any) -> None:
    replica = replica_with()
    forms = {"anna": "[a-f]{6}", "hugo": "[0-9]{3}-[0-9]{3}"}
    jobs = [
        Job(name, "Please order", RANDOM, contents[name], n=3, grammar=Grammar("regex", regex))
        for name, regex in forms.items()
    ]
    plain = Job("plain", "Please order", SamplingParams(max_new_tokens=12))

    async def ask() -> list[list[Piece]]:
        return await asyncio.gather(*(pieces(replica, job) for job in [*jobs, plain]))

    alone = asyncio.run(pieces(replica, replace(plain, id="alone")))
    *formed, free = asyncio.run(ask())
    for regex, came in zip(forms.values(), formed, strict=True):
        texts = ["".join(piece.text for piece in came if piece.index == index) for index in range(3)]
        assert all(re.fullmatch(regex, text) for text in texts) and len(set(texts)) > 1
        assert [piece.finish_reason for piece in came if piece.finish_reason] == ["stop"] * 3
    assert "".join(piece.text for piece in free) == "".join(piece.text for piece in alone)


@pytest.mark.parametrize("stream", [True, False])
def test_forced_calls_come_as_calls(replica_with: Callable[..., Replica], stream: bool) -> None:
    job = Job("1", replace(ASKED, tool_choice="function:get_weather"), RANDOM, n=2, stream=stream)
    came = asyncio.run(pieces(replica_with(), job))
    calls = [call for piece in came for call in piece.tool_calls]
    assert [call.name for call in calls] == ["get_weather"] * 2
    assert all("city" in json.loads(call.arguments) for call in calls)
    assert "".join(piece.text for piece in came) == ""
    assert [piece.finish_reason for piece in came if piece.finish_reason] == ["tool_calls"] * 2


def test_an_answer_without_a_call_is_content(replica_with: Callable[..., Replica]) -> None:
    replica = replica_with()
    sampling = SamplingParams(max_new_tokens=20)
    with_tools = asyncio.run(pieces(replica, Job("1", ASKED, sampling)))
    text = replica.voices.base.text(ASKED)
    same = asyncio.run(pieces(replica, Job("2", replica.voices.base.ids(ASKED), sampling)))
    assert "You can call functions" in text
    assert "".join(piece.text for piece in with_tools) == "".join(piece.text for piece in same) != ""


@pytest.mark.parametrize(
    ("job", "id"),
    [
        (Job("1", "text", RANDOM, grammar=Grammar("regex", "(")), "R817"),
        (Job("1", replace(ASKED, messages=({"role": "bishop", "content": "x"},)), RANDOM), "R818"),
        (Job("1", replace(ASKED, tool_choice="function:rm"), RANDOM), "R818"),
    ],
)
def test_what_cannot_be_done_is_said_first(replica_with: Callable[..., Replica], job: Job, id: str) -> None:
    replica = replica_with()
    with pytest.raises(UsageError) as error:
        asyncio.run(pieces(replica, job))
    assert error.value.id == id
    assert not replica.engine.busy


def test_adapters_render_with_their_own_template(
    replica_with: Callable[..., Replica], contents: dict[str, Content], tmp_path: Any
) -> None:
    import shutil

    from tests.serve.templates import HERMES, tokenizer_with

    folder = shutil.copytree(contents["anna"].path, tmp_path / "anna")
    tokenizer_with(HERMES).save_pretrained(folder)
    replica = replica_with()
    assert replica.voices.of(str(folder)).style.begin == "<tool_call>"
    job = Job("1", replace(ASKED, tool_choice="required"), RANDOM, Content(contents["anna"].hash, str(folder)))
    came = asyncio.run(pieces(replica, job))
    assert sum(len(piece.tool_calls) for piece in came) >= 1
    assert "".join(piece.text for piece in came) == ""
