"""Verification and measurement of the operators and layers on a GPU; torch and Triton suffice."""
