"""A real S3 server for the tests: buckets are folders of this machine, so a test can look at what is stored."""
