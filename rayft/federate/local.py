"""Local training: what a worker is made from, and the clients of a block as one pack of adapters on the base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rayft.config.recipe import Recipe
from rayft.federate.check import trains_alone
from rayft.federate.clients import Client, Clients, reason_of
from rayft.federate.data import ClientData
from rayft.federate.messages import Alphas, Answer
from rayft.federate.start import start, trained
from rayft.federate.task import Block, Local, Opening, Task
from rayft.models.load import torch_dtype
from rayft.multilora.bank import AdapterState
from rayft.multilora.pack import Pack
from rayft.multilora.start import initial

if TYPE_CHECKING:
    from rayft.data.examples import Examples


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

    def make(self) -> Local:
        torch.set_num_threads(self.threads)
        if not trains_alone(Recipe.model_validate(self.recipe)):
            return PackLocal(self)
        from rayft.federate.alone import AloneLocal

        return AloneLocal(self)


class PackLocal(Clients):
    """Keeps base, tokenizer and data of all clients that come by. See `task.Local`."""

    def __init__(self, job: LocalJob) -> None:
        recipe = Recipe.model_validate(job.recipe)
        self.pack = Pack.open(recipe, job.base, device=job.device)
        super().__init__(job, recipe, self.pack.tokenizer)
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
        self.ready_for(task)
        try:
            return self._train(task, block, block.clients)
        except Exception as error:
            self._clear()
            if len(block.clients) == 1:
                return [Answer(block.clients[0], error=reason_of(error))]
        return [answer for client in block.clients for answer in self._alone(task, block, client)]

    def _alone(self, task: Task, block: Block, client: int) -> list[Answer]:
        try:
            return self._train(task, block, [client])
        except Exception as error:
            self._clear()
            return [Answer(client, error=reason_of(error))]

    def _train(self, task: Task, block: Block, clients: Sequence[int]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        at_work: dict[str, Client] = {}
        for number in clients:
            data, _ = self.examples(number)
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

    def _begin(self, task: Task, block: Block, number: int, data: ClientData) -> Client:
        setting, federate = task.setting, self.federate
        kept = self.kept(number, block.kept.get(number))
        begun = start(federate, task.server.state, setting.alphas, setting.rank_of(number)) | kept.get("personal", {})
        names = trained(federate, begun, setting.number)
        recipe, adapter = self.local_recipe(task, number), AdapterState(copy.copy(self._config), begun)
        trial = self.pack.admit(str(number), recipe, data, adapter, names)
        self.take_up(trial.optimizer, task, kept)
        trial.adjust = self.adjustment(task, begun, kept)
        return Client(number, begun, kept)

    def _end(self, task: Task, name: str, client: Client) -> Answer:
        if client.error:
            return Answer(client.number, error=client.error)
        trial = self.pack.trials[name]
        after = {key: parameter.detach().to("cpu", copy=True) for key, parameter in trial.parameters.items()}
        optimizer = trial.state()["optimizer"]
        examples, steps, tokens = len(trial.examples), trial.step, trial.tokens
        found = self.answer(task, client, after, optimizer, examples=examples, steps=steps, tokens=tokens)
        self.pack.drop(name)
        return found

    # Evaluation

    def loss_of(self, state: dict[str, torch.Tensor], examples: Examples, micro_batch_size: int) -> float:
        slot = self.pack.bank.load(AdapterState(copy.copy(self._config), state))
        try:
            return self.pack.loss_on(slot, examples, micro_batch_size)
        finally:
            self.pack.bank.unload(slot)

    def ready_for(self, task: Task) -> None:
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
