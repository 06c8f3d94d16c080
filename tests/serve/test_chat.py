"""The chat: every side has its own conversation, commands change what they say, pipes get lines."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.inference.request import SamplingParams
from rayft.serve.chat import Answer, Chat
from rayft.serve.chat_screen import converse
from rayft.serve.job import Content, Conversation
from rayft.serve.replica import Replica
from tests.inference.oracle import Reference


@pytest.fixture
def chat(replica_with: Callable[..., Replica], contents: dict[str, Content]) -> Chat:
    adapters = {name: contents[name] for name in ("anna", "hugo")}
    chat = Chat(replica_with(), "tiny", adapters, SamplingParams(max_new_tokens=8))
    chat.reset()
    return chat


async def asked(chat: Chat, question: str) -> dict[str, Answer]:
    return [dict(answers) async for answers in chat.ask(question)][-1]


def talk(chat: Chat, lines: list[str], monkeypatch: pytest.MonkeyPatch, **console: Any) -> str:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    converse(chat, Console(file=out, width=120, **console))
    return out.getvalue()


def test_each_side_answers_as_it_does_alone_and_remembers_its_own_words(chat: Chat, peft: Reference) -> None:
    async def main() -> None:
        for question in ("What is the capital of France?", "And then?"):
            before = {side.name: list(side.messages) for side in chat.sides}
            answers = await asked(chat, question)
            for side, adapter in zip(chat.sides, (None, "anna", "hugo"), strict=True):
                renderer = chat.replica.voices.base
                prompt = renderer.ids(Conversation((*before[side.name], {"role": "user", "content": question})))
                expected = renderer.tokenizer.decode(peft.answer(prompt, adapter, 8), skip_special_tokens=True)
                assert expected.startswith(answers[side.name].text) and answers[side.name].tokens <= 8
                assert side.messages[-1] == {"role": "assistant", "content": answers[side.name].text}
        assert len({side.messages[1]["content"] for side in chat.sides}) > 1

    asyncio.run(main())
    assert [side.name for side in chat.sides] == ["tiny (base)", "anna", "hugo"]
    assert [len(side.messages) for side in chat.sides] == [4, 4, 4]


def test_an_answer_that_is_stopped_is_forgotten(chat: Chat) -> None:
    chat.command("/tokens 1500")

    async def main() -> None:
        answers = chat.ask("What is the capital of France?")
        await anext(answers)
        await answers.aclose()

    asyncio.run(main())
    while chat.replica.engine.busy:
        pass
    assert all(side.messages == [] for side in chat.sides)


def test_a_pipe_gets_lines(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ["/system Be brief.", "What is the capital of France?", "", f"/save {file}", "/quit", "never asked"]
    shown = talk(chat, lines, monkeypatch)
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["model"] for line in saved] == ["tiny (base)", "anna", "hugo"]
    for line in saved:
        assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]
        assert f"{line['model']}: {line['messages'][-1]['content']}".strip() in shown
    assert "never asked" not in str(chat.sides)


def test_commands(chat: Chat, tmp_path: Path) -> None:
    assert chat.command("/temperature 0.5") == "temperature 0.5" and chat.sampling.temperature == 0.5
    assert chat.command("/tokens 5") == "at most 5 tokens" and chat.sampling.max_new_tokens == 5
    asyncio.run(asked(chat, "Hello"))
    assert chat.command("/reset") == "a new conversation" and chat.sides[0].messages == []
    for line in ("/temperature warm", "/temperature -1", "/tokens 0", f"/save {tmp_path}/no/such/folder/", "/save"):
        assert chat.command(line) and chat.sampling.temperature == 0.5
    assert "/temperature X" in chat.command("/help")


def test_a_terminal_shows_the_sides_beside_each_other(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(chat, ["What is the capital of France?"], monkeypatch, force_terminal=True, color_system=None)
    titles = [line for line in shown.splitlines() if "tiny (base)" in line and "anna" in line and "hugo" in line]
    assert titles and "tokens" in shown


def test_what_cannot_be_answered_is_shown(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.command("/tokens 100000")
    shown = talk(chat, ["Hello"], monkeypatch)
    assert shown.count("the limit is 2048") == 3
    assert all(side.messages == [] for side in chat.sides)
