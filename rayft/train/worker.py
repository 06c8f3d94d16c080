"""What one worker does: load, attach, resume, train, and say what went wrong."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayft.config.recipe import Recipe
from rayft.errors import RayftError
from rayft.functions import load_function
from rayft.train.context import ActorRecording, Context, RayContext

if TYPE_CHECKING:
    from rayft.train.control import ClusterCallback
    from rayft.train.trainer import RayftTrainer


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, as plain data. Paths are absolute and readable on every node."""

    recipe: dict[str, Any]
    base: str
    """Name or folder of the base model, as `models.hub.fetch` takes it."""
    data_folder: str
    data_hash: str
    device: str
    """cpu or gpu."""
    threads: int
    micro_batch_size: int
    attempt: int = 0
    reason: str = ""
    """Why there is another attempt."""
    checkpoints: str = ""
    """Folder or URI of this run's checkpoints."""
    resume: tuple[str, ...] = ()
    """Those that were complete when the attempt began."""
    diverged: tuple[int, int] | None = None
    """(since step, up to attempt): checkpoints that a divergence has spoilt."""
    learning_rate_scale: float = 1.0
    init_adapter: str | None = None
    """Folder of the adapter to continue (`adapter.init_from`, resolved)."""
    answer: str | None = None
    """Import path of the function that generates at evaluations."""


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a Ray Train worker: {"job": Job as a dict, "recorder": actor}."""
    return run(Job(**config["job"]), RayContext(ActorRecording(config["recorder"])))


def run(job: Job, context: Context) -> dict[str, Any]:
    """Train one attempt; returns facts of its end. Every failure is told to the recorder before it is raised."""
    quiet()
    from rayft.train.control import Diverged
    from rayft.train.trainer import OutOfMemory

    trainer = None

    def tell(cause: str, step: int, detail: str, **facts: Any) -> None:
        context.recording.ask("event", "failure", cause=cause, step=step, detail=detail, rank=context.rank, **facts)

    try:
        with tempfile.TemporaryDirectory(prefix=f"rayft-rank{context.rank}-") as scratch:
            trainer, control, checkpoint = build(job, context, scratch)
            trainer.train(resume_from_checkpoint=checkpoint)
            return {
                "step": trainer.state.global_step,
                "stopped": control.stopped,
                "best_step": trainer.state.best_global_step,
                "best_validation_loss": trainer.state.best_metric,
            }
    except OutOfMemory as error:
        tell("oom", error.step, error.detail, peak_memory=peak_memory(job.device))
        raise
    except Diverged as error:
        tell("diverged", error.step, error.evidence, since=error.since)
        raise
    except RayftError as error:
        tell("refused", -1, error.message, id=error.id, hint=error.hint, exit_code=error.exit_code)
        raise
    except Exception as error:
        step = trainer.state.global_step if trainer is not None else -1
        cause = "lost_peer" if lost_peer(error) else "error"
        tell(cause, step, f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-4000:])
        raise


def build(job: Job, context: Context, scratch: str) -> tuple[RayftTrainer, ClusterCallback, str | None]:
    """The trainer of this worker, its cluster callback, and the checkpoint folder to resume from (None = start)."""
    import torch
    from transformers import set_seed

    from rayft.data import Prepared, micro_batches
    from rayft.data.schedule import StepSchedule
    from rayft.models import adapters, hub, load
    from rayft.objectives import causal
    from rayft.train import checkpoint, loader, methods, selftest, strategy
    from rayft.train.control import ClusterCallback
    from rayft.train.speed import Speed, flops_per_token
    from rayft.train.trainer import RayftTrainer
    from rayft.train.watch import Limits, Watch

    torch.set_num_threads(job.threads)
    recipe = Recipe.model_validate(job.recipe)
    folder = hub.fetch(job.base, recipe.model.revision)
    tokenizer = load.load_tokenizer(recipe, folder)
    prepared = Prepared(job.data_folder, job.data_hash)
    examples, validation = prepared.split("train"), prepared.split("validation")
    assert examples is not None
    schedule = StepSchedule.of(recipe, examples)
    batches = micro_batches.MicroBatches(schedule, context.workers, context.rank, job.micro_batch_size)
    rows = {"padding_free": recipe.data.padding_free, "pad_token_id": tokenizer.pad_token_id}
    dtype = load.dtype_of(recipe, job.device)

    known = context.checkpoint()  # newer than the list where Ray Train itself has restarted the workers
    candidates = {*job.resume, *([f"{job.checkpoints}/{known}"] if known else [])}
    start = checkpoint.choose(candidates, job.diverged and checkpoint.Diverged(*job.diverged))
    stage = strategy.ZERO_STAGE.get(recipe.scale.strategy)
    converted = checkpoint.universal(start, context.workers, stage) if stage else None
    arguments = strategy.training_arguments(  # before the model: ZeRO-3 shards the weights while they are loaded
        recipe,
        schedule,
        folder=scratch,
        dtype=dtype,
        device=job.device,
        micro_batch_size=job.micro_batch_size,
        micro_steps=batches.micro_steps,
        validation=validation is not None,
        universal=converted is not None,
    )
    set_seed(recipe.seed)
    model = load.load_base(recipe, folder, device=str(arguments.device))
    model = adapters.attach(model, recipe, tokenizer, init_from=job.init_adapter, total_steps=schedule.total_steps)
    causal.install(model, loss_function=causal.own_loss(recipe.train.loss_function))
    if (recipe.data.padding_free or recipe.data.packing) and stage != 3 and len(examples) > 1:
        with load.compute_context(dtype, job.device):
            selftest.check_isolation(model, examples[0]["input_ids"], examples[1]["input_ids"], dtype)

    trainable, total = adapters.parameter_counts(model)
    answers = validation is not None and stage != 3
    answer = load_function(job.answer, "answer", "R614") if job.answer and answers else None
    method = methods.MethodCallback(model, recipe, schedule.total_steps)
    control = ClusterCallback(
        recipe=recipe,
        context=context,
        batches=batches,
        watch=Watch(Limits.for_run(schedule.total_steps, fp16=dtype == "fp16"), recipe.train.max_grad_norm),
        speed=Speed(
            device=arguments.device, devices=context.workers, flops_per_token=flops_per_token(total, trainable)
        ),
        attempt=job.attempt,
        answer=answer and functools.partial(answer, model, tokenizer, prepared, recipe, context.rank, context.workers),
    )
    if start.folder is not None:
        control.load(start.facts)
    trainer = RayftTrainer(
        recipe=recipe,
        schedule=schedule,
        loader=loader.train_loader(examples, batches, recipe.train, pin_memory=job.device == "gpu", **rows),
        validation=None
        if validation is None
        else functools.partial(
            micro_batches.validation_batches, validation, context.workers, context.rank, job.micro_batch_size, **rows
        ),
        penalty=method.penalty,
        control=control,
        learning_rate_scale=job.learning_rate_scale,
        model=model,
        args=arguments,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[method, control],
    )
    if context.rank == 0:
        for problem in start.skipped:
            context.recording.tell("event", "warning", kind_of="checkpoint", evidence=f"damaged checkpoint: {problem}")
        if job.attempt or start.folder:
            context.recording.tell("rewind", start.step, job.reason)
        context.recording.tell(
            "event",
            "started",
            attempt=job.attempt,
            step=start.step,
            total_steps=schedule.total_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            workers=context.workers,
            micro_batch_size=job.micro_batch_size,
            micro_steps=batches.micro_steps,
            dtype=dtype,
            strategy=recipe.scale.strategy,
            trainable_parameters=trainable,
            total_parameters=total,
        )
    context.recording.tell("event", "worker", rank=context.rank, pid=os.getpid(), node=context.node)
    return trainer, control, converted or start.folder


def lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another worker is gone: that worker's death is the cause, not this error."""
    import torch.distributed as dist

    text = str(error).lower()
    gloo = "gloo" in text and any(word in text for word in ("connection", "peer", "timed out"))
    return gloo or isinstance(error, dist.DistBackendError | dist.DistNetworkError)


def peak_memory(device: str) -> int:
    """Highest memory of this worker so far in bytes: allocated on its GPU, or resident in its process."""
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    from rayft.train.speed import peak_process_memory

    return peak_process_memory()


def quiet() -> None:
    """Keep libraries from writing into the progress display."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
