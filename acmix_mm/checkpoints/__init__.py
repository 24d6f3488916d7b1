"""Reading checkpoints as data, recognising them, and loading them."""
