"""Floor 7: tables, plots and HTML from records."""
