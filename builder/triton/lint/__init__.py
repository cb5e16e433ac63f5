"""`builder lint`: what is wrong in a Triton model repository, whoever rendered it, without starting a server."""
