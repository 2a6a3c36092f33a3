"""Closed forms that the solvers are held to."""
