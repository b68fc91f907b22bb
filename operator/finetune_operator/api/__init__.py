"""The FineTuneJob models, the CRD generated from them, and the operator's labels, names, conditions and reasons."""
