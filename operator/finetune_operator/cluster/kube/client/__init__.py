"""HTTP requests to the API server and the object types they carry."""
