"""Which preference loss is better: the lab's model, equal pairs of its own answers, several seeds."""

from jaxpost.recipes.lab.prefer.methods import METHODS, Plan
from jaxpost.recipes.lab.prefer.runner import prefer

__all__ = ["METHODS", "Plan", "prefer"]
