"""The lab: a small model made from scratch on generated arithmetic, on which methods are compared over seeds."""

from jaxpost.recipes.lab.methods import Budget
from jaxpost.recipes.lab.model import Recipe, describe, find_lab, make_lab
from jaxpost.recipes.lab.runner import compare

__all__ = ["Budget", "Recipe", "compare", "describe", "find_lab", "make_lab"]
