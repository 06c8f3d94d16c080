"""`rayft federate`: one adapter learnt from many clients' data, which stays with them."""

from rayft.federate.driver import FederateResult, run

__all__ = ["FederateResult", "run"]
