"""Recipes on the tiny model, as the tests of training use them."""

from tests.train.conftest import chat_file, recipe

__all__ = ["chat_file", "recipe"]
