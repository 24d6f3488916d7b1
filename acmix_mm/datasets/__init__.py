"""Generated data, to try the tools on."""
