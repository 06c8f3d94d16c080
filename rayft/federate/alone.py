"""Local training of one client at a time, by the step of `rayft train`: the weights themselves, or an adapter that
cannot share a pack. The model stays loaded, and is the server's again before each client."""

from __future__ import annotations

import gc
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rayft.config.recipe import Recipe
from rayft.data.micro_batches import MicroBatches, micro_batch_size, validation_batches
from rayft.data.schedule import StepSchedule
from rayft.federate.clients import Adjust, Client, Clients, reason_of
from rayft.federate.data import ClientData
from rayft.federate.messages import Alphas, Answer, Server
from rayft.federate.state import State
from rayft.federate.task import Block, Opening, Task
from rayft.models import adapters, hub, load
from rayft.objectives import causal
from rayft.runs import reference
from rayft.train import loader, methods, strategy
from rayft.train.speed import Speed
from rayft.train.trainer import RayftTrainer
from rayft.train.worker import quiet

if TYPE_CHECKING:
    from rayft.data.examples import Examples
    from rayft.federate.local import LocalJob


class Broken(Exception):
    """A client's loss or gradient is not finite."""


class AloneLocal(Clients):
    """Keeps the model, its tokenizer and the data of all clients that come by. See `task.Local`."""

    def __init__(self, job: LocalJob) -> None:
        recipe = Recipe.model_validate(job.recipe)
        place = "cpu" if job.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        quiet()
        self.model, self.tokenizer = trainable_model(recipe, job.base, job.init_from, place)
        causal.install(self.model, loss_function=causal.own_loss(recipe.train.loss_function))
        super().__init__(job, recipe, self.tokenizer)
        self.dtype = load.dtype_of(recipe, job.device)
        self._forward = self.model.forward

    def open(self) -> Opening:
        return Opening(self._trained(), Alphas(1.0))

    # Training

    def train(self, task: Task, block: Block) -> list[Answer]:
        return [self._one(task, block, client) for client in block.clients]

    def _one(self, task: Task, block: Block, number: int) -> Answer:
        try:
            data, _ = self.examples(number)
            if not data.indices:
                return Answer(number, error="it has no examples")
            return self._train(task, Client(number, task.server.state, self.kept(number, block.kept.get(number))), data)
        except Broken as error:
            return Answer(number, error=str(error))
        except Exception as error:
            return Answer(number, error=reason_of(error))
        finally:
            self.model.forward = self._forward  # the Trainer lays its autocast around it, client by client
            self.model.zero_grad(set_to_none=True)
            gc.collect()  # trainer, optimiser and its moments refer to each other in circles

    def _train(self, task: Task, client: Client, data: ClientData) -> Answer:
        put(self.model, client.begun)
        recipe = self.local_recipe(task, client.number)
        more = {"save_strategy": "no", "logging_steps": 1}
        train = recipe.train.model_copy(update={"trainer_args": {**recipe.train.trainer_args, **more}})
        recipe = recipe.model_copy(update={"train": train})
        examples = data.split("train")
        assert examples is not None
        schedule = StepSchedule.of(recipe, examples)
        size = micro_batch_size(train.micro_batch_size, schedule, 1, self.job.device)
        batches = MicroBatches(schedule, 1, 0, size)
        with tempfile.TemporaryDirectory(prefix="rayft-client-") as scratch:
            arguments = strategy.training_arguments(
                recipe,
                schedule,
                folder=scratch,
                dtype=self.dtype,
                device=self.job.device,
                micro_batch_size=size,
                micro_steps=batches.micro_steps,
                validation=False,
            )
            method = methods.MethodCallback(self.model, recipe, schedule.total_steps)
            listener = Listener(client)
            trainer = ClientTrainer(
                take_up=lambda optimizer: self.take_up(optimizer, task, client.kept),
                adjust=self.adjustment(task, client.begun, client.kept),
                recipe=recipe,
                schedule=schedule,
                loader=loader.train_loader(
                    examples,
                    batches,
                    train,
                    padding_free=recipe.data.padding_free,
                    pad_token_id=self.tokenizer.pad_token_id,
                    pin_memory=self.job.device == "gpu",
                ),
                validation=None,
                penalty=method.penalty,
                control=listener,
                model=self.model,
                args=arguments,
                processing_class=self.tokenizer,
                callbacks=[method],
            )
            trainer.train()
        return self.answer(
            task,
            client,
            self._trained(),
            trainer.optimizer.state_dict(),
            examples=len(examples),
            steps=schedule.total_steps,
            tokens=schedule.tokens_before(schedule.total_steps),
        )

    def _trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors as they are now, fp32 in host memory."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in _trainable(self.model).items()}

    # Evaluation

    def loss_of(self, state: dict[str, torch.Tensor], examples: Examples, micro_batch_size: int) -> float:
        put(self.model, state)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        free, pad = self.recipe.data.padding_free, self.tokenizer.pad_token_id
        with torch.no_grad(), load.compute_context(self.dtype, self.job.device):
            for batch in validation_batches(examples, 1, 0, micro_batch_size, padding_free=free, pad_token_id=pad):
                inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
                sums[0] += self.model(**inputs).loss.double().cpu()
                sums[1] += batch["loss_weights"].double().sum()
        return float(sums[0] / sums[1])


class ClientTrainer(RayftTrainer):
    """The trainer of a run, with a client's own optimiser state and its strategy's change of gradients."""

    def __init__(self, *, take_up: Any, adjust: Adjust | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.take_up, self.adjust = take_up, adjust
        if adjust is not None and not self.args.max_grad_norm:
            self.add_callback(_Before(self._adjusted))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        self.take_up(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._adjusted()
        return super()._clip_grad_norm(model)

    def _adjusted(self) -> None:
        if self.adjust is not None:
            self.adjust({name: p for name, p in _trainable(self.model).items() if p.grad is not None})


class _Before(TrainerCallback):
    """Where nothing is clipped, gradients are changed right before the optimiser's step."""

    def __init__(self, adjusted: Any) -> None:
        self.adjusted = adjusted

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.adjusted()


class Listener:
    """Hears of each step, in the place of the callback that reports a run."""

    def __init__(self, client: Client) -> None:
        self.client, self.speed = client, Speed()

    def on_train_log(self, step: int, logs: dict[str, float]) -> None:
        """Raises Broken."""
        for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise Broken(f"at local step {step} its {what} is not finite")
        self.client.losses.append(logs["loss"])


class Exporter:
    """Writes what a server deploys as `rayft train` would: a stock model, or a stock adapter. Keeps the model."""

    def __init__(self, recipe: Recipe, base: str, init_from: str | None) -> None:
        self.recipe, self.base, self.init_from = recipe, base, init_from
        self._model: tuple[Any, PreTrainedTokenizerBase] | None = None

    def __call__(self, opening: Opening, server: Server, folder: Path) -> None:
        if self._model is None:
            self._model = trainable_model(self.recipe, self.base, self.init_from, "cpu")
        model, tokenizer = self._model
        put(model, server.state)
        adapters.save(model, folder, tokenizer)


def trainable_model(
    recipe: Recipe, base: str, init_from: str | None, place: str
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a recipe, ready to train, and its tokenizer. The same everywhere: its start depends on the seed."""
    folder = hub.fetch(base, recipe.model.revision)
    tokenizer = load.load_tokenizer(recipe, folder)
    model = load.load_base(recipe, folder, device=place)
    init = reference.on_this_machine(init_from) if init_from else None
    return adapters.attach(model, recipe, tokenizer, init_from=init), tokenizer


def put(model: nn.Module, state: State) -> None:
    """Give the model's trained tensors these values."""
    parameters = _trainable(model)
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
