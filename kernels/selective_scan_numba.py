"""Placeholder until the compiled kernel is here."""

from statespan.kernels.selective_scan import selective_scan_ref as selective_scan  # noqa: F401
from statespan.kernels.selective_scan import selective_state_update_ref as selective_state_update  # noqa: F401
