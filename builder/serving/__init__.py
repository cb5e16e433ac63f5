"""Serving a repository: Triton as a process or in a container, clients, smoke tests and benchmarks."""
