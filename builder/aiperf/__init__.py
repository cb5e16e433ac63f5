"""AIPerf, NVIDIA's load generator, in an environment of its own, and what it measures of a gateway."""
