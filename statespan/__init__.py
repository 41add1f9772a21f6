"""statespan: which context-extension method, with which settings, for this Mamba, this task and this latency."""

__version__ = "0.1.0"
