"""The rules that a FineTuneJob must satisfy: one table for the CRD (CEL) and for Python."""
