"""This trainer runs as ``python -m examples.train_lm``."""
