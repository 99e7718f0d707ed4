"""The laws that every mixer obeys, yours too: `pytest --pyargs holdall.testing.laws --load FILE`."""
