"""Facts about hardware: GPU profiles, cards, and the container images that run on them."""
