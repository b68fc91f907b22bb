"""Uploads in parts, one module per object store: parts are stored in parallel, then one request makes the object."""
