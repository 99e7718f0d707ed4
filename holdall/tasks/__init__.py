"""Synthetic tasks: a module draws its task, makes rows from a seed of their own, tags their difficulty."""
