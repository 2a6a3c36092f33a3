"""Probes of a relaxation, and pictures of a run."""

from hf_pc.diagnostics.backprop import compare_with_backprop
from hf_pc.diagnostics.curvature import largest_curvature

__all__ = ["compare_with_backprop", "largest_curvature"]
