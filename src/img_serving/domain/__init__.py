"""Frozen values and errors that everybody speaks. No I/O, no clock, no framework."""
