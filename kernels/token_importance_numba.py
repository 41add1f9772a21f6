"""Placeholder until the compiled kernel is here."""

from statespan.kernels.token_importance import token_importance_ref as token_importance  # noqa: F401
