"""Small bases and learning cases for `bench.learning`, which shows that each method learns."""
