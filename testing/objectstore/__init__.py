"""A real S3 server for the tests. Buckets are local folders, so a test can inspect what is stored."""
