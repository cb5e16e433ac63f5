"""LoRA adapters of a model: PEFT's directories, checked and converted into what TensorRT-LLM's C++ backend takes."""
