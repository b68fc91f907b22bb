"""The outputs of a job."""
