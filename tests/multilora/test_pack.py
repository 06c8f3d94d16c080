"""A trial in a pack is the same trial alone: against stock PEFT, against `rayft train`, whoever shares the pack."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.errors import UsageError
from rayft.multilora.pack import Pack, StepReport
from rayft.train import fit
from tests.multilora.oracle import alone, prepared
from tests.train.conftest import Recipes
from tests.train.curves import Curve, assert_same, curve_of

STEPS = 8
SGD = {"train.optim": "sgd", "train.learning_rate": 0.05}
TRIALS: dict[str, dict[str, Any]] = {
    "r1": {"adapter.rank": 1, "adapter.alpha": 2, "seed": 1},
    "r2": {"adapter.rank": 2, "adapter.alpha": 32, "adapter.target_modules": ["q_proj", "v_proj"], **SGD},
    "r4": {"adapter.rank": 4, "adapter.dropout": 0.3, "train.global_batch_size": 2},
    "r8": {"adapter.rank": 8, "adapter.use_rslora": True, "train.global_batch_size": 1, "train.max_grad_norm": 0},
    "r16": {"adapter.rank": 16, "adapter.target_modules": ["gate_proj", "up_proj", "down_proj"], "seed": 5, **SGD},
    "r24": {"adapter.rank": 24, "adapter.loraplus_lr_ratio": 4, "train.learning_rate": 3e-4},
    "r32": {"adapter.rank": 32, "adapter.dropout": 0.1, "train.lr_scheduler_type": "linear", "train.weight_decay": 0.1},
    "r64": {"adapter.rank": 64, "adapter.alpha": 8, "adapter.peft_args": {"rank_pattern": {"q_proj": 5}}, **SGD},
}
Task = tuple[Recipe, Prepared]


@pytest.fixture
def task(recipe: Recipes) -> Callable[..., Task]:
    def make(**changes: Any) -> Task:
        return prepared(recipe(**{"train.micro_batch_size": 1, "train.max_steps": STEPS, **changes}))

    return make


def open_pack(task: Task) -> Pack:
    return Pack.open(task[0], task[0].model.base, device="cpu")


def run(pack: Pack, steps: dict[str, int], curves: dict[str, Curve] | None = None) -> dict[str, Curve]:
    """Go on until each named trial has done that many optimiser steps in all; they leave as they get there."""
    curves = {name: Curve([], []) for name in steps} if curves is None else curves
    while any(len(curves[name].losses) < count for name, count in steps.items()):
        for report in pack.step():
            assert not report.diverged
            curves[report.trial].losses.append(report.loss)
            curves[report.trial].grad_norms.append(report.grad_norm)
            if len(curves[report.trial].losses) == steps.get(report.trial):
                pack.leave(report.trial)
    return curves


def run_to_the_end(pack: Pack, name: str, curve: Curve | None = None, *, steps: int | None = None) -> Curve:
    """The curve of one trial that stays in the pack, whatever the others do."""
    curve = curve or Curve([], [])
    while pack.trials[name].step < (steps or pack.trials[name].total_steps):
        for report in pack.step():
            if report.trial == name:
                assert not report.diverged
                curve.losses.append(report.loss)
                curve.grad_norms.append(report.grad_norm)
    return curve


def first_gradients(pack: Pack, name: str) -> dict[str, torch.Tensor]:
    return {key: p.grad.clone() for key, p in pack.trials[name].parameters.items()}


@pytest.mark.long
def test_eight_different_trials_each_equal_stock_peft_alone(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {name: task(**changes) for name, changes in TRIALS.items()}
    pack = open_pack(tasks["r1"])
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    finish = Pack._finish_step

    def before_the_update(self: Pack, trial: Any) -> StepReport:
        gradients.setdefault(trial.name, first_gradients(self, trial.name))
        return finish(self, trial)

    monkeypatch.setattr(Pack, "_finish_step", before_the_update)
    names = list(tasks)
    for name in names[:5]:
        pack.join(name, *tasks[name])
    wanted = {name: STEPS for name in names} | {"r16": 5, "r2": 6}  # two leave half-way
    curves = {name: Curve([], []) for name in names}
    run(pack, {"r16": wanted["r16"], "r4": STEPS}, curves)
    for name in names[5:]:
        pack.join(name, *tasks[name])
    run(pack, wanted, curves)
    for name, one in tasks.items():
        expected = alone(*one, steps=wanted[name])
        assert_same(curves[name], expected.curve)
        assert curves[name].losses[0] != pytest.approx(curves[name].losses[-1], abs=1e-4), "nothing was learned"
        assert gradients[name].keys() == expected.first_gradients.keys()
        for key, gradient in expected.first_gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[name][key], gradient, rtol=1e-5, atol=1e-5 * max(scale, 1e-6))


@pytest.mark.parametrize("optimizer", [{}, SGD], ids=["adamw", "sgd"])
def test_a_trial_in_company_is_the_run_of_rayft_train(recipe: Recipes, optimizer: dict[str, Any]) -> None:
    plain = recipe(**{"data.validation": 0.2, "train.max_steps": 10, "train.eval_steps": 10, **optimizer})
    result = fit(plain, answer=None, quiet=True)
    pack = open_pack(prepared(plain))
    pack.join("it", *prepared(plain))
    pack.join("other", *prepared(recipe(**{"adapter.rank": 9, "data.validation": 0.2, "seed": 3})))
    assert_same(run_to_the_end(pack, "it"), curve_of(result.path))
    assert pack.evaluate("it")["validation_loss"] == pytest.approx(result.metrics["validation_loss"], abs=2e-6)


def test_nf4_base(task: Callable[..., Task]) -> None:
    changes = {"model.quantization": "nf4", "train.max_steps": 4}
    tasks = {name: task(**TRIALS[name], **changes) for name in ("r2", "r4", "r32")}
    pack = open_pack(tasks["r2"])
    for name, one in tasks.items():
        pack.join(name, *one)
        assert pack.evaluate(name) == {}
    curves = run(pack, {name: 4 for name in tasks})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    for name, one in tasks.items():
        assert_same(curves[name], alone(*one, steps=4, quantization=quantization).curve)


def test_gradient_checkpointing_changes_nothing(task: Callable[..., Task]) -> None:
    plain = {name: task(**TRIALS[name]) for name in ("r2", "r4")}
    again = {name: task(**TRIALS[name], **{"train.gradient_checkpointing": True}) for name in ("r2", "r4")}
    curves = []
    for tasks in (plain, again):
        pack = open_pack(tasks["r2"])
        for name, one in tasks.items():
            pack.join(name, *one)
        curves.append(run(pack, {"r2": 4, "r4": 4}))
    for name in plain:
        assert_same(curves[1][name], curves[0][name])


def test_paused_in_one_pack_and_continued_in_another(task: Callable[..., Task], tmp_path: Path) -> None:
    one, other = task(**TRIALS["r4"]), task(**TRIALS["r8"])
    straight = open_pack(one)
    straight.join("r4", *one)
    expected = run_to_the_end(straight, "r4")

    first = open_pack(other)
    first.join("r8", *other)
    first.join("r4", *one)
    curve = run_to_the_end(first, "r4", steps=3)
    first.step()  # half of the fourth step, which is done again
    torch.save(first.leave("r4"), tmp_path / "state.pt")
    second = open_pack(task(**TRIALS["r32"]))
    second.join("r32", *task(**TRIALS["r32"]))
    second.join("r4", *one, state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.trials["r4"].step == 3
    assert_same(run_to_the_end(second, "r4", curve), expected)
    for name, weight in straight.state("r4")["weights"].items():
        torch.testing.assert_close(second.state("r4")["weights"][name], weight, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_saved_adapters_load_in_stock_peft(task: Callable[..., Task], tmp_path: Path) -> None:
    tasks = {name: task(**TRIALS[name]) for name in ("r8", "r64")}
    pack = open_pack(tasks["r8"])
    for name, one in tasks.items():
        pack.join(name, *one)
    with torch.enable_grad():
        while pack.trials["r64"].step < 2:
            pack.step()
    ids = torch.randint(3, 300, (1, 12))
    pack.model.eval()
    for name, trial in pack.trials.items():
        pack.save(name, tmp_path / name)
        stock: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(trial.recipe.model.base), str(tmp_path / name)
        )
        with pack.mlora.route(pack._route([trial.slot], [12], {})):
            ours = pack.model(ids).logits
        torch.testing.assert_close(ours, stock(ids).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(ours, pack.model(ids).logits, atol=1e-4)
        slot = pack.bank.load(tmp_path / name)
        assert pack.bank.adapter(slot).content_hash() == pack.bank.adapter(trial.slot).content_hash()


@pytest.mark.long
def test_two_hundred_joins_and_leaves_leave_memory_flat(task: Callable[..., Task]) -> None:
    one = task(**TRIALS["r1"])
    pack = open_pack(one)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    for number in range(200):
        pack.join(f"t{number}", *one)
        if number % 20 == 0:
            pack.step()
        pack.leave(f"t{number}")
        if number in (20, 199):
            counts.append(tensors())
    assert counts[0] == counts[1]
    assert not pack.mlora.slots


def test_a_diverged_trial_leaves_alone(task: Callable[..., Task]) -> None:
    good, bad = task(**TRIALS["r2"]), task(**TRIALS["r8"])
    pack = open_pack(good)
    pack.join("r2", *good)
    pack.join("r8", *bad)
    with torch.no_grad():
        for parameter in pack.trials["r8"].parameters.values():
            parameter.fill_(torch.inf)
    before = pack.state("r8")["step"]
    reports = pack.step()
    assert [(report.trial, report.diverged) for report in reports] == [("r8", "its loss is not finite")]
    assert pack.trials["r8"].step == before
    pack.leave("r8")
    assert_same(run_to_the_end(pack, "r2", steps=4), alone(*good, steps=4).curve)


def test_out_of_memory_leaves_every_trial_as_it_was(task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {name: task(**TRIALS[name]) for name in ("r2", "r4")}
    pack = open_pack(tasks["r2"])
    for name, one in tasks.items():
        pack.join(name, *one)
    pack.step()
    forward = pack._forward
    monkeypatch.setattr(pack, "_forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        pack.step()
    monkeypatch.setattr(pack, "_forward", forward)
    curves = run(pack, {"r2": 3, "r4": 3})
    for name, one in tasks.items():
        expected = alone(*one, steps=3).curve
        assert_same(curves[name], expected)


def test_what_cannot_share_a_pack_is_refused_with_the_reason(recipe: Recipes, task: Callable[..., Task]) -> None:
    pack = open_pack(task())
    for changes, reason in (
        ({"adapter.use_dora": True}, "adapter.use_dora: DoRA divides"),
        ({"adapter": None}, "adapter: the weights themselves"),
        ({"adapter.modules_to_save": ["lm_head"]}, "adapter.modules_to_save: whole modules"),
        ({"adapter.init_lora_weights": "pissa_niter_4"}, "adapter.init_lora_weights: this start changes"),
        ({"adapter.peft_args": {"lora_bias": True}}, "adapter.peft_args: a pack knows rank_pattern"),
        ({"data.padding_free": False}, "data.padding_free: a pack lays"),
        ({"train.trainer_args": {"neftune_noise_alpha": 5}}, "train.trainer_args: a pack knows adam_beta1"),
        ({"model.quantization": "nf4"}, "model: the adapters of a pack share"),
        ({"train.gradient_checkpointing": True}, "train.gradient_checkpointing: the adapters of a pack share"),
    ):
        with pytest.raises(UsageError, match=reason) as refused:
            pack.join("x", *prepared(recipe(**changes)))
        assert refused.value.id == "R804"
    assert not pack.trials and not pack.mlora.slots
