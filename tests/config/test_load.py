"""Reading: YAML 1.2, overrides, absolute paths, derived values, origins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml

from rayft.config import Recipe, Resolved, load
from rayft.errors import UsageError

MINIMAL = ["model.base=org/model", "data.train=my.jsonl"]


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_yaml_is_version_1_2_where_pyyaml_is_not(tmp_path: Path) -> None:
    text = "name: no\nmodel: {base: 2026-11-22}\ndata: {train: x.jsonl}\ntrain: {learning_rate: 1e-4, epochs: 1e1}\n"
    old = pyyaml.safe_load(text)
    assert old["name"] is False and old["train"]["learning_rate"] == "1e-4"

    recipe = load(write(tmp_path, text)).recipe

    assert recipe.name == "no"
    assert recipe.model.base == "2026-11-22"
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.epochs == 10.0


def test_a_file_is_optional() -> None:
    resolved = load(None, MINIMAL)
    assert resolved.recipe.model.base == "org/model"
    assert resolved.recipe.adapter is None


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("adapter.rank=8", "adapter.rank", 8),
        ("scale.workers=[1, 4]", "scale.workers", (1, 4)),
        ("scale.workers=auto", "scale.workers", "auto"),
        ("train.report_to=[]", "train.report_to", []),
        ("adapter={method: ia3}", "adapter.method", "ia3"),
        ("data.padding_free=false", "data.padding_free", False),
        ("data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("train.trainer_args.adam_beta2=0.95", "train.trainer_args", {"adam_beta2": 0.95}),
        ("data.validation=0.1", "data.validation", 0.1),
        ("storage=s3://bucket/runs", "storage", "s3://bucket/runs"),
        ("model.add_tokens=['<a>', '=']", "model.add_tokens", ["<a>", "="]),
        ("train.optim_args=a=1,b=2", "train.optim_args", "a=1,b=2"),
    ],
)
def test_overrides(override: str, path: str, value: Any) -> None:
    node: Any = load(None, [*MINIMAL, override]).recipe
    for part in path.split("."):
        node = getattr(node, part)
    assert node == value


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {base: a}\ndata: {train: x.jsonl}\nadapter: {rank: 4}\nseed: 1\n")
    recipe = load(file, ["adapter=null", "seed=2", "seed=3"]).recipe
    assert recipe.adapter is None
    assert recipe.seed == 3


def test_an_override_reaches_into_the_short_form_of_the_sources(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {base: a}\ndata: {train: x.jsonl}\n")
    (source,) = load(file, ["data.train.0.limit=5"]).recipe.data.train
    assert (Path(source.path).name, source.limit) == ("x.jsonl", 5)


def test_a_mapping_a_recipe_and_a_run_folder_are_sources_too(tmp_path: Path) -> None:
    data = {"model": {"base": "org/model"}, "data": {"train": Path("my.jsonl")}}
    from_mapping = load(data)
    assert from_mapping.recipe == load(None, MINIMAL).recipe
    assert load(from_mapping.recipe).recipe == from_mapping.recipe
    assert data == {"model": {"base": "org/model"}, "data": {"train": Path("my.jsonl")}}  # left as it was
    write(tmp_path, from_mapping.to_yaml())
    assert load(tmp_path).recipe == from_mapping.recipe


def test_paths_are_absolute_and_names_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "corpus").mkdir()
    recipe = load(
        {
            "model": {"base": "weights"},
            "adapter": {"init_from": "adapters/one"},
            "data": {
                "train": ["my.jsonl", "org/data-set", "s3://bucket/x.jsonl", "corpus"],
                "validation": "held_out.jsonl",
                "chat_template": "template.jinja",
                "function": "clean.py:row",
            },
            "train": {"loss_function": "package.module:loss"},
            "evaluate": {"metrics": ["exact_match", "score.py:f1"]},
        }
    ).recipe
    here = str(tmp_path)
    assert recipe.storage == f"{here}/runs"
    assert recipe.model.base == f"{here}/weights"
    assert recipe.adapter is not None and recipe.adapter.init_from == f"{here}/adapters/one"
    paths = [source.path for source in recipe.data.train]
    assert paths == [f"{here}/my.jsonl", "org/data-set", "s3://bucket/x.jsonl", f"{here}/corpus"]
    assert isinstance(recipe.data.validation, list)
    assert recipe.data.validation[0].path == f"{here}/held_out.jsonl"
    assert recipe.data.chat_template == f"{here}/template.jinja"
    assert recipe.data.function == f"{here}/clean.py:row"
    assert recipe.train.loss_function == "package.module:loss"
    assert recipe.evaluate.metrics == ["exact_match", f"{here}/score.py:f1"]


@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "org/model", "run:other", "s3://bucket/model"])
def test_names_of_models_stay_names(base: str) -> None:
    assert load(None, [*MINIMAL, f"model.base={base}"]).recipe.model.base == base


def test_a_template_text_is_not_a_path() -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert (
        load({"model": {"base": "m"}, "data": {"train": "x.jsonl", "chat_template": text}}).recipe.data.chat_template
        == text
    )


def test_derived_values() -> None:
    full = load(None, MINIMAL)
    assert full.recipe.train.learning_rate == 1e-5
    assert full.origin["train.learning_rate"] == "derived"
    assert load(None, [*MINIMAL, "adapter.rank=8"]).recipe.train.learning_rate == 2e-4
    clm = load(None, [*MINIMAL, "train.objective=clm"])
    assert (clm.recipe.data.train_on, clm.origin["data.train_on"]) == ("all", "derived")
    prompt = load(None, [*MINIMAL, "adapter.method=prompt"])
    assert (prompt.recipe.data.padding_free, prompt.origin["data.padding_free"]) == (False, "derived")


def test_origins() -> None:
    resolved = load(None, [*MINIMAL, "train.learning_rate=1e-3", "train.report_to=[]", "adapter={}"])
    origin = resolved.origin
    assert origin["model.base"] == origin["data.train.0.path"] == "user"
    assert origin["train.learning_rate"] == origin["train.report_to"] == "user"
    assert origin["data.train.0.format"] == origin["adapter.rank"] == origin["storage"] == "default"
    assert [path for path, _, _ in resolved.dry()] == list(origin)


def test_workers_of_a_run_get_the_same_recipe_from_plain_data() -> None:
    recipe = load(None, [*MINIMAL, "scale.workers=[1,2]", "adapter.method=lora", "train.trainer_args={a: [1]}"]).recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_relative_storage_is_refused_inside_a_ray_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match=r"R109.*'runs'.*temporary"):
        load(None, MINIMAL)
    assert isinstance(load(None, [*MINIMAL, f"storage={tmp_path}"]), Resolved)
    assert isinstance(load(None, [*MINIMAL, "storage=s3://bucket/runs"]), Resolved)
