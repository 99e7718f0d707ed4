"""Sweeps: what to train, run folders that workers claim, and how long it will take."""
