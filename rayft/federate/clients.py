"""What all local training has in common: whose examples are whose, what clients keep, how strategies bend gradients."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from rayft.config.recipe import Recipe
from rayft.data.micro_batches import MICRO_TOKENS
from rayft.errors import RayftError
from rayft.federate.data import ClientData, Divided, Pinned, Shares, held_out
from rayft.federate.messages import Answer
from rayft.federate.start import sent, start
from rayft.federate.state import State
from rayft.federate.task import Block, Measured, Task, kept_file
from rayft.runs.storage import locate, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayft.data.examples import Examples
    from rayft.federate.local import LocalJob

Adjust = Callable[[dict[str, torch.Tensor]], None]
"""Changes gradients in place; given the trained tensors by name."""


@dataclass
class Client:
    """A client at work."""

    number: int
    begun: State
    kept: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    error: str = ""


class Clients:
    """The clients that come by at a worker, beside the model. Subclasses train them and measure losses."""

    def __init__(self, job: LocalJob, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        from rayft.train.preparation import data_here

        assert recipe.federate is not None
        self.job, self.recipe, self.federate = job, recipe, recipe.federate
        data = data_here(job.data_folder, job.data_hash) if job.data_folder else None
        self.holdings: Divided | Pinned
        if job.pinned is not None:
            self.holdings = Pinned(recipe, tokenizer, job.pinned, data)
        else:
            assert data is not None
            self.holdings = Divided(data, Shares.read(job.shares))

    def ready_for(self, task: Task) -> None:
        """Called before anything that a task asks for."""

    def loss_of(self, state: dict[str, torch.Tensor], examples: Examples, micro_batch_size: int) -> float:
        """Loss of the model with these trained tensors: sum of weight x token loss over the sum of weights."""
        raise NotImplementedError

    # Training

    def local_recipe(self, task: Task, number: int) -> Recipe:
        """What a client trains by in a round."""
        train = self.recipe.train.model_copy(
            update={
                "max_steps": self.federate.local_steps,
                "epochs": self.federate.local_epochs or 1.0,
                "learning_rate": task.learning_rate,
                "lr_scheduler_type": "constant",
                "lr_scheduler_kwargs": {},
                "warmup_steps": 0.0,
            }
        )
        seed = seed_of(self.recipe.seed, number, task.setting.number)
        return self.recipe.model_copy(update={"train": train, "seed": seed})

    def take_up(self, optimizer: Any, task: Task, kept: dict[str, Any]) -> None:
        """Let an optimiser that was just made go on where the client's was, at the rate of this round."""
        if self.federate.optimizer_state != "keep" or "optimizer" not in kept:
            return
        optimizer.load_state_dict(kept["optimizer"])
        for group in optimizer.param_groups:
            factor = group["lr"] / kept["learning_rate"]
            group["lr"] = group["initial_lr"] = task.learning_rate * factor

    def adjustment(self, task: Task, begun: State, kept: dict[str, Any]) -> Adjust | None:
        """fedprox: the gradient of mu / 2 |w - w_t|^2 (arXiv 1812.06127). scaffold: c - c_k (arXiv 1910.06378)."""
        if self.federate.strategy == "fedprox" and self.federate.mu:
            mu = self.federate.mu

            def pull(parameters: dict[str, torch.Tensor]) -> None:
                for name, parameter in parameters.items():
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - begun[name].to(parameter), alpha=mu)

            return pull
        if self.federate.strategy == "scaffold":
            server, own = task.server.control, kept.get("control", {})

            def correct(parameters: dict[str, torch.Tensor]) -> None:
                for name, parameter in parameters.items():
                    assert parameter.grad is not None
                    if name in server:
                        parameter.grad.add_(server[name].to(parameter))
                    if name in own:
                        parameter.grad.sub_(own[name].to(parameter))

            return correct
        return None

    def answer(
        self,
        task: Task,
        client: Client,
        after: dict[str, torch.Tensor],
        optimizer: dict[str, Any],
        *,
        examples: int,
        steps: int,
        tokens: int,
    ) -> Answer:
        """The client's answer; what it keeps for later rounds goes to its file.

        after: the tensors it trained, in host memory. optimizer: its state.
        """
        facts = {"loss": fmean(client.losses), "steps": float(steps), "tokens": float(tokens)}
        keep: dict[str, Any] = {}
        control: dict[str, torch.Tensor] = {}
        if self.federate.optimizer_state == "keep":
            keep |= {"optimizer": optimizer, "learning_rate": task.learning_rate}
        if self.federate.method == "fedsa":
            keep["personal"] = {key: tensor for key, tensor in after.items() if key not in sent(self.federate, after)}
        if self.federate.strategy == "scaffold":
            former = client.kept.get("control", {})
            for key, tensor in after.items():
                # c_k+ - c_k = -c + (w_t - y) / (K rate), option II
                moved = (client.begun[key].double() - tensor.double()) / (steps * task.learning_rate)
                control[key] = moved - task.server.control[key] if key in task.server.control else moved
            keep["control"] = {key: former[key] + t if key in former else t for key, t in control.items()}
        if keep:
            buffer = io.BytesIO()
            torch.save(keep, buffer)
            write_atomic(kept_file(self.job.run, client.number, task.setting.number), buffer.getvalue())
        return Answer(client.number, {key: after[key] for key in sent(self.federate, after)}, examples, control, facts)

    # Evaluation

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        self.ready_for(task)
        found = []
        for number in block.clients:
            _, data = self.examples(number)
            if not data.indices:
                continue
            personal = self.kept(number, block.kept.get(number)).get("personal", {})
            begun = start(self.federate, task.server.state, task.setting.alphas, task.setting.rank_of(number))
            loss = self._loss({**begun, **personal}, data.split("train"))
            found.append(Measured(number, loss, len(data.indices)))
        return found

    def central(self, task: Task) -> float | None:
        validation = self.holdings.validation
        if validation is None:
            return None
        self.ready_for(task)
        return self._loss(dict(task.server.state), validation)

    def _loss(self, state: dict[str, torch.Tensor], examples: Any) -> float:
        wanted = self.recipe.train.micro_batch_size
        size = wanted if wanted != "auto" else max(1, MICRO_TOKENS[self.job.device] // int(examples.lengths.max()))
        return self.loss_of(state, examples, size)

    # What it has at hand

    def examples(self, client: int) -> tuple[ClientData, ClientData]:
        """(what it trains on, what it holds out)."""
        data, indices = self.holdings.of(client)
        parts = held_out(indices, self.federate.evaluate.holdout, self.recipe.seed, client)
        train, out = (ClientData(data.folder, data.hash, tuple(map(int, part))) for part in parts)
        return train, out

    def kept(self, client: int, number: int | None) -> dict[str, Any]:
        if number is None:
            return {}
        data = locate(kept_file(self.job.run, client, number)).read()
        kept: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return kept


def seed_of(seed: int, client: int, number: int) -> int:
    """Of a client's data order and dropout in a round."""
    digest = hashlib.blake2b(f"{seed}/{client}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def reason_of(error: Exception) -> str:
    if isinstance(error, RayftError):
        return f"{error.id}: {error.message}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
