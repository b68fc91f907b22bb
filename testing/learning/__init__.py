"""Small bases and cases that show what each method learns."""
