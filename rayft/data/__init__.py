"""Examples: read, render to token ids with loss weights, pack, plan into optimiser steps, collate into batches."""

from rayft.data.examples import Examples
from rayft.data.prepare import prepare
from rayft.data.prepared import Prepared

__all__ = ["Examples", "Prepared", "prepare"]
