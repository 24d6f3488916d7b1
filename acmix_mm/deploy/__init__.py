"""Export and publishing."""
