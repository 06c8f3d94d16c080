"""A pack that spans two processes gives the curves of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from rayft.config.recipe import Recipe
from rayft.data import Prepared
from rayft.multilora.pack import Pack
from tests.multilora.oracle import prepared
from tests.train.conftest import Recipes
from tests.train.curves import Curve, assert_same

pytestmark = pytest.mark.long

Tasks = dict[str, tuple[Recipe, Prepared]]


def train(rank: int, workers: int, tasks: Tasks, folder: str) -> None:
    """Four steps of each task; worker 0 writes down the curves."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    recipe = next(iter(tasks.values()))[0]
    pack = Pack.open(recipe, recipe.model.base, device="cpu", rank=rank, workers=workers)
    for name, task in tasks.items():
        pack.join(name, *task)
    losses: dict[str, list[float]] = {name: [] for name in tasks}
    norms: dict[str, list[float]] = {name: [] for name in tasks}
    evaluated: dict[str, float] = {}
    while any(len(curve) < 4 for curve in losses.values()):
        for report in pack.step():
            losses[report.trial].append(report.loss)
            norms[report.trial].append(report.grad_norm)
            if report.step == 4:
                evaluated[report.trial] = pack.evaluate(report.trial)["validation_loss"]
    if rank == 0:
        torch.save((losses, norms, evaluated), f"{folder}/{workers}.pt")
    if workers > 1:
        dist.destroy_process_group()


def test_two_processes_train_the_same_trials(recipe: Recipes, tmp_path: Path) -> None:
    common = {"train.micro_batch_size": 1, "data.validation": 0.2, "train.optim": "sgd", "train.learning_rate": 0.05}
    tasks = {
        "one": prepared(recipe(**common)),
        "odd": prepared(recipe(**common, **{"train.global_batch_size": 3, "adapter.rank": 7})),
    }
    train(0, 1, tasks, str(tmp_path))
    processes.spawn(train, (2, tasks, str(tmp_path)), nprocs=2)
    alone, together = (torch.load(tmp_path / f"{workers}.pt") for workers in (1, 2))
    for name in tasks:
        one, two = (Curve(losses[name][:4], norms[name][:4]) for losses, norms, _ in (alone, together))
        assert_same(two, one)
        assert abs(together[2][name] - alone[2][name]) < 1e-5
