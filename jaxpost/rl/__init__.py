"""Advantages and returns: from the rewards of samples to what each token is credited with."""
