"""One engine of `serve.py` in a process of its own: answers a batch of requests for each line on standard input.

    python generators.py KIND '{"base": FOLDER, "adapters": [FOLDER, ...], "threads": 2, ...}'

KIND: rayft, peft-switch, peft-names, transformers-cb, vllm. A line is {"tokens": of an answer, "requests": [[number of
an adapter or null, [token ids]], ...]}; the answer to it is {"seconds", "tokens": of all answers}. This file imports
nothing of rayft unless KIND says so: vLLM runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

Requests = list[tuple[int | None, list[int]]]


class Generates(Protocol):
    def answer(self, requests: Requests, tokens: int) -> int:
        """All at once; the number of tokens that came."""
        ...


class Rayft:
    """The engine alone, without a thread or HTTP."""

    def __init__(self, base: str, adapters: list[str], threads: int, seqs: int) -> None:
        import torch

        from rayft.inference.engine import Engine
        from rayft.inference.settings import EngineSettings

        torch.set_num_threads(threads)
        model, tokenizer = _base(base)
        self.engine = Engine(model, tokenizer, EngineSettings(max_num_seqs=seqs, enable_prefix_caching=False))
        for number, folder in enumerate(adapters):
            self.engine.register(folder, str(number))

    def answer(self, requests: Requests, tokens: int) -> int:
        from rayft.inference.request import Request, SamplingParams

        sampling, came = SamplingParams(tokens, ignore_eos=True), 0

        def count(event: Any) -> None:
            nonlocal came
            came += event.token is not None

        for number, (adapter, ids) in enumerate(requests):
            name = None if adapter is None else str(adapter)
            self.engine.add(Request(str(number), ids, name, sampling=sampling), count)
        while self.engine.busy:
            self.engine.step()
        return came


class Peft:
    """Stock PEFT and `generate` with padding on the left: an adapter at a time, or `adapter_names` by row."""

    def __init__(self, base: str, adapters: list[str], threads: int, names: bool) -> None:
        import torch
        from peft import PeftModel

        torch.set_num_threads(threads)
        self.names = names
        self.model, tokenizer = _base(base)
        self.pad = tokenizer.pad_token_id or 0
        for number, folder in enumerate(adapters):
            if number == 0:
                self.model = PeftModel.from_pretrained(
                    self.model, folder, adapter_name="0", autocast_adapter_dtype=False
                )
            else:
                self.model.load_adapter(folder, str(number), autocast_adapter_dtype=False)
        self.model.eval()

    def answer(self, requests: Requests, tokens: int) -> int:
        if self.names:
            rows = ["__base__" if adapter is None else str(adapter) for adapter, _ in requests]
            return self._generate([ids for _, ids in requests], tokens, adapter_names=rows)
        came = 0
        for chosen in dict.fromkeys(adapter for adapter, _ in requests):
            prompts = [ids for adapter, ids in requests if adapter == chosen]
            if chosen is None and hasattr(self.model, "disable_adapter"):
                with self.model.disable_adapter():
                    came += self._generate(prompts, tokens)
            else:
                if chosen is not None:
                    self.model.set_adapter(str(chosen))
                came += self._generate(prompts, tokens)
        return came

    def _generate(self, prompts: list[list[int]], tokens: int, **arguments: Any) -> int:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=self.pad,
                **arguments,
            )
        return output[:, longest:].numel()


class TransformersCB:
    """transformers' continuous batching, which has no adapters."""

    def __init__(self, base: str, threads: int, seqs: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model, _ = _base(base, attn_implementation="sdpa")

    def answer(self, requests: Requests, tokens: int) -> int:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = self.model.generate_batch(
            [ids for _, ids in requests],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=1024, max_batch_tokens=512),
            progress_bar=False,
        )
        return sum(len(output.generated_tokens) for output in outputs.values())


class Vllm:
    def __init__(self, base: str, adapters: list[str], threads: int, seqs: int, loras: int) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        from vllm import LLM

        lora: dict[str, Any] = {"enable_lora": True, "max_loras": loras, "max_lora_rank": 16} if adapters else {}
        self.adapters = adapters
        self.llm = LLM(
            model=base,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=seqs,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **lora,
        )

    def answer(self, requests: Requests, tokens: int) -> int:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        lora = [
            None if adapter is None else LoRARequest(str(adapter), adapter + 1, self.adapters[adapter])
            for adapter, _ in requests
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for _, ids in requests],
            sampling,
            lora_request=lora if self.adapters else None,
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)


def _base(folder: str, **arguments: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **arguments)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def engine(kind: str, options: dict[str, Any]) -> Generates:
    base, adapters, threads, seqs = (options[name] for name in ("base", "adapters", "threads", "seqs"))
    match kind:
        case "rayft":
            return Rayft(base, adapters, threads, seqs)
        case "peft-switch" | "peft-names":
            return Peft(base, adapters, threads, kind == "peft-names")
        case "transformers-cb":
            return TransformersCB(base, threads, seqs)
        case "vllm":
            return Vllm(base, adapters, threads, seqs, options["loras"])
    raise SystemExit(f"no engine {kind}")


def main() -> None:
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, and so do processes that they start
    generates = engine(kind, options)
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        came = generates.answer([(adapter, ids) for adapter, ids in asked["requests"]], asked["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - begin, "tokens": came}), file=answers, flush=True)


if __name__ == "__main__":
    main()
