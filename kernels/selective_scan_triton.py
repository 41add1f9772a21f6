"""The selective scan on CUDA: what `kernels/selective_scan.py` defines, with and without gradients."""

from __future__ import annotations

from statespan.kernels.selective_scan_grad_triton import selective_scan

__all__ = ["selective_scan"]
