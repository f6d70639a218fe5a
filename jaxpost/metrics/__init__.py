"""What a run measures: exact means over whole batches, and the places they are written to."""
