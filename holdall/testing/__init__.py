"""The laws that every mixer obeys, yours too: `holdall laws FILE`, or as tests by pytest."""
