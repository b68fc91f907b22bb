"""The data of a plan: observed objects, the view of one reconcile, the ledger, the table of causes, and `Policy`."""
