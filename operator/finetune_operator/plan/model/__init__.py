"""The data of a plan: observed objects, the view of one pass, the ledger and the table of causes."""
