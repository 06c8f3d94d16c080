"""Padding-free, padded and packed micro-batches; attention stays within each example (checked on a real model)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rayft.data.collate import collate
from rayft.data.examples import Examples, Writer


def row(ids: list[int], weights: list[float], **more: Any) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids, np.int32), "loss_weights": np.array(weights, np.float32), **more}


ROWS = [row([5, 6, 7], [0, 0, 1]), row([8, 9], [0, 1]), row([0], [0])]
BINS = [row([5, 6, 7, 8], [0, 1, 0, 1], position_ids=np.array([0, 1, 0, 1], np.int32)), row([9], [0])]


def test_padding_free() -> None:
    batch = collate(ROWS, padding_free=True, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["loss_weights"].tolist() == [[0, 0, 1, 0, 1, 0]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "loss_weights": torch.float32,
    }
    assert collate(BINS, padding_free=True, pad_token_id=3)["position_ids"].tolist() == [[0, 1, 0, 1, 0]]


def test_padded() -> None:
    batch = collate(ROWS, padding_free=False, pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3], [0, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["loss_weights"].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert "position_ids" not in batch


def test_padded_bins_are_isolated_by_positions() -> None:
    batch = collate(BINS, padding_free=False, pad_token_id=3)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 3, 3]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_sees_each_example_alone(tiny_model_folder: str, padding_free: bool, implementation: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, attn_implementation=implementation).eval()
    parts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    packed = row(parts[0] + parts[1], [0.0] * 6, position_ids=np.array([0, 1, 2, 3, 0, 1], np.int32))
    plain = [row(part, [0.0] * len(part)) for part in parts]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([part]), use_cache=False).logits[0] for part in parts])
    for rows in (plain, [packed, plain[2]]):
        batch = collate([*rows, row([0], [0.0])], padding_free, pad_token_id=0)
        del batch["loss_weights"]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        assert torch.isfinite(logits).all()
        lengths = [len(values["input_ids"]) for values in rows]
        together = (
            logits[0, : sum(lengths)] if padding_free else torch.cat([logits[i, :n] for i, n in enumerate(lengths)])
        )
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_examples_on_disk(tmp_path: Any) -> None:
    import pickle

    generator = np.random.default_rng(0)
    kept = [
        row(generator.integers(0, 99, n).tolist(), generator.random(n).tolist()) for n in generator.integers(1, 9, 2500)
    ]
    with Writer(tmp_path / "x.arrow", ["input_ids", "loss_weights", "source"]) as writer:
        for index, values in enumerate(kept):
            writer.append(**values, source=f"s{index % 3}")
    examples = pickle.loads(pickle.dumps(Examples(tmp_path / "x.arrow")))
    assert len(examples) == 2500
    for index in (0, 999, 1000, 1001, 2499):
        assert examples[index]["input_ids"].tolist() == kept[index]["input_ids"].tolist()
        assert examples[index]["loss_weights"].tolist() == kept[index]["loss_weights"].tolist()
        assert (examples[index]["input_ids"].dtype, examples[index]["loss_weights"].dtype) == (np.int32, np.float32)
    assert examples.lengths.tolist() == [len(values["input_ids"]) for values in kept]
    np.testing.assert_allclose(examples.weight_sums, [values["loss_weights"].sum(dtype=np.float64) for values in kept])
    assert examples.column("source")[:4] == ["s0", "s1", "s2", "s0"]
    assert examples[-1]["loss_weights"].tolist() == [0.0]
    with pytest.raises(IndexError):
        examples[2500]
    assert len(list(examples)) == 2500


def test_no_examples_on_disk(tmp_path: Any) -> None:
    with Writer(tmp_path / "x.arrow", ["input_ids", "loss_weights"]):
        pass
    examples = Examples(tmp_path / "x.arrow")
    assert (len(examples), examples.lengths.tolist(), examples.weight_sums.tolist()) == (0, [], [])
