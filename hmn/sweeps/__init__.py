"""Sweeps: which runs to make, where, and with what outcome. A run does not know the sweep that it belongs to."""
