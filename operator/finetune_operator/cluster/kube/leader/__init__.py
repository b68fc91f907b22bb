"""Leader election and the endpoint of the leading replica."""
