"""`to_yaml` marks each value's origin and loads back to the same recipe, whatever the recipe holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.config import Resolved, load
from rayft.config.document import Document

# Whatever YAML could mistake for a number, a truth value, a date, a comment or a structure.
awkward = st.sampled_from(
    [
        "no",
        "1e-4",
        "null",
        "~",
        "2026-11-22",
        "0x1f",
        "a: b",
        "# c",
        "[x",
        "{y",
        "*z",
        "&q",
        "",
        " lead",
        "tab\there",
        "é 😀",
    ]
)
text = st.one_of(awkward, st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30))
template = st.sampled_from(
    [None, "{% for m in messages %}\n{{ m['content'] }}\n{% endfor %}\n", "{{ '\"' }}\t# {{ x }}"]
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e6, 1e6), text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)
number = st.floats(1e-9, 1e3)

recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"base": st.just("org/model"), "add_tokens": st.lists(text, max_size=3)}),
        "data": st.fixed_dictionaries(
            {
                "train": st.lists(
                    st.fixed_dictionaries(
                        {"path": st.just("my.jsonl")},
                        optional={"columns": st.dictionaries(text, text, max_size=3), "weight": number, "name": text},
                    ),
                    min_size=1,
                    max_size=3,
                )
            },
            optional={
                "validation": st.floats(0.01, 0.9),
                "chat_template": template,
                "chat_template_kwargs": st.dictionaries(st.sampled_from(["a", "no", "1"]), plain, max_size=3),
            },
        ),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "adapter": st.one_of(
            st.none(),
            st.fixed_dictionaries({}, optional={"rank": st.integers(1, 64), "target_modules": st.lists(text)}),
        ),
        "train": st.fixed_dictionaries(
            {}, optional={"learning_rate": number, "lr_scheduler_kwargs": st.dictionaries(text, plain, max_size=3)}
        ),
        "scale": st.fixed_dictionaries(
            {}, optional={"workers": st.sampled_from(["auto", 0, 3, [1, 4]]), "env": st.lists(text, max_size=2)}
        ),
    },
)


@settings(max_examples=80, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes)
def test_to_yaml_loads_back_to_the_same_recipe(data: dict[str, Any]) -> None:
    resolved = load(data)
    again = load(Document.parse(resolved.to_yaml()).data)
    assert again.recipe == resolved.recipe


def test_each_line_with_a_value_carries_its_origin(tmp_path: Path) -> None:
    resolved: Resolved = load(
        {"model": {"base": "m"}, "data": {"train": ["a.jsonl", "b.jsonl"]}, "adapter": {"rank": 4}}
    )
    lines = resolved.to_yaml().splitlines()
    marked = [line for line in lines if line.endswith(("# user", "# default", "# derived"))]
    assert len(marked) == len(resolved.origin)
    assert all(line.rstrip().endswith(":") for line in lines if line not in marked)
    for key, origin in [("rank: 4", "user"), ("alpha: 32.0", "default"), ("learning_rate: 0.0002", "derived")]:
        (line,) = [line for line in lines if line.strip().startswith(key)]
        assert line.endswith(f"# {origin}")
    file = tmp_path / "recipe.yaml"
    file.write_text(resolved.to_yaml())
    assert load(file).recipe == resolved.recipe
