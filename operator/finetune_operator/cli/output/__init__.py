"""Text that the commands print: live and plain views, tables, figures and summaries."""
