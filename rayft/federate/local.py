"""Local training: the clients of a block as one pack of adapters on the resident base."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from rayft.config.recipe import Recipe
from rayft.data.micro_batches import MICRO_TOKENS
from rayft.errors import RayftError
from rayft.federate.data import ClientData, Divided, Pinned, Shares, held_out
from rayft.federate.messages import Alphas, Answer
from rayft.federate.start import sent, start, trained
from rayft.federate.state import State
from rayft.federate.task import Block, Measured, Opening, Task, kept_file
from rayft.models.load import torch_dtype
from rayft.multilora.bank import AdapterState
from rayft.multilora.pack import Pack
from rayft.multilora.start import initial
from rayft.runs.storage import locate, write_atomic

Adjust = Callable[[dict[str, torch.Tensor]], None]
"""Changes gradients in place; given the trained tensors by name."""


@dataclass(frozen=True)
class LocalJob:
    """Everything that local training needs, as plain data. Paths are readable on every node."""

    recipe: dict[str, Any]
    run: str
    base: str
    device: str
    """cpu or gpu."""
    threads: int
    data_folder: str
    data_hash: str
    shares: str
    """`partition.npz`."""
    init_from: str | None = None
    pinned: dict[int, dict[str, Any]] | None = None
    """Client -> its source, where data is pinned to this worker's node; `data_folder` then holds validation data."""

    def make(self) -> PackLocal:
        return PackLocal(self)


@dataclass
class _Client:
    """A client at work in the pack."""

    number: int
    begun: State
    kept: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    error: str = ""


class PackLocal:
    """Keeps base, tokenizer and data of all clients that come by. See `task.Local`."""

    def __init__(self, job: LocalJob) -> None:
        from rayft.train.preparation import data_here

        torch.set_num_threads(job.threads)
        self.job = job
        self.recipe = Recipe.model_validate(job.recipe)
        assert self.recipe.federate is not None
        self.federate = self.recipe.federate
        self.pack = Pack.open(self.recipe, job.base, device=job.device)
        data = data_here(job.data_folder, job.data_hash) if job.data_folder else None
        self.holdings: Divided | Pinned
        if job.pinned is not None:
            self.holdings = Pinned(self.recipe, self.pack.tokenizer, job.pinned, data)
        else:
            assert data is not None
            self.holdings = Divided(data, Shares.read(job.shares))
        self._under = -1
        self._config: Any = None

    def open(self) -> Opening:
        begun = initial(self.pack.model, self.recipe, self.pack.tokenizer, self.job.init_from)
        self._config = begun.config
        alphas = Alphas(begun.config.lora_alpha, begun.config.use_rslora, dict(begun.config.alpha_pattern))
        state = {name: tensor.detach().float().cpu().clone() for name, tensor in begun.tensors.items()}
        return Opening(state, alphas, begun.config, self.pack.tokenizer, self.pack.model.origin)

    # Training

    def train(self, task: Task, block: Block) -> list[Answer]:
        """All clients at once. Where that raises, each alone, so that only the one at fault is left out."""
        self._lay_under(task)
        try:
            return self._train(task, block, block.clients)
        except Exception as error:
            self._clear()
            if len(block.clients) == 1:
                return [Answer(block.clients[0], error=_reason(error))]
        return [answer for client in block.clients for answer in self._alone(task, block, client)]

    def _alone(self, task: Task, block: Block, client: int) -> list[Answer]:
        try:
            return self._train(task, block, [client])
        except Exception as error:
            self._clear()
            return [Answer(client, error=_reason(error))]

    def _train(self, task: Task, block: Block, clients: Sequence[int]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        at_work: dict[str, _Client] = {}
        for number in clients:
            data, _ = self._examples(number)
            if data.indices:
                at_work[str(number)] = self._begin(task, block, number, data)
            else:
                answers[number] = Answer(number, error="it has no examples")
        while any(not self.pack.trials[name].finished for name in at_work if not at_work[name].error):
            for report in self.pack.step():
                client = at_work[report.trial]
                client.losses.append(report.loss)
                if report.diverged:
                    client.error = f"at local step {report.step + 1} {report.diverged}"
                    self.pack.drop(report.trial)
        for name, client in at_work.items():
            answers[client.number] = self._end(task, name, client)
        return [answers[number] for number in clients]

    def _begin(self, task: Task, block: Block, number: int, data: ClientData) -> _Client:
        setting, federate = task.setting, self.federate
        rank = setting.rank_of(number)
        kept = self._kept(number, block.kept.get(number))
        begun = start(federate, task.server.state, setting.alphas, rank) | kept.get("personal", {})
        names = trained(federate, begun, setting.number)
        train = self.recipe.train.model_copy(
            update={
                "max_steps": federate.local_steps,
                "epochs": federate.local_epochs or 1.0,
                "learning_rate": task.learning_rate,
                "lr_scheduler_type": "constant",
                "lr_scheduler_kwargs": {},
                "warmup_steps": 0.0,
            }
        )
        recipe = self.recipe.model_copy(
            update={"train": train, "seed": seed_of(self.recipe.seed, number, setting.number)}
        )
        config = copy.copy(self._config)
        trial = self.pack.admit(str(number), recipe, data, AdapterState(config, begun), names)
        if federate.optimizer_state == "keep" and "optimizer" in kept:
            trial.optimizer.load_state_dict(kept["optimizer"])
            for group in trial.optimizer.param_groups:
                factor = group["lr"] / kept["learning_rate"]
                group["lr"] = group["initial_lr"] = task.learning_rate * factor
        trial.adjust = self._adjustment(task, begun, kept)
        return _Client(number, begun, kept)

    def _adjustment(self, task: Task, begun: State, kept: dict[str, Any]) -> Adjust | None:
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

    def _end(self, task: Task, name: str, client: _Client) -> Answer:
        """The client's answer; what it keeps for later rounds goes to its file."""
        if client.error:
            return Answer(client.number, error=client.error)
        trial = self.pack.trials[name]
        after = {key: parameter.detach().to("cpu", copy=True) for key, parameter in trial.parameters.items()}
        facts = {"loss": fmean(client.losses), "steps": float(trial.step), "tokens": float(trial.tokens)}
        keep: dict[str, Any] = {}
        control: dict[str, torch.Tensor] = {}
        if self.federate.optimizer_state == "keep":
            keep |= {"optimizer": trial.state()["optimizer"], "learning_rate": task.learning_rate}
        if self.federate.method == "fedsa":
            keep["personal"] = {key: tensor for key, tensor in after.items() if key not in sent(self.federate, after)}
        if self.federate.strategy == "scaffold":
            former = client.kept.get("control", {})
            for key, tensor in after.items():
                # c_k+ - c_k = -c + (w_t - y) / (K rate), option II
                moved = (client.begun[key].double() - tensor.double()) / (trial.step * task.learning_rate)
                control[key] = moved - task.server.control[key] if key in task.server.control else moved
            keep["control"] = {key: former[key] + t if key in former else t for key, t in control.items()}
        if keep:
            buffer = io.BytesIO()
            torch.save(keep, buffer)
            write_atomic(kept_file(self.job.run, client.number, task.setting.number), buffer.getvalue())
        self.pack.drop(name)
        state = {key: after[key] for key in sent(self.federate, after)}
        return Answer(client.number, state, len(trial.examples), control, facts)

    # Evaluation

    def evaluate(self, task: Task, block: Block) -> list[Measured]:
        self._lay_under(task)
        found = []
        for number in block.clients:
            _, data = self._examples(number)
            if not data.indices:
                continue
            personal = self._kept(number, block.kept.get(number)).get("personal", {})
            begun = start(self.federate, task.server.state, task.setting.alphas, task.setting.rank_of(number))
            loss = self._loss({**begun, **personal}, data.split("train"))
            found.append(Measured(number, loss, len(data.indices)))
        return found

    def central(self, task: Task) -> float | None:
        validation = self.holdings.validation
        if validation is None:
            return None
        self._lay_under(task)
        return self._loss(dict(task.server.state), validation)

    def _loss(self, state: dict[str, torch.Tensor], examples: Any) -> float:
        slot = self.pack.bank.load(AdapterState(copy.copy(self._config), state))
        wanted = self.recipe.train.micro_batch_size
        size = wanted if wanted != "auto" else max(1, MICRO_TOKENS[self.job.device] // int(examples.lengths.max()))
        try:
            return self.pack.loss_on(slot, examples, size)
        finally:
            self.pack.bank.unload(slot)

    # What it has at hand

    def _examples(self, client: int) -> tuple[ClientData, ClientData]:
        """(what it trains on, what it holds out)."""
        data, indices = self.holdings.of(client)
        parts = held_out(indices, self.federate.evaluate.holdout, self.recipe.seed, client)
        train, out = (ClientData(data.folder, data.hash, tuple(map(int, part))) for part in parts)
        return train, out

    def _kept(self, client: int, number: int | None) -> dict[str, Any]:
        if number is None:
            return {}
        data = locate(kept_file(self.job.run, client, number)).read()
        kept: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        return kept

    def _lay_under(self, task: Task) -> None:
        """The accumulator, once per round, in the number format of the computation."""
        if self._config is None:
            self.open()
        if self._under == task.server.rounds:
            return
        dtype = torch_dtype(self.pack.dtype)
        self.pack.mlora.lay_under(
            {
                module: (A.to(self.pack.model.device, dtype), B.to(self.pack.model.device, dtype))
                for module, (B, A) in task.server.accumulator.items()
            }
        )
        self._under = task.server.rounds

    def _clear(self) -> None:
        for name in list(self.pack.trials):
            self.pack.drop(name)


def seed_of(seed: int, client: int, number: int) -> int:
    """Of a client's data order and dropout in a round."""
    digest = hashlib.blake2b(f"{seed}/{client}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _reason(error: Exception) -> str:
    if isinstance(error, RayftError):
        return f"{error.id}: {error.message}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
