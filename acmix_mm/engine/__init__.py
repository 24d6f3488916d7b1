"""Loading configs, training and testing with MMEngine, and the tools' command line."""
