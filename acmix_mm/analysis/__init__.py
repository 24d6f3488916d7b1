"""Looking inside a network: numbers first, in a file for each question, and figures of them."""
