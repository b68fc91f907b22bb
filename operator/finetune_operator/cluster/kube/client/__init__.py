"""HTTP requests to the API server, and the object types that they carry."""
