"""What a model's own dynamics tell of where to search: measurements, and the search spaces they suggest."""
