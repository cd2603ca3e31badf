"""Upstream HTTP behind one small port."""
