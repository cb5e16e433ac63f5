"""The layout of compressed-tensors, which vLLM, SGLang and transformers read and llm-compressor writes."""
