"""How much clients differ: their sizes, their classes, and how far each is from the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Heterogeneity:
    clients: tuple[str, ...]
    classes: tuple[str, ...]
    counts: np.ndarray
    """int64 [clients, classes]: examples."""

    @property
    def sizes(self) -> np.ndarray:
        """int64 [clients]."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def distances(self) -> np.ndarray:
        """float64 [clients]: total variation distance between a client's classes and those of all examples, 0 to 1."""
        whole = self.counts.sum(axis=0) / max(1, self.counts.sum())
        own = self.counts / np.maximum(1, self.sizes[:, None])
        return np.asarray(np.abs(own - whole).sum(axis=1) / 2)

    @property
    def effective_classes(self) -> np.ndarray:
        """float64 [clients]: exp of the entropy of a client's classes; 1 = one class only."""
        own = self.counts / np.maximum(1, self.sizes[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(own > 0, own * np.log(own), 0.0)
        return np.asarray(np.exp(-terms.sum(axis=1)))

    def summary(self) -> dict[str, float]:
        """Numbers for the report; `size_ratio`: of the largest client to the smallest."""
        sizes = self.sizes
        return {
            "clients": len(self.clients),
            "examples": int(sizes.sum()),
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": int(sizes.max()),
            "size_ratio": float(sizes.max() / max(1, sizes.min())),
            "classes": len(self.classes),
            "mean_distance": float(np.average(self.distances, weights=sizes)) if sizes.sum() else 0.0,
            "mean_effective_classes": float(self.effective_classes.mean()),
        }

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"clients": list(self.clients), "classes": list(self.classes), "counts": self.counts.tolist()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Heterogeneity:
        return cls(tuple(plain["clients"]), tuple(plain["classes"]), np.array(plain["counts"], dtype=np.int64))


def measure(parts: Mapping[str, Sequence[int] | np.ndarray], labels: Sequence[str] | np.ndarray) -> Heterogeneity:
    """Count the classes of each client. labels: one per example."""
    labels = np.asarray([str(label) for label in labels])
    classes, codes = np.unique(labels, return_inverse=True)
    counts = np.array(
        [np.bincount(codes[np.asarray(indices, dtype=np.int64)], minlength=len(classes)) for indices in parts.values()]
    )
    return Heterogeneity(tuple(parts), tuple(map(str, classes)), counts)
