"""Analysis of networks: counts, rates, attention maps, receptive fields, and their figures."""
