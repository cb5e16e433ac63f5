"""Model families as data: what is known about each is in configs/architectures/*.yaml, read and looked up here."""
