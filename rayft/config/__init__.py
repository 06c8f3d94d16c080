"""The recipe: what the user asked for, checked as a whole before anything starts. Imports neither torch nor ray."""

from rayft.config.load import load
from rayft.config.recipe import Recipe
from rayft.config.resolve import Resolved

__all__ = ["Recipe", "Resolved", "load"]
