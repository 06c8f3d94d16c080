"""One run: a recipe in, a trained adapter or model out, whatever happens to the cluster on the way."""

from rayft.train.driver import TrainResult, fit
from rayft.train.dry_run import DryRun, dry_run

__all__ = ["DryRun", "TrainResult", "dry_run", "fit"]
