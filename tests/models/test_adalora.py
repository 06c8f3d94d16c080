"""AdaLoRA in our own step equals PEFT's, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rayft.models import adapters, load
from rayft.models.save import load_trained

ADALORA = {"method": "adalora", "rank": 3, "peft_args": {"tinit": 1, "tfinal": 3, "orth_reg_weight": 0.3}}
STEPS = 8


def ours(folder, make_recipe):
    recipe = make_recipe(folder, adapter=ADALORA)
    return adapters.attach(load.load_base(recipe, folder), recipe, tokenizer=None, total_steps=STEPS)


def our_steps(model, batch, first, last, optimizer):
    losses = []
    for step in range(first, last):
        loss = model(**batch).loss + adapters.orthogonal_penalty(model)
        loss.backward()
        optimizer.step()
        adapters.update_budget(model, step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_penalty_and_budget_equal_pefts_own_loop(tiny_model_folder, make_recipe, batch):
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_r=5,
        target_r=3,
        lora_alpha=32,
        lora_dropout=0.0,
        tinit=1,
        tfinal=3,
        total_step=STEPS,
        orth_reg_weight=0.3,
    )
    torch.manual_seed(17)
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32), config)
    optimizer = adamw(stock)
    expected = []
    for step in range(STEPS):
        loss = stock(**batch).loss  # PEFT adds the penalty here
        loss.backward()
        optimizer.step()
        stock.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        expected.append(loss.item())
    model = ours(tiny_model_folder, make_recipe)
    assert our_steps(model, batch, 0, STEPS, adamw(model)) == pytest.approx(expected, abs=1e-6)
    assert model.peft_config["default"].rank_pattern == stock.peft_config["default"].rank_pattern
    kept = sum(sum(ranks) for ranks in model.peft_config["default"].rank_pattern.values())
    assert kept == 3 * 28


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resumed_equals_uninterrupted(stop, tiny_model_folder, make_recipe, batch, tmp_path):
    whole = ours(tiny_model_folder, make_recipe)
    expected = our_steps(whole, batch, 0, STEPS, adamw(whole))

    recipe = make_recipe(tiny_model_folder, adapter=ADALORA)
    first = ours(tiny_model_folder, make_recipe)
    optimizer = adamw(first)
    losses = our_steps(first, batch, 0, stop, optimizer)
    adapters.save(first, tmp_path / "export", load.load_tokenizer(recipe, tiny_model_folder))  # must disturb nothing
    torch.save([adapters.training_state(first), optimizer.state_dict()], tmp_path / "state.pt")

    second = ours(tiny_model_folder, make_recipe)
    state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    adapters.load_training_state(second, state)
    optimizer = adamw(second)
    optimizer.load_state_dict(optimizer_state)
    assert losses + our_steps(second, batch, stop, STEPS, optimizer) == expected


def test_pruned_ranks_survive_saving(tiny_model_folder, make_recipe, batch, logits_of, tmp_path):
    recipe = make_recipe(tiny_model_folder, adapter=ADALORA)
    model = ours(tiny_model_folder, make_recipe)
    our_steps(model, batch, 0, STEPS, adamw(model))
    adapters.save(model, tmp_path, load.load_tokenizer(recipe, tiny_model_folder))
    loaded, _ = load_trained(tmp_path, dtype="fp32")
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)
