"""`statespan train PRESET`: train a small Mamba as the shipped ones were."""

from statespan.training.__main__ import run as train

__all__ = ["train"]
