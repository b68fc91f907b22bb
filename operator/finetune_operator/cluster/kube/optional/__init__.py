"""Optional APIs: looked for at the start and from time to time, and watched once the API server serves them."""
