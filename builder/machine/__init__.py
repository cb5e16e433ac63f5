"""Facts about hardware: GPU profiles and the container images for them."""
