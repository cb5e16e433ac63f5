"""Turns a Hugging Face causal LM and a GPU name into a tested Triton repository that serves it quantized.

The packages, lowest layer first. A module imports from its own package and from lower ones only, so that each can be
read, changed and tested without those above it.

    core            store, processes, files, errors, output
    machine         GPU profiles, container images
    formats         number formats: bits, tensors on disk, who runs them
    recipe          what to build, and where each value came from
    architectures   model families: tensor names, features, who serves them
    model           the source model: files, config.json, tensors, one layer computed at a time
    tokenizer       its tokenizer and chat template
    grammar         guided decoding: JSON schemas as grammars, tokens as bytes
    hub             the Hugging Face Hub
    lora            LoRA adapters of a model: their files, and TensorRT-LLM's tensors of them
    calibration     texts that the activation ranges are read from
    checkpoint      the quantized checkpoint: layouts, sharding, validation
    quantize        backends that make a checkpoint
    transform       rotations that are folded into a model's weights before it is quantized
    trtllm          the engine target: trtllm-build, its flags and rules
    triton          Triton model repositories
    llmapi          the llmapi target: arguments of TensorRT-LLM's LLM class
    reference       the reference executor and its Triton backend
    targets         one protocol for the three targets
    gateway         OpenAI's API in front of Triton
    serving         Triton as a process or a container, clients, smoke and load tests
    preflight       what can be rejected before work begins
    aiperf          NVIDIA's load generator in an environment of its own, and what it measures
    publish         the verdict on a build, the link to serve it by, the build record
    clean           removal of what nothing needs
    evaluate        what quantization costs
    quality         the quality check of every build
    report          a finished build as a page and tables
    pipeline        the stages of a build, in order
    recommend       the cheapest recipe within a budget of loss and bytes
    sweep           many recipes, built and measured with shared work done once
    tune            the settings that serve the most within an objective
    plan            what a build would do
    cli             the command line
"""

__version__ = "0.1.0"
