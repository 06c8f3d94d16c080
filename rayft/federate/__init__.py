"""`rayft federate`: one adapter learnt from many clients' data, which stays with them."""

from rayft.federate.driver import FederateResult, run
from rayft.federate.dry_run import FederateDryRun, dry_run

__all__ = ["FederateDryRun", "FederateResult", "dry_run", "run"]
