"""The source files that start a server and compute its answers: ingredients of whatever is asked of a served model."""

SERVED_SOURCES = (
    "builder/serving/sources.py",
    "builder/serving/client.py",
    "builder/serving/server.py",
    "builder/serving/launch.py",
    "builder/serving/readiness.py",
    "builder/llmapi/launch.py",
    "builder/serving/safe_links.py",
    "builder/serving/private_directory.py",
    "builder/serving/installation.py",
    "builder/trtllm/compatibility.py",
    "builder/architectures",
    "builder/reference",
    "builder/recipe/target_facts.py",
    "builder/formats",
    "builder/checkpoint/sharding.py",
    "builder/checkpoint/joining.py",
    "builder/checkpoint/layouts.py",
    "builder/core/safetensors_io.py",
    "builder/model/files.py",
    "builder/model/multimodal.py",
)
