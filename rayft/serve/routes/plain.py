"""The plain routes that people write first: text in, texts out."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from pydantic import ConfigDict, Field, ValidationError, model_validator
from starlette.responses import Response

from rayft.errors import RayftError
from rayft.inference.request import SamplingParams
from rayft.serve import protocol, replies
from rayft.serve.answers import total, whole
from rayft.serve.errors import invalid, json_response, shape_of
from rayft.serve.exchange import Exchange
from rayft.serve.flow import shared
from rayft.serve.gateway import Gateway
from rayft.serve.job import Conversation, Job
from rayft.serve.names import Served

MOST = 1024
"""Requests in a batch."""


class GenerateRequest(protocol.Body):
    """`POST /generate`. The names are those of transformers' `generate`."""

    model_config = ConfigDict(populate_by_name=True)

    prompt: str
    adapter: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Name of an adapter; the base without one."""
    max_length: protocol.Count = 128
    """Most NEW tokens, without those of the prompt."""
    do_sample: bool | None = None
    """Draw tokens; by default just when one of the next four is given. Else the most likely ones are taken."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[list[protocol.Text], Field(max_length=32)] | None = None
    chat: bool = False
    """Take the prompt for the message of a user, in the adapter's chat template; else it is continued as it is."""

    @property
    def samples(self) -> bool:
        if self.do_sample is not None:
            return self.do_sample
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k, self.seed))

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if self.num_return_sequences > 1 and not self.samples:
            raise ValueError("num_return_sequences: without do_sample all texts are the same")
        return self

    def job(self, id: str, served: Served, tenant: str) -> Job:
        sampling = SamplingParams(max_new_tokens=self.max_length, stop=tuple(self.stop or ()))
        if self.samples:
            sampling = SamplingParams(
                max_new_tokens=self.max_length,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=self.top_p or 1.0,
                top_k=self.top_k or 0,
                seed=self.seed,
                stop=tuple(self.stop or ()),
            )
        prompt = Conversation(({"role": "user", "content": self.prompt},)) if self.chat else self.prompt
        return Job(
            id=id,
            prompt=prompt,
            sampling=sampling,
            adapter=served.content,
            strength=served.strength,
            n=self.num_return_sequences,
            stream=False,
            tenant=tenant,
        )


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter(tags=["plain"])

    @routes.post("/generate", responses={200: {"model": replies.Generated}})
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        """Continue a text."""
        return json_response(await _generate(asked, request, request.receive))

    @routes.post("/generate_batch", responses={200: {"model": list[replies.Generated | replies.Error]}})
    async def generate_batch(
        request: Request,
        asked: Annotated[list[Any], Body(max_length=MOST, description="What `/generate` takes, many times.")],
    ) -> Response:
        """Many texts at a time. The answers come in order; an item that fails has an `error` in its place."""
        receive = shared(request.receive)

        async def one(item: Any) -> dict[str, Any]:
            try:
                return await _generate(GenerateRequest.model_validate(item), request, receive)
            except ValidationError as error:
                return shape_of(invalid([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]))
            except RayftError as error:
                return shape_of(error)

        answers = await asyncio.gather(*(one(item) for item in asked))
        return json_response(answers)

    async def _generate(asked: GenerateRequest, request: Request, receive: Any) -> dict[str, Any]:
        began = time.monotonic()
        base = (await gateway.card()).name
        exchange = Exchange(
            gateway,
            request,
            route="generate",
            prefix="gen",
            model=asked.adapter or base,
            jobs=lambda id, served, tenant: [asked.job(id, served, tenant)],
            receive=receive,
        )
        async with exchange:
            answers = await whole(exchange.flow)
            usage = total(exchange.flow)
        return {
            "generated_texts": [answer.text for answer in answers],
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "generation_time": time.monotonic() - began,
        }

    return routes
