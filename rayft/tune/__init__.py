"""`rayft tune`: many trials of one recipe, and what a person sees of them."""

from rayft.tune.driver import TuneResult, search
from rayft.tune.dry_run import TuneDryRun, dry_run

__all__ = ["TuneDryRun", "TuneResult", "dry_run", "search"]
