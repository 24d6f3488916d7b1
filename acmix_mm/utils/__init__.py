"""Errors and file writing shared by all packages."""
