"""`prepare`: what ends up in the folder, that it is reused, that nothing stands on both sides of the split."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.data import Prepared, ingest, prepare
from rayft.data import prepare as prepare_function
from rayft.data.examples import Examples
from rayft.errors import UsageError

Make = Callable[..., Any]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def conversation(number: int, words: int = 1) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": " ".join([f"Answer {number}."] * words)},
        ]
    }


@pytest.fixture
def orders(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "orders.jsonl", [conversation(number, 1 + number % 5) for number in range(40)])


def split_ids(prepared: Prepared, name: Any) -> list[tuple[int, ...]]:
    examples = prepared.split(name)
    return [] if examples is None else [tuple(row["input_ids"].tolist()) for row in examples]


def test_everything_is_kept_in_order(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    prepared = prepare(make_recipe(orders), tokenizer, str(tmp_path / "cache"))
    train = prepared.split("train")
    assert train is not None
    assert prepared.split("validation") is None
    assert prepared.prompts() == []
    expected = [
        tokenizer.apply_chat_template(conversation(number, 1 + number % 5)["messages"])["input_ids"]
        for number in range(40)
    ]
    assert [row["input_ids"].tolist() for row in train] == expected
    assert train.lengths.tolist() == [len(ids) for ids in expected]
    assert train.weight_sums.tolist() == [row["loss_weights"].sum() for row in train]
    assert all(row["loss_weights"][0] == 0 for row in train)
    stats = prepared.stats
    assert stats["train"] == {
        "examples": 40,
        "tokens": int(train.lengths.sum()),
        "supervised_tokens": int(train.weight_sums.sum()),
    }
    assert (stats["rows"], stats["examples"], stats["truncated"], stats["zero_supervised"]) == (40, 40, 0, 0)
    assert stats["sources"]["orders.jsonl"]["tokens"] == stats["tokens"] == stats["train"]["tokens"]
    assert train.column("source") == ["orders.jsonl"] * 40
    assert sorted(path.name for path in Path(prepared.folder).iterdir()) == ["stats.json", "train.arrow"]


def test_fraction_for_validation(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    source = [{"path": orders, "weight": 2.5}]
    prepared = prepare(make_recipe(source, validation=0.1), tokenizer, str(tmp_path / "cache"))
    train, validation = split_ids(prepared, "train"), split_ids(prepared, "validation")
    assert len(validation) == len(set(validation)) == 4
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(
        split_ids(prepare(make_recipe(orders), tokenizer, str(tmp_path / "c")), "train")
    )
    assert Counter(Counter(train).values()) == {2: 18, 3: 18}
    again = prepare(make_recipe(source, validation=0.1), tokenizer, str(tmp_path / "other cache"))
    assert (split_ids(again, "train"), split_ids(again, "validation")) == (train, validation)
    other = prepare(make_recipe(source, validation=0.1, seed=18), tokenizer, str(tmp_path / "cache"))
    assert split_ids(other, "validation") != validation
    few = prepare(make_recipe([{"path": orders, "limit": 3}], validation=0.01), tokenizer, str(tmp_path / "cache"))
    assert (len(split_ids(few, "train")), len(split_ids(few, "validation"))) == (2, 1)


def test_validation_sources_and_prompts(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen3")
    two_turns = [*conversation(1)["messages"], *conversation(2)["messages"]]
    rows = [{"messages": two_turns}, conversation(3, 500), {"messages": [*conversation(4)["messages"], two_turns[0]]}]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    prepared = prepare(make_recipe(orders, validation=held_out, max_length=100), tokenizer, str(tmp_path / "cache"))
    assert len(split_ids(prepared, "train")) == 40
    validation = prepared.split("validation")
    assert validation is not None
    assert len(validation) == 3
    prompts = prepared.prompts()
    assert [prompt["reference"] for prompt in prompts] == ["Answer 2.", "Answer 4."]  # one is truncated
    # The prompt is what the model sees before the answer in training: the empty thinking block is part of it.
    assert prompts[0]["prompt"].endswith("Question 2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert prompts[0]["prompt_ids"] == validation[0]["input_ids"][: len(prompts[0]["prompt_ids"])].tolist()
    assert prepared.prompts(1) == prompts[:1]
    assert prepared.stats["validation_sources"]["held_out.jsonl"]["truncated"] == 1


def test_weights_and_limits_of_sources(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    extra = write_jsonl(tmp_path / "extra.jsonl", [{"prompt": f"p{n}", "response": f"c{n}"} for n in range(10)])
    sources = [{"path": orders, "weight": 0.25}, {"path": extra, "limit": 4, "weight": 3, "name": "extra"}]
    prepared = prepare(make_recipe(sources), make_tokenizer("chatml"), str(tmp_path / "cache"))
    train = prepared.split("train")
    assert train is not None
    assert Counter(train.column("source")) == {"orders.jsonl": 10, "extra": 12}
    assert prepared.stats["sources"]["extra"]["examples"] == 4


def test_truncation_is_counted_and_empty_examples_are_dropped(
    make_tokenizer: Make, make_recipe: Make, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("chatml")
    long_question = conversation(1)
    long_question["messages"][0]["content"] *= 50
    silent = {"messages": conversation(2)["messages"][:1]}
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(0), conversation(1, 50), long_question, silent])
    prepared = prepare(make_recipe(path, max_length=64), tokenizer, str(tmp_path / "cache"))
    train = prepared.split("train")
    assert train is not None
    assert train.lengths.tolist()[1:] == [64]
    stats = prepared.stats
    assert (stats["rows"], stats["examples"], stats["zero_supervised"], stats["truncated"]) == (4, 2, 2, 2)
    assert stats["zero_supervised_rows"] == ["rows.jsonl:3", "rows.jsonl:4"]
    assert (stats["zero_by_truncation"], stats["zero_without_answer"], stats["truncated_share"]) == (1, 1, 0.5)
    full = prepare(make_recipe(path), tokenizer, str(tmp_path / "cache")).stats
    assert full["examples"] == 3
    assert stats["truncated_tokens"] == full["tokens"] - stats["tokens"] - 64


@pytest.mark.parametrize(
    ("row", "data", "reason"),
    [
        (conversation(1), {"max_length": 4}, r"3 lost their answer to truncation \(data\.max_length=4\)"),
        ({"messages": conversation(1)["messages"][:1]}, {}, "3 have no assistant message"),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "weight": 0}]},
            {},
            r"3 have assistant messages that are not trained on \(data\.train_on=assistant, weight: 0\)",
        ),
    ],
)
def test_nothing_supervised_in_the_whole_data(
    make_tokenizer: Make, make_recipe: Make, tmp_path: Path, row: Any, data: dict[str, Any], reason: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 3)
    with pytest.raises(UsageError, match=rf"R213: none of the 3 examples has a token to train on: {reason}"):
        prepare(make_recipe(path, **data), make_tokenizer("chatml"), str(tmp_path / "cache"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_bad_data(make_tokenizer: Make, make_recipe: Make, tmp_path: Path) -> None:
    tokenizer, cache = make_tokenizer("chatml"), str(tmp_path / "cache")
    with pytest.raises(UsageError, match="R201") as missing:
        prepare(make_recipe(str(tmp_path / "missing.jsonl")), tokenizer, cache)
    assert missing.value.exit_code == 2
    with pytest.raises(UsageError, match=r"R214: data source .*empty\.jsonl is empty: it holds no rows"):
        prepare(make_recipe(write_jsonl(tmp_path / "empty.jsonl", [])), tokenizer, cache)
    (tmp_path / "broken.jsonl").write_text(json.dumps(conversation(1)) + "\n{oops\n")
    with pytest.raises(UsageError, match=r"R204: broken\.jsonl:2: malformed: Expecting property name"):
        prepare(make_recipe(str(tmp_path / "broken.jsonl")), tokenizer, cache)
    with pytest.raises(UsageError, match="R215"):
        prepare(make_recipe(write_jsonl(tmp_path / "one.jsonl", [conversation(1)]), validation=0.5), tokenizer, cache)


def test_own_function(make_tokenizer: Make, make_recipe: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": f"Question {n}?", "a": n} for n in range(6)])
    code = tmp_path / "own.py"
    code.write_text(
        "def even(row):\n    return {'prompt': row['q'], 'completion': str(row['a'])} if row['a'] % 2 == 0 else None\n"
    )
    recipe = make_recipe(path, function=f"{code}:even")
    tokenizer, cache = make_tokenizer("chatml"), str(tmp_path / "cache")
    prepared = prepare(recipe, tokenizer, cache)
    assert (prepared.stats["rows"], prepared.stats["dropped"], prepared.stats["examples"]) == (6, 3, 3)
    code.write_text("def even(row):\n    return None\n")
    with pytest.raises(UsageError, match=r"R214: .*data\.function dropped all of its 6 rows"):
        prepare(recipe, tokenizer, cache)
    code.write_text("def even(row):\n    return row['missing']\n")
    with pytest.raises(UsageError, match=r"R205: data\.function failed at rows\.jsonl:1: KeyError: 'missing'"):
        prepare(recipe, tokenizer, cache)
    for function, reason in {
        f"{code}:odd": "has no function 'odd'",
        f"{tmp_path}/gone.py:even": "cannot be imported: FileNotFoundError",
        "no_such_package.module:even": "cannot be imported: ModuleNotFoundError",
        "even": "names no function",
    }.items():
        with pytest.raises(UsageError, match=f"R205: .*{reason}"):
            prepare(make_recipe(path, function=function), tokenizer, cache)


def test_packing(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    tokenizer, cache = make_tokenizer("chatml"), str(tmp_path / "cache")
    settings = {"train": orders, "max_length": 128, "validation": 0.2, "prompt_loss_weight": 0.5}
    plain = prepare(make_recipe(**settings), tokenizer, cache)
    packed = prepare(make_recipe(**settings, packing=True), tokenizer, cache)
    for name in ("train", "validation"):
        bins = packed.split(name)  # type: ignore[arg-type]  # a literal in a tuple
        assert bins is not None
        pieces = []
        for row in bins:
            assert len(row["input_ids"]) <= 128
            starts = np.flatnonzero(row["position_ids"] == 0)
            assert (row["loss_weights"][starts] == 0).all()
            for piece, weights in zip(
                np.split(row["input_ids"], starts[1:]), np.split(row["loss_weights"], starts[1:]), strict=True
            ):
                pieces.append((tuple(piece.tolist()), tuple(weights.tolist())))
        examples = plain.split(name)  # type: ignore[arg-type]  # a literal in a tuple
        assert examples is not None
        assert sorted(pieces) == sorted(
            (tuple(r["input_ids"].tolist()), tuple(r["loss_weights"].tolist())) for r in examples
        )
        assert packed.stats[name] == {**plain.stats[name], "bins": len(bins)}
        assert len(bins) < len(examples)
    assert packed.prompts() == plain.prompts()


def test_clm_on_raw_text(make_tokenizer: Make, make_recipe: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "It is sunny."}])
    tokenizer = make_tokenizer()
    train = prepare(make_recipe(path, objective="clm"), tokenizer, str(tmp_path / "cache")).split("train")
    assert train is not None
    assert tokenizer.decode(train[0]["input_ids"]) == "It is sunny.</s>"
    assert train[0]["loss_weights"].tolist() == [0.0] + [1.0] * (len(train[0]["input_ids"]) - 1)


def test_second_call_reuses_the_folder(
    make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    first = prepare(make_recipe(orders, validation=0.1), make_tokenizer("chatml"), cache)
    monkeypatch.setattr(ingest, "read", lambda source: pytest.fail("read again"))
    used = make_tokenizer("chatml")
    used(["padding and truncation", "change its state"], padding=True, truncation=True, max_length=3)
    assert prepare(make_recipe(orders, validation=0.1), used, cache) == first
    assert prepare(make_recipe(orders, validation=0.1, padding_free=False), used, cache) == first


def test_hash_follows_everything_that_decides_the_result(
    make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    tokenizer = make_tokenizer("chatml")
    code = tmp_path / "own.py"
    code.write_text("def same(row):\n    return row\n")
    recipes = [
        make_recipe(orders),
        make_recipe(orders, seed=1),
        make_recipe(orders, objective="clm"),
        make_recipe(orders, max_length=500),
        make_recipe(orders, packing=True),
        make_recipe(orders, train_on="all"),
        make_recipe(orders, prompt_loss_weight=0.1),
        make_recipe(orders, chat_template_kwargs={"a": 1}),
        make_recipe(orders, chat_template=tokenizer.chat_template + " "),
        make_recipe(orders, function=f"{code}:same"),
        make_recipe(orders, validation=0.1),
        make_recipe(orders, validation=orders),
        make_recipe([{"path": orders, "limit": 39}]),
        make_recipe([{"path": orders, "weight": 2}]),
    ]
    hashes = [prepare(recipe, tokenizer, cache).hash for recipe in recipes]
    hashes.append(prepare(recipes[0], make_tokenizer("qwen3"), cache).hash)
    code.write_text("def same(row):\n    return dict(row)\n")
    hashes.append(prepare(recipes[9], tokenizer, cache).hash)
    write_jsonl(Path(orders), [conversation(number) for number in range(40)])
    hashes.append(prepare(recipes[0], tokenizer, cache).hash)
    assert len(set(hashes)) == len(hashes)


def test_leftover_of_a_dead_process_is_replaced(
    make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = prepare(make_recipe(orders), make_tokenizer("chatml"), str(cache))
    expected = split_ids(first, "train")
    Path(first.folder, "stats.json").unlink()
    Path(first.folder, "train.arrow").write_bytes(b"half")
    (cache / f".{first.hash}").mkdir()
    assert split_ids(prepare(make_recipe(orders), make_tokenizer("chatml"), str(cache)), "train") == expected
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.hash]


def _prepare_in_process(recipe: Any, tokenizer: Any, cache: str, start: Any, results: Any) -> None:
    built: list[str] = []
    read = ingest.read
    ingest.read = lambda source: built.append(source.path) or read(source)  # type: ignore[func-returns-value]  # append, then read
    start.wait()
    prepared = prepare_function(recipe, tokenizer, cache)
    results.put((prepared.hash, len(Examples(f"{prepared.folder}/train.arrow")), len(built)))


def test_two_processes_at_once(make_tokenizer: Make, make_recipe: Make, orders: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    arguments = (make_recipe(orders), make_tokenizer("chatml"), str(tmp_path / "cache"), start, results)
    processes = [context.Process(target=_prepare_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = sorted((results.get(timeout=120) for _ in processes), key=lambda answer: answer[2])
    for process in processes:
        process.join()
    assert answers[0][:2] == answers[1][:2]
    assert [answer[2] for answer in answers] == [0, 1]  # one read the data, the other found it
