"""Parameter groups, the pull towards the start, phases, and the exact state that a checkpoint holds."""

from __future__ import annotations

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from rayft.config.train import Phase
from rayft.models import adapters, load


def attached(folder, make_recipe, **sections):
    recipe = make_recipe(folder, **sections)
    return adapters.attach(load.load_base(recipe, folder), recipe, tokenizer=None), recipe


def test_loraplus_groups_are_pefts(tiny_model_folder, make_recipe):
    adapter = {"rank": 4, "loraplus_lr_ratio": 16, "modules_to_save": ["norm"]}
    model, recipe = attached(tiny_model_folder, make_recipe, adapter=adapter, train={"weight_decay": 0.1})
    groups = adapters.optimizer_groups(model, recipe)
    stock = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    expected = [group for group in stock.param_groups if group["params"]]
    for ours, theirs in zip(groups, expected, strict=True):
        assert (ours["lr"], ours["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
        assert list(map(id, ours["params"])) == list(map(id, theirs["params"]))
    assert {group["lr"] for group in groups} == {1e-2, 0.16}


def test_other_methods_leave_the_groups_to_the_trainer(tiny_model_folder, make_recipe):
    model, recipe = attached(tiny_model_folder, make_recipe, adapter={})
    assert adapters.optimizer_groups(model, recipe) is None


def test_pull_towards_the_start(tiny_model_folder, make_recipe, train_steps):
    model, _ = attached(tiny_model_folder, make_recipe, train={"l2_sp": 0.5})
    start = adapters.StartWeights(model)
    assert start.penalty(model, 0.5) == 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model)
    penalty = start.penalty(model, 0.5)
    by_hand = sum((p - before[name]).pow(2).sum() for name, p in model.named_parameters()) * 0.25
    torch.testing.assert_close(penalty, by_hand.detach(), check_dtype=False)
    penalty.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.5 * (parameter.detach() - before[name]), rtol=1e-4, atol=1e-8)
        parameter.grad.zero_()
    start.add_gradient(model, 0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 0.5 * (parameter.detach() - before[name]), rtol=1e-4, atol=1e-8)


PHASES = [{"last_blocks": 0}, {"start": 0.5, "last_blocks": 1}, {"start": 8, "patterns": ["."]}]


def test_phase_at_a_step():
    phases = [Phase(**phase) for phase in PHASES]
    chosen = [phases.index(adapters.phase_at(phases, step, 10)) for step in range(10)]
    assert chosen == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_phases_unfreeze_masters(tiny_model_folder, make_recipe, train_steps):
    sections = {"model": {"dtype": "bf16"}, "train": {"trainable": PHASES[:2]}}
    model, recipe = attached(tiny_model_folder, make_recipe, **sections)
    block = dict(model.model.layers[3].named_parameters())
    assert not any(p.requires_grad for p in block.values())
    assert {p.dtype for p in block.values()} == {torch.float32}  # no digit lost while it waits
    assert {p.dtype for p in model.model.layers[2].parameters()} == {torch.bfloat16}
    groups = adapters.optimizer_groups(model, recipe)
    in_optimizer = {id(p) for group in groups for p in group["params"]}
    assert in_optimizer >= {id(p) for p in block.values()}

    frozen = {name: p.detach().clone() for name, p in block.items()}
    train_steps(model, dtype="bf16")
    assert all(torch.equal(p, frozen[name]) for name, p in block.items())
    adapters.apply_phase(model, recipe.train.trainable[1])
    train_steps(model, dtype="bf16")
    assert not any(torch.equal(p, frozen[name]) for name, p in block.items())
    adapters.apply_phase(model, recipe.train.trainable[0])
    assert all(p.grad is None and not p.requires_grad for p in block.values())


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank": 4}},
        {"adapter": {"rank": 4, "init_lora_weights": "pissa_niter_4"}},
        {"adapter": {"method": "p_tuning"}},
        {"train": {"trainable": PHASES[:2]}},
        {},
    ],
    ids=["lora", "pissa", "p_tuning", "phases", "full"],
)
def test_training_state_continues_exactly(sections, tiny_model_folder, make_recipe, train_steps, tmp_path):
    whole, recipe = attached(tiny_model_folder, make_recipe, **sections)
    train_steps(whole, 2)
    torch.save(adapters.training_state(whole), tmp_path / "state.pt")
    adapters.save(whole, tmp_path / "export", load.load_tokenizer(recipe, tiny_model_folder))
    expected = train_steps(whole, 2)

    resumed, _ = attached(tiny_model_folder, make_recipe, **sections)
    adapters.load_training_state(resumed, torch.load(tmp_path / "state.pt", weights_only=True))
    assert train_steps(resumed, 2) == expected


def test_training_state_of_another_recipe_is_refused(tiny_model_folder, make_recipe):
    lora, _ = attached(tiny_model_folder, make_recipe, adapter={"rank": 4})
    full, _ = attached(tiny_model_folder, make_recipe)
    with pytest.raises(ValueError, match="other weights"):
        adapters.load_training_state(lora, adapters.training_state(full))


@pytest.mark.parametrize("sections", [{"adapter": {"rank": 4}}, {}, {"train": {"trainable": {"last_blocks": 1}}}])
def test_gradient_checkpointing_changes_no_gradient(sections, tiny_model_folder, make_recipe, batch):
    gradients = []
    for checkpointing in (False, True):
        train = sections.get("train", {}) | {"gradient_checkpointing": checkpointing}
        model, _ = attached(tiny_model_folder, make_recipe, **(sections | {"train": train}))
        model.train()
        assert model.is_gradient_checkpointing == checkpointing
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-7)
