"""Answers under a grammar: a random model at temperature 1, which would never write JSON by itself, has no choice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.errors import UsageError
from rayft.inference.engine import Engine
from rayft.inference.grammar import Grammar
from rayft.inference.guide import Guide, Guides
from rayft.inference.request import Request, SamplingParams
from tests.inference.oracle import random_prompt
from tests.inference.test_engine import Answer, ask, finish

JSON_VALUES = st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab"\\ \né', max_size=4)
NAMES = ["a", "city", "the count", 'qu"ote', "é"]


@st.composite
def objects(draw: Any, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    return {
        "type": "object",
        "properties": {name: draw(values) for name in names},
        "required": draw(st.lists(st.sampled_from(names), unique=True)) if names else [],
        "additionalProperties": False,
    }


@st.composite
def integers(draw: Any) -> dict[str, Any]:
    low = draw(st.integers(-1000, 1000))
    return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 1000))}


@st.composite
def strings(draw: Any) -> dict[str, Any]:
    shortest = draw(st.integers(0, 3))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 5))}


SCALARS = (
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "date"}])
    | st.builds(lambda values: {"enum": values}, st.lists(JSON_VALUES, min_size=1, max_size=3))
    | st.builds(lambda value: {"const": value}, JSON_VALUES)
    | st.sampled_from([{"type": "string", "pattern": p} for p in ("^[a-f]{2,4}$", "^(yes|no)!?$", "^\\d{3}-\\d{2}$")])
    | integers()
    | strings()
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: (
        objects(inner)
        | st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=4,
)


@pytest.fixture
def engine(engine_with: Any) -> Engine:
    return engine_with(max_num_seqs=16)


@pytest.fixture
def guides(engine: Engine) -> Guides:
    return Guides(engine.vocabulary)


def request(id: str, number: int = 0, adapter: str | None = None, **sampling: Any) -> Request:
    prompt = random_prompt(torch.Generator().manual_seed(number), 300, 30)
    return Request(id, prompt, adapter, sampling=SamplingParams(**({"max_new_tokens": 600} | sampling)))


def constrained(engine: Engine, guides: Guides, grammar: Grammar, asked: Request) -> Answer:
    answer = Answer()
    engine.add(asked, answer.events.append, guides.guide(grammar, engine.tokenizer, {engine.tokenizer.eos_token_id}))
    return answer


def answers(engine: Engine, guides: Guides, grammars: list[Grammar], **sampling: Any) -> list[str]:
    """One answer to each, all of them in one batch, all of them complete."""
    sampling = {"temperature": 1.0} | sampling
    asked = [
        constrained(engine, guides, grammar, request(str(i), i, [None, "anna", "hugo"][i % 3], seed=i, **sampling))
        for i, grammar in enumerate(grammars)
    ]
    finish(engine)
    for grammar, answer in zip(grammars, asked, strict=True):
        assert answer.last.finish_reason == "stop", (grammar, answer.text, answer.last.error)
        assert answer.ids[-1] == engine.tokenizer.eos_token_id
    return [answer.text for answer in asked]


@pytest.mark.long
@given(schemas=st.lists(SCHEMAS, min_size=12, max_size=12))
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answers_are_valid_under_the_schema(engine: Engine, guides: Guides, schemas: list[dict[str, Any]]) -> None:
    grammars = [Grammar("json_schema", json.dumps(schema)) for schema in schemas]
    for schema, text in zip(schemas, answers(engine, guides, grammars), strict=True):
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.long
def test_json_mode_writes_objects(engine: Engine, guides: Guides) -> None:
    asked = [
        constrained(engine, guides, Grammar("json_object"), request(str(seed), seed, temperature=1.0, seed=seed))
        for seed in range(12)
    ]
    finish(engine)
    complete = [answer for answer in asked if answer.last.finish_reason == "stop"]
    assert len(complete) >= 4  # nothing bounds an object: some are not at their end after 600 tokens
    assert all(isinstance(json.loads(answer.text), dict) for answer in complete)
    assert all(answer.text.startswith("{") for answer in asked)


REGEXES = [
    "[0-9]{4}-[0-9]{2}",
    "^(yes|no|maybe)$",
    r"a|b\$",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"[\d\w]{3}\D",
    r"(?i)[a-c]{3}x?",
    "[äöüß]{2} (Straße|Gasse)",
    r"[^a-z\d\x00-\x1f]{5}/",
]


def test_answers_match_the_expression(engine: Engine, guides: Guides) -> None:
    expressions = [regex for regex in REGEXES for _ in range(4)]
    texts = answers(engine, guides, [Grammar("regex", regex) for regex in expressions])
    assert all(re.fullmatch(regex, text) for regex, text in zip(expressions, texts, strict=True)), texts
    assert len(set(texts)) > len(REGEXES)


def test_answers_are_one_of_the_choices(engine: Engine, guides: Guides) -> None:
    lists = [["yes", "no"], ["a", "ab", "abc"], ['say "hi"', "back\\slash", "two\nlines"], ["Übergröße", "日本", "🙂"]]
    chosen = [choices for choices in lists for _ in range(8)]
    grammars = [Grammar("choice", json.dumps(choices)) for choices in chosen]
    texts = answers(engine, guides, grammars)
    assert all(text in choices for text, choices in zip(texts, chosen, strict=True)), texts
    assert all(len({*choices} & {*texts}) > 1 for choices in lists)


def test_there_may_be_many_choices(tokenizer: Any) -> None:
    guides, words = Guides(len(tokenizer)), [f"word {number}" for number in range(10_000)]
    for grammar in (Grammar("choice", json.dumps(words)), Grammar("json_schema", json.dumps({"enum": words}))):
        text = tokenizer.decode(walk(guides.guide(grammar, tokenizer, {2}), 1))
        assert text.strip('"') in words


def test_a_lark_grammar_is_followed(engine: Engine, guides: Guides) -> None:
    sums = 'start: NUMBER ("+" NUMBER){1,3} "=" NUMBER\nNUMBER: /[1-9][0-9]?/'
    for text in answers(engine, guides, [Grammar("lark", sums)] * 6):
        assert re.fullmatch(r"[1-9]\d?(\+[1-9]\d?){1,3}=[1-9]\d?", text)


def test_neighbours_without_a_grammar_answer_as_ever(engine: Engine, guides: Guides) -> None:
    def free() -> list[Answer]:
        return [ask(engine, request(f"free-{i}", 100 + i, [None, "bert"][i % 2], max_new_tokens=24)) for i in range(6)]

    alone = free()
    finish(engine)
    among = free()
    texts = answers(engine, guides, [Grammar("regex", "[0-9]{12}")] * 6, temperature=0.0)
    assert [answer.ids for answer in among] == [answer.ids for answer in alone]
    assert all(re.fullmatch("[0-9]{12}", text) for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.long
def test_a_seed_is_a_seed_and_preemption_changes_nothing(engine_with: Any) -> None:
    def texts(**settings: Any) -> tuple[list[str], int]:
        engine = engine_with(**settings)
        grammars = [Grammar("regex", "([a-z]{3} ){40}")] * 6
        return answers(engine, Guides(engine.vocabulary), grammars, max_new_tokens=200), engine.scheduler.preemptions

    roomy, none = texts()
    narrow, some = texts(kv_cache_tokens=272, max_num_seqs=4, max_num_batched_tokens=64)
    assert narrow == roomy and some > none == 0


def test_the_grammar_wins_over_what_else_is_asked(engine: Engine, guides: Guides) -> None:
    """Bias, minimum length and ignored end tokens choose among what the grammar leaves."""
    token = engine.tokenizer.encode("z", add_special_tokens=False)[0]
    grammar = Grammar("choice", '["a", "b"]')
    for sampling in ({"logit_bias": {token: 100.0}}, {"min_tokens": 20}, {"ignore_eos": True}, {"top_k": 1}):
        (text,) = answers(engine, guides, [grammar], max_new_tokens=20, **sampling)
        assert text in ("a", "b")
    b = engine.tokenizer.encode("b", add_special_tokens=False)[0]
    assert answers(engine, guides, [grammar] * 6, logit_bias={b: 100.0}) == ["b"] * 6
    (text,) = answers(engine, guides, [Grammar("regex", "a*")], min_tokens=30, logit_bias={2: 50.0})
    assert len(text) >= 10, "an end that may wait waits for min_tokens"


def test_stop_texts_still_end_an_answer(engine: Engine, guides: Guides) -> None:
    answer = constrained(engine, guides, Grammar("regex", "[ab]{400}"), request("1", stop=("b",), temperature=1.0))
    finish(engine)
    assert answer.last.finish_reason == "stop" and set(answer.text) <= {"a"}


def walk(guide: Guide, seed: int, limit: int = 400) -> list[int]:
    """Any allowed token, again and again, until an end token."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < limit:
        allowed = guide.allowed(ids)
        assert allowed is not None, guide.error
        candidates = allowed.nonzero()[:, 0]
        ids.append(int(candidates[torch.randint(len(candidates), (), generator=generator)]))
        if ids[-1] in guide.end_ids:
            return ids[:-1]
    raise AssertionError(ids)


def test_any_end_token_ends_an_answer_and_none_before_its_end(tokenizer: Any) -> None:
    ends = {0, 2}
    guide = Guides(len(tokenizer)).guide(Grammar("choice", '["ab", "abc"]'), tokenizer, ends)
    ids: list[int] = []
    seen = []
    for letter in "abc":
        allowed = guide.allowed(ids)
        seen.append({token for token in ends if allowed[token]})
        ids += tokenizer.encode(letter, add_special_tokens=False)
    assert seen == [set(), set(), ends]
    assert set(guide.allowed(ids).nonzero()[:, 0].tolist()) == ends


@pytest.mark.parametrize("rows", [+37, 0, -20])
def test_the_head_may_have_more_or_fewer_rows_than_the_tokenizer_has_tokens(tokenizer: Any, rows: int) -> None:
    guides = Guides(len(tokenizer) + rows)
    for seed in range(8):
        guide = guides.guide(Grammar("regex", "[a-z]{5} [0-9]{5}"), tokenizer, {tokenizer.eos_token_id})
        assert guide.allowed([]).shape == (len(tokenizer) + rows,)
        ids = walk(guide, seed)
        assert max(ids) < min(len(tokenizer), len(tokenizer) + rows)
        assert re.fullmatch("[a-z]{5} [0-9]{5}", tokenizer.decode(ids))


def sentencepiece_like() -> Any:
    """A tokenizer in the way of Llama 2: spaces as ▁, bytes for what has no token, an end token `</s>`."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnop0123456789{}:",
    ]
    merges = [("▁", "a"), ("b", "c"), ("▁", "d"), ("1", "2")]
    vocabulary = {token: id for id, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokenizers_in_the_way_of_sentencepiece() -> None:
    tokenizer = sentencepiece_like()
    guides = Guides(len(tokenizer))
    for seed in range(12):
        guide = guides.guide(Grammar("regex", "[a-d]{2}( [x-z0-9é]{3}){2}"), tokenizer, {2})
        text = tokenizer.decode(walk(guide, seed), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert re.fullmatch("[a-d]{2}( [x-z0-9é]{3}){2}", text), text


def test_what_costs_time_is_made_once(tokenizer: Any, tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance.hf
    from transformers import AutoTokenizer

    made = []
    read = llguidance.hf.from_tokenizer
    monkeypatch.setattr(llguidance.hf, "from_tokenizer", lambda *a, **k: made.append(1) or read(*a, **k))
    guides = Guides(len(tokenizer), grammars=2)
    other = AutoTokenizer.from_pretrained(tiny_model_folder)
    grammars = [Grammar("regex", f"{letter}+") for letter in "abc"]
    first = guides.guide(grammars[0], tokenizer, {2})
    again = guides.guide(grammars[0], other, {2})
    assert len(made) == 1 and len(guides._matchers._kept) == 1
    ids = tokenizer.encode("a", add_special_tokens=False)
    first.allowed(ids)
    assert not again.allowed([])[2] and first.allowed(ids)[2], "each answer has a place of its own"
    for grammar in grammars:
        guides.guide(grammar, tokenizer, {2})
    assert len(guides._matchers._kept) == 2 and len(made) == 1


def bad() -> Iterator[Any]:
    deep = '{"type": "array", "items": ' * 80 + "{}" + "}" * 80
    cases = {
        "not JSON": ("json_schema", "{"),
        "not an object": ("json_schema", "[1]"),
        "unknown type": ("json_schema", '{"type": "strin"}'),
        "unsupported keyword": ("json_schema", '{"type": "array", "uniqueItems": true}'),
        "nothing satisfies it": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 4}'),
        "false": ("json_schema", "false"),
        "remote": ("json_schema", '{"$ref": "https://example.com/schema.json"}'),
        "a file": ("json_schema", '{"properties": {"a": {"$ref": "file:///etc/passwd"}}}'),
        "nowhere": ("json_schema", '{"$ref": "#/$defs/missing"}'),
        "deep": ("json_schema", deep),
        "deeper": ("json_schema", "[" * 100_000),
        "large": ("json_schema", json.dumps({"enum": ["x" * 300_000]})),
        "many patterns": ("json_schema", json.dumps({"anyOf": [{"type": "string", "pattern": ".*" * 99}] * 30})),
        "fine steps": ("json_schema", '{"type": "integer", "multipleOf": 99999989}'),
        "fine common steps": ("json_schema", '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'),
        "no steps": ("json_schema", '{"type": "number", "multipleOf": 1e300}'),
        "regex": ("regex", "(a"),
        "long regex": ("regex", ".*" * 20_000),
        "nothing": ("regex", "^$"),
        "lookahead": ("regex", "(?=a)b"),
        "brackets": ("regex", "(" * 5_000 + ")" * 5_000),
        "lark": ("lark", "start: missing"),
        "lark without start": ("lark", 'rule: "a"'),
        "lark brackets": ("lark", "start: " + "(" * 100_000),
        "long lark": ("lark", "start: A\nA: " + "/.*/ " * 20_000),
        "lark steps": ("lark", 'start: %json {"type": "integer", "multiple\\u004ff": 99999989}'),
        "lark schema": ("lark", "start: %json {'a': 1}"),
        "lark remote": ("lark", 'start: %json {"$ref": "https://example.com/schema.json"}'),
        "no choices": ("choice", "[]"),
        "numbers": ("choice", "[1]"),
        "empty choice": ("choice", '["a", ""]'),
    }
    return (pytest.param(*case, id=name) for name, case in cases.items())


@pytest.mark.parametrize(("kind", "value"), bad())
def test_what_cannot_be_followed_is_refused(tokenizer: Any, kind: Any, value: str) -> None:
    guides = Guides(len(tokenizer))
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"R817: structured output \({kind}\): \S") as error:
            guides.guide(Grammar(kind, value), tokenizer, {2})
    assert len(error.value.message) < 500 and "\n" not in error.value.message


@pytest.mark.parametrize("step", [7, 250, 0.01, 0.25, 1.5])
def test_steps_within_the_limit_are_kept(tokenizer: Any, step: float) -> None:
    schema = {"type": "number", "multipleOf": step, "minimum": -9999, "maximum": 9999}
    guides = Guides(len(tokenizer))
    for seed in range(6):
        guide = guides.guide(Grammar("json_schema", json.dumps(schema)), tokenizer, {2})
        value = Decimal(tokenizer.decode(walk(guide, seed)))
        assert value % Decimal(str(step)) == 0


class Broken:
    """A grammar that gets lost after three tokens."""

    end_ids = (2,)
    error: str | None = None

    def allowed(self, generated: Any) -> torch.Tensor | None:
        self.error = "lost" if len(generated) == 3 else None
        return None


def test_a_grammar_that_fails_ends_its_own_request_only(engine: Engine) -> None:
    free = ask(engine, request("free", max_new_tokens=10))
    lost = Answer()
    engine.add(request("lost", 5, ignore_eos=True), lost.events.append, Broken())
    finish(engine)
    assert (lost.last.finish_reason, lost.last.error, len(lost.ids)) == ("error", "lost", 3)
    assert free.last.finish_reason in ("length", "stop")


@pytest.mark.smollm2
def test_a_real_model_fills_in_a_form() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rayft.models.hub import fetch

    folder = fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = Engine(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    schema = {
        "type": "object",
        "properties": {"country": {"type": "string", "maxLength": 20}, "capital": {"type": "string", "maxLength": 20}},
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    text = "What is the capital of France? Answer in JSON with country and capital."
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
    asked = Request("1", tuple(ids), sampling=SamplingParams(max_new_tokens=60))
    answer = constrained(engine, Guides(engine.vocabulary), Grammar("json_schema", json.dumps(schema)), asked)
    finish(engine)
    form = json.loads(answer.text)
    assert (form["country"].casefold(), form["capital"].casefold()) == ("france", "paris")
