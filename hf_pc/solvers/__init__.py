"""Solvers: how the errors of a batch move. `register_solver` adds one."""

from hf_pc.solvers import error as error  # registers itself
from hf_pc.solvers.base import SOLVERS, Solver, register_solver

__all__ = ["SOLVERS", "Solver", "register_solver"]
