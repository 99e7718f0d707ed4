"""Training: one chassis and two drivers on it, populations of small models and language models."""
