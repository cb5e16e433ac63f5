# Installs the builder into NVIDIA's image, whose TensorRT-LLM builds the engine and serves it.
# The default is the newest image in configs/containers.yaml (a test compares them). To pin it by digest:
#   --build-arg BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3@sha256:DIGEST
# For --gpu cpu, docker/base-cpu makes a CPU base image.
ARG BASE_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS wheel
# hadolint ignore=DL3002
USER 0:0
ENV PATH=/opt/venv-tritonserver/bin:${PATH}
# For the C extension (hatch_build.py). The compiler stays in this stage.
# hadolint ignore=DL3008
RUN if ! command -v gcc >/dev/null \
        || ! test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"; then \
        apt-get update -q && apt-get install -y -q --no-install-recommends gcc libc6-dev python3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY builder ./builder
COPY configs ./configs
COPY triton_templates ./triton_templates
RUN BUILDER_REQUIRE_KERNELS=1 python3 -m pip wheel -q --no-cache-dir --no-deps --wheel-dir /wheel .

# hadolint ignore=DL3006
FROM ${BASE_IMAGE}
ARG TENSORRT_LLM=1.2.1
USER 0:0
# Since 26.06 the images keep Python and TensorRT-LLM here. In older ones the system's Python comes next in PATH.
ENV PATH=/opt/venv-tritonserver/bin:${PATH}
# Packages that the image ships must keep their versions, because NVIDIA tested them together.
# Dependencies come first, in a layer of their own, so that a change of our code does not rebuild it.
RUN --mount=type=bind,source=pyproject.toml,target=/pyproject.toml \
    --mount=type=bind,source=docker/image_packages.py,target=/image_packages.py \
    python3 /image_packages.py expect tensorrt_llm "${TENSORRT_LLM}" \
    && python3 /image_packages.py save /shipped.txt \
    && python3 /image_packages.py requirements /pyproject.toml quantize serve telemetry tasks > /needed.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --no-cache-dir --root-user-action ignore \
        --constraint /shipped.txt --requirement /needed.txt \
    && python3 /image_packages.py compare /shipped.txt \
    && rm /needed.txt \
    && install -d -m 1777 /artifacts /cache
# TensorRT-LLM can't be imported with the openai that NVIDIA's images 26.03 to 26.07 ship (1.107.3, without
# PartReasoningText). The shipped version stays; only the llmapi target's processes put this one first (builder/llmapi/launch.py).
RUN if python3 -c 'import openai' 2>/dev/null && ! python3 -c \
        'from openai.types.responses.response_content_part_added_event import PartReasoningText' 2>/dev/null; then \
        python3 -m pip install -q --no-cache-dir --no-deps --root-user-action ignore \
            --target /opt/trtllm-builder/llmapi openai==1.109.1; \
    fi
RUN --mount=from=wheel,source=/wheel,target=/wheel \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --no-cache-dir --no-deps --root-user-action ignore \
        /wheel/*.whl

# All caches are in the volume /cache, since the root file system is read-only. getpass needs USER if a uid has no name.
ENV BUILDER_OUTPUT=/artifacts \
    BUILDER_CONTAINER=1 \
    BUILDER_LLMAPI_OVERLAY=/opt/trtllm-builder/llmapi \
    TRTLLM_NO_USAGE_STATS=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    USER=builder \
    LOGNAME=builder \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="trtllm-builder" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      trtllm-builder.tensorrt-llm="${TENSORRT_LLM}"
WORKDIR /artifacts
USER 1000:1000
# Replaces NVIDIA's entrypoint, which prints a banner to stdout, where results and --json go.
ENTRYPOINT ["builder"]
CMD ["--help"]
