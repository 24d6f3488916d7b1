"""A generated dataset to try the tools on."""
