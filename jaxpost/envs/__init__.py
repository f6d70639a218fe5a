"""Text environments of several turns, and the tools that a policy may use in them."""
