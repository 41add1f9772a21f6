"""Placeholder until the compiled kernel is here."""

from statespan.kernels.causal_conv import causal_conv_ref as causal_conv  # noqa: F401
from statespan.kernels.causal_conv import causal_conv_update_ref as causal_conv_update  # noqa: F401
