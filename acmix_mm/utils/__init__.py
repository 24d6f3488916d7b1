"""Errors, atomic file writes and Markdown tables, shared by all packages."""
