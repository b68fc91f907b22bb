"""The FineTuneJob models, the CRD that follows from them, and the words that the operator uses."""
