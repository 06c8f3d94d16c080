"""One run: a recipe in, a trained adapter or model out, whatever happens to the cluster on the way."""

from rayft.train.driver import TrainResult, fit

__all__ = ["TrainResult", "fit"]
