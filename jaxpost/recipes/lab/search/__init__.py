"""Searches on the lab's model: labelled answers, reward models, every method at several budgets over seeds."""

from jaxpost.recipes.lab.search.runner import Plan, search_lab

__all__ = ["Plan", "search_lab"]
