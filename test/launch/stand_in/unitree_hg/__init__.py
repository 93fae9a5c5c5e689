"""Stands in for Unitree's message package: its types only carry bytes, which is all the sinks use of them."""
