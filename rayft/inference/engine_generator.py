"""The `Generator` protocol on the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rayft.inference.engine import Engine
from rayft.inference.generator import Completion, Prompt, Sampling
from rayft.inference.request import Request, SamplingParams, TokenEvent


class EngineGenerator:
    """Answers all prompts in shared batches, whatever adapters they name.

    Greedy answers in fp32 equal `HFGenerator`'s. Drawn ones are others, and here they depend on seed and place of a
    prompt alone, not on the other prompts.
    """

    def __init__(self, engine: Engine) -> None:
        """engine: knows the adapters by the names that prompts use, and is stepped by nobody else."""
        self.engine = engine

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Raises:
            UsageError: R812 (too long), R815 (unknown adapter); nothing is computed then.
        """
        events: list[list[TokenEvent]] = [[] for _ in prompts]
        requests = [
            Request(f"generate-{place}", tuple(prompt.ids), prompt.adapter, sampling=_params(sampling, place))
            for place, prompt in enumerate(prompts)
        ]
        for request in requests:
            self.engine.check(request)
        try:
            self._run(requests, events)
        except BaseException:
            self.engine.fail("interrupted")
            raise
        return [_completion(answer, sampling) for answer in events]

    def _run(self, requests: list[Request], events: list[list[TokenEvent]]) -> None:
        waiting = list(zip(requests, events, strict=True))[::-1]
        while waiting or self.engine.busy:
            while waiting and self.engine.has_room:
                request, answer = waiting.pop()
                self.engine.add(request, answer.append)
            self.engine.step()


def _params(sampling: Sampling, place: int) -> SamplingParams:
    digest = hashlib.blake2b(f"{sampling.seed}/{place}".encode(), digest_size=8).digest()
    return SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=int.from_bytes(digest, "little") >> 1,
        stop=sampling.stop,
        logprobs=sampling.logprobs,
    )


def _completion(events: list[TokenEvent], sampling: Sampling) -> Completion:
    return Completion(
        tuple(event.token for event in events if event.token is not None),
        "".join(event.text for event in events),
        "stop" if events[-1].finish_reason == "stop" else "length",
        tuple(event.logprob for event in events if event.logprob is not None) if sampling.logprobs else None,
    )
