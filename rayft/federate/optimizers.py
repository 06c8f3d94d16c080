"""What the server does with the mean change of a round: plain averaging, momentum, or an adaptive step.

Reddi et al., Adaptive Federated Optimization (arXiv 2003.00295), algorithm 2; Hsu et al. (arXiv 1909.06335) for
momentum, in Flower's form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from rayft.config.federate import Federate
from rayft.federate.state import State

Moments = dict[str, dict[str, torch.Tensor]]
"""fp64 tensors by the name of the moment, then by the name of the tensor. Empty before the first round."""


def step(
    federate: Federate, state: State, change: State, moments: Mapping[str, State], number: int
) -> tuple[dict[str, torch.Tensor], Moments]:
    """(new state, new moments), in fp64.

    state, change: global state and mean change of the clients, of the tensors that were trained. number: rounds of
    this federation so far, this one included.
    """
    w = {name: state[name].double() for name in change}
    rate, strategy = federate.server_rate, federate.strategy
    if strategy == "fedavgm":
        return _momentum(w, change, moments, rate, federate.server_momentum)
    if strategy in ("fedadam", "fedyogi", "fedadagrad"):
        return _adaptive(federate, w, change, moments, rate, number)
    return {name: w[name] + rate * change[name] for name in change}, {}


def _momentum(
    w: State, change: State, moments: Mapping[str, State], rate: float, beta: float
) -> tuple[dict[str, torch.Tensor], Moments]:
    """v <- beta v + g with g = -change, and v = g at first; w <- w - rate v."""
    former = moments.get("v", {})
    v = {name: beta * former[name] - d if name in former else -d for name, d in change.items()}
    return {name: w[name] - rate * v[name] for name in change}, {"v": {**former, **v}}


def _adaptive(
    f: Federate, w: State, change: State, moments: Mapping[str, State], rate: float, number: int
) -> tuple[dict[str, torch.Tensor], Moments]:
    """w <- w + rate m / (sqrt(v) + tau). The paper starts v at tau^2 and corrects nothing; Flower starts it at 0."""
    first = f.beta1 if f.strategy != "fedadagrad" else 0.0
    flwr = f.bias_correction == "flwr"
    if flwr and f.strategy == "fedadam":
        rate *= math.sqrt(1 - f.beta2 ** (number + 1)) / (1 - f.beta1 ** (number + 1))
    start = 0.0 if flwr else f.tau**2
    m, v = dict(moments.get("m", {})), dict(moments.get("v", {}))
    new = {}
    for name, d in change.items():
        square = d * d
        former = v.get(name, torch.full_like(d, start))
        m[name] = first * m.get(name, torch.zeros_like(d)) + (1 - first) * d
        if f.strategy == "fedadam":
            v[name] = f.beta2 * former + (1 - f.beta2) * square
        elif f.strategy == "fedyogi":
            v[name] = former - (1 - f.beta2) * square * torch.sign(former - square)
        else:
            v[name] = former + square
        new[name] = w[name] + rate * m[name] / (v[name].sqrt() + f.tau)
    return new, {"m": m, "v": v}
