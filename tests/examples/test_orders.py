"""The example data: made by its script, answerable from the request, nothing of the held-out file in training."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def module() -> Any:
    spec = importlib.util.spec_from_file_location("make_orders", EXAMPLES / "make_orders.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def chats(name: str) -> list[tuple[str, dict[str, Any]]]:
    """(request, tool call) of each line."""
    rows = [json.loads(line)["messages"] for line in (EXAMPLES / "data" / name).read_text().splitlines()]
    assert {tuple(message["role"] for message in row) for row in rows} == {("system", "user", "assistant")}
    return [(row[1]["content"], json.loads(row[2]["content"])) for row in rows]


@pytest.fixture(scope="module")
def train() -> list[tuple[str, dict[str, Any]]]:
    return chats("orders.jsonl")


@pytest.fixture(scope="module")
def heldout() -> list[tuple[str, dict[str, Any]]]:
    return chats("orders_heldout.jsonl")


def test_the_script_writes_these_very_files(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_orders.py", "--out", tmp_path], check=True, capture_output=True)
    for name in ("orders.jsonl", "orders_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_held_out_requests_are_new(train: Any, heldout: Any) -> None:
    assert len(train) == 320 and len(heldout) == 100
    texts = [text for text, _ in [*train, *heldout]]
    assert len({text.lower() for text in texts}) == 420
    orders = {call["arguments"].get("order_id") for _, call in train} - {None}
    assert not orders & {call["arguments"].get("order_id") for _, call in heldout}


def test_every_answer_can_be_read_from_its_request(train: Any, heldout: Any) -> None:
    made = module()
    closed = {
        "color": made.COLORS,
        "day": made.DAYS,
        "time": made.TIMES,
        "quantity": made.QUANTITIES.values(),
    }
    for text, call in [*train, *heldout]:
        assert list(call) == ["name", "arguments"]
        assert list(call["arguments"]) == made.TOOLS[call["name"]]
        for key, value in call["arguments"].items():
            if key in ("order_id", "product"):
                assert re.search(rf"\b{value}s?\b", text, re.IGNORECASE), (key, text)
            elif key == "reason":
                reasons = made.CANCEL_REASONS if call["name"] == "cancel_order" else made.RETURN_REASONS
                assert [key for key, words in reasons.items() if any(w.lower() in text.lower() for w in words)] == [
                    value
                ]
            else:
                assert value in closed[key]
            if key in ("color", "day"):
                assert value in text.lower()


@pytest.mark.smollm2
def test_a_chat_has_at_most_100_tokens() -> None:
    from transformers import AutoTokenizer

    from rayft.models.hub import fetch

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2-135m-instruct"))
    for name in ("orders.jsonl", "orders_heldout.jsonl"):
        rows = [json.loads(line)["messages"] for line in (EXAMPLES / "data" / name).read_text().splitlines()]
        lengths = [len(tokenizer.apply_chat_template(row, return_dict=False)) for row in rows]
        assert max(lengths) <= 100
