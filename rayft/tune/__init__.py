"""`rayft tune`: many trials of one recipe, and what a person sees of them."""

from rayft.tune.driver import TuneResult, search

__all__ = ["TuneResult", "search"]
