"""Solvers: how the errors of a batch move. `register_solver` adds one."""

from hf_pc.solvers import error as error  # these register themselves
from hf_pc.solvers import lagrangian as lagrangian
from hf_pc.solvers import langevin as langevin
from hf_pc.solvers import state as state
from hf_pc.solvers.base import SOLVERS, Solver, register_solver

__all__ = ["SOLVERS", "Solver", "register_solver"]
