"""Pipelines of the parts below, and the lab in which methods are compared."""
