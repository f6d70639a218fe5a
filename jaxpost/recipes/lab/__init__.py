"""The lab: a small model made from scratch on generated arithmetic, on which methods are compared over seeds."""
