"""The peer of `rayft tune`: plain Ray Tune whose trials are Hugging Face's Trainer with stock PEFT, a process each."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from arms import answer_of, gate
from ray import tune

from rayft.config import load
from rayft.data import Prepared


def trial(config: dict[str, Any]) -> None:
    """One trial. Its settings: recipe (a plain one), base, data, scratch, steps; gated: stop after each step until the
    gate lets it go on. Reports peak memory and, with validation data, the loss that rayft would report."""
    import memory
    from adapters import lora_of
    from hf_trainer import InOrder, make_trainer
    from transformers import TrainerCallback

    settings = config["settings"]
    recipe = load(settings["recipe"]).recipe

    class AtGate(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ray.get(gate().wait.remote(recipe.name))

    assert recipe.train.learning_rate is not None
    trainer = make_trainer(
        InOrder,
        base=settings["base"],
        data=settings["data"],
        scratch=f"{settings['scratch']}/{recipe.name}",
        steps=settings["steps"],
        batch=recipe.train.global_batch_size,
        seed=recipe.seed,
        lora=lora_of(recipe),
        learning_rate=recipe.train.learning_rate,
        callbacks=[AtGate()] if settings["gated"] else [],
        save_steps=None,
    )
    trainer.train()
    result = memory.figures()
    if (examples := Prepared(settings["data"], "").split("validation")) is not None:
        from rayft.evaluate.measure import loss_sums
        from rayft.models.load import load_tokenizer

        tokenizer = load_tokenizer(recipe, settings["base"])
        total, weight = loss_sums(trainer.model, examples, range(len(examples)), recipe, tokenizer)
        result["validation_loss"] = total / weight
    tune.report(result)


def sweep(trials: Sequence[dict[str, Any]], folder: str, processes: int) -> list[dict[str, Any]]:
    """Run these trials, `processes` at a time with one CPU each: what each reported. Raises where one failed."""
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"settings": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(max_concurrent_trials=processes),
        run_config=tune.RunConfig(storage_path=folder, name="sweep", verbose=0),
    ).fit()
    if results.errors:
        raise results.errors[0]
    return [result.metrics for result in results]


class TuneArm:
    """All trials of a plain sweep, alive behind the gate; a step is one optimiser step of each of them."""

    def __init__(self, name: str, trials: Sequence[dict[str, Any]], folder: str, *, at_once: int) -> None:
        """at_once: trials that do their step at the same time, as many as Ray Tune would run on this machine."""
        self.name, self.folder, self.at_once = name, folder, at_once
        self.trials = [settings | {"gated": True} for settings in trials]
        self.names = [settings["recipe"]["name"] for settings in trials]

    def start(self) -> float:
        begin = time.perf_counter()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        for name in self.names:
            self._answer(gate().arrived.remote(name))
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        waiting, running = list(self.names), []
        while waiting or running:
            while waiting and len(running) < self.at_once:
                running.append(gate().step.remote(waiting.pop(0)))
            done, running = ray.wait(running, timeout=1)
            if not done and not self.thread.is_alive():
                raise RuntimeError(f"{self.name} ended before its time")
        return time.perf_counter() - begin

    def finish(self) -> None:
        for name in self.names:
            ray.get(gate().release.remote(name))
        self.thread.join()

    def _run(self) -> None:
        self.results = sweep(self.trials, self.folder, processes=len(self.trials))

    def _answer(self, reply: Any) -> Any:
        return answer_of(reply, self.thread, self.name)
