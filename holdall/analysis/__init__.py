"""What models and mixers do, measured: mixing matrices."""
