"""Adapters: one upstream protocol a file."""
