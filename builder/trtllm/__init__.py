"""The engine target: trtllm-build's flags, versions, rules, probes, and the engine itself."""
