"""Comparison of token mixers in one network at equal cost, from a config to a report."""
