"""Placeholder until the compiled kernel is here."""

from statespan.kernels.ssd import ssd_chunked as ssd  # noqa: F401
from statespan.kernels.ssd import ssd_state_update_ref as ssd_state_update  # noqa: F401
