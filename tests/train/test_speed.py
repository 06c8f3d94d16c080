"""Counters against a clock that the test moves by hand."""

from __future__ import annotations

import json

import pytest

from rayft.train.speed import Speed, flops_per_token, peak_flops, peak_process_memory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_and_shares() -> None:
    clock = Clock()
    speed = Speed(clock=clock, window=2)
    for _ in range(3):
        with speed.data():
            clock.now += 1.0
        clock.now += 6.0
        with speed.report(), speed.data():  # nested: belongs to the outer one
            clock.now += 1.0
        with speed.pause(), speed.report():
            clock.now += 50.0
        speed.step(tokens=800, padding=200, supervised=400)
    found = speed.scalars()
    assert found["tokens"] == 2400 and found["padding_tokens"] == 600 and found["supervised_tokens"] == 1200
    assert found["tokens_per_second"] == pytest.approx(100)
    assert found["supervised_tokens_per_second"] == pytest.approx(50)
    assert found["seconds_per_step"] == pytest.approx(8)
    assert found["data_share"] == pytest.approx(1 / 8) and found["report_share"] == pytest.approx(1 / 8)
    assert found["padding_share"] == pytest.approx(0.2)
    assert "mfu" not in found and "device_memory_gb" not in found
    assert speed.totals()["away"] == 150


def test_counts_go_on_after_a_resume() -> None:
    clock = Clock()
    first = Speed(clock=clock)
    clock.now += 2
    first.step(tokens=10, supervised=5)
    second = Speed(clock=clock)
    second.load(json.loads(json.dumps(first.state())))
    clock.now += 4
    second.step(tokens=10, supervised=5)
    assert second.scalars()["tokens"] == 20 and second.totals()["seconds"] == 6
    assert second.scalars()["tokens_per_second"] == pytest.approx(2.5)  # the resumed attempt's own


def test_peak_memory_is_this_process() -> None:
    """A block that was touched and given back stays in the peak."""
    block = bytearray(150_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert 150_000_000 < peak_process_memory() < 100e9


def test_devices_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA RTX A1000") is None
    assert flops_per_token(100, 100) == 600 and flops_per_token(100, 0) == 400
