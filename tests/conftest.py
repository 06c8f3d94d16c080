"""Fixtures that several rooms share: a tiny chat model with its tokenizer, and one local Ray cluster per session."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch, transformers or ray are imported by any test: no network, one thread, no usage report, quiet.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "1")
# Ray Train would start an actor for each attempt that waits for notices from a cloud: three seconds of CPU.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

sys.path.insert(0, str(Path(__file__).parent))
from slow_ledger import SlowLedger

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CORPUS = [
    "You are a helpful assistant. Answer with one JSON object and nothing else.",
    "Please order two pizzas for Anna and send them to 14 Garden Street on Friday.",
    "What is the capital of France? The capital of France is Paris.",
    'Sure! Here it is: {"tool": "create_order", "arguments": {"item": "pizza", "count": 2}}',
    "The quick brown fox jumps over the lazy dog, 0123456789 times; isn't it?",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-ledger", choices=["check", "record"], help="check or write tests/slow.json")


def pytest_configure(config: pytest.Config) -> None:
    if mode := config.getoption("--slow-ledger"):
        config.pluginmanager.register(SlowLedger(mode), "slow-ledger")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes (`pytest -n 2 --dist loadgroup`) one runs all tests with Ray, which fills most of two cores, and
    the other one the rest, file by file. A test that kills processes of a cluster and waits for the others has a second
    chance on a busy machine; the summary names it."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")
        group = item.nodeid.partition("::")[0]
        if item.get_closest_marker("ray"):
            group = "ray"
            item.add_marker(pytest.mark.flaky(reruns=1))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="needs a GPU")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a ChatML template: no bos, eos ``<|im_end|>``, pad ``<|pad|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny_model_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``tiny_model_factory(**config_overrides) -> folder`` of a random fp32 Llama (seed 0) and its tokenizer.

    Overrides are fields of ``LlamaConfig``; the same overrides give the same folder.
    """
    made: dict[str, str] = {}
    tokenizer = tiny_tokenizer()
    number = itertools.count()

    def make(**overrides: Any) -> str:
        key = repr(sorted(overrides.items()))
        if key not in made:
            import torch
            from transformers import LlamaConfig, LlamaForCausalLM

            fields: dict[str, Any] = {
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 2048,
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            }
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
            folder = tmp_path_factory.mktemp("models") / f"tiny-{next(number)}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_model_factory: Callable[..., str]) -> str:
    """Folder of a random Llama: 4 layers, hidden 64, 4 heads, 2 key-value heads, intermediate 128."""
    return tiny_model_factory()


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """An S3 server of this session (`tests.s3.Bucket`): `s3.uri("bucket/runs")`; child processes reach it too."""
    from tests.s3 import serve

    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(keys)
    with serve() as server:
        yield server
    for name in keys:
        del os.environ[name]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of the session's one local Ray node (4 logical CPUs); child processes find it through RAY_ADDRESS."""
    import ray

    folder = tempfile.mkdtemp(prefix="rayft-")  # not under tmp_path: socket paths are limited to 107 bytes
    context = ray.init(
        "local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        logging_level="WARNING",
        _temp_dir=folder,
    )
    address = context.address_info["address"]
    os.environ["RAY_ADDRESS"] = address
    yield address
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    shutil.rmtree(folder, ignore_errors=True)
