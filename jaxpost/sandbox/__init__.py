"""Runs code that nobody has read, under limits that it cannot leave."""
