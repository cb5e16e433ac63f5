# A CPU stand-in for NVIDIA's Triton image, on a Debian made by docker/base-cpu.
ARG ROOTFS
# hadolint ignore=DL3006
FROM ${ROOTFS}
ENV PATH=/opt/tritonserver/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LD_LIBRARY_PATH=/opt/tritonserver/lib
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Compiles bytecode on all cores (pip uses one) and, like pip, ignores files that don't compile. Done here because the root
# file system is read-only later.
RUN --mount=from=wheels,target=/wheels --mount=type=bind,source=base-cpu.txt,target=/base-cpu.txt \
    python3 -m venv /opt/venv-tritonserver \
    && /opt/venv-tritonserver/bin/pip install -q --no-cache-dir --no-compile --no-index --find-links /wheels -r /base-cpu.txt \
    && /opt/venv-tritonserver/bin/pip install -q --no-cache-dir --no-compile --no-index --find-links /wheels --no-deps \
        xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2 \
    && python3 -c 'import compileall; compileall.compile_dir("/opt/venv-tritonserver/lib", quiet=2, workers=0)'
# The Triton server from nvidia-pytriton, moved to where NVIDIA's images have it. The package's Python code is not used.
RUN --mount=from=wheels,target=/wheels \
    /opt/venv-tritonserver/bin/pip install -q --no-cache-dir --no-compile --no-index --find-links /wheels --no-deps --target /tmp/pytriton \
        nvidia-pytriton==0.7.0 \
    && mv /tmp/pytriton/pytriton/tritonserver /opt/tritonserver \
    && mv /tmp/pytriton/nvidia_pytriton.libs /opt/tritonserver/lib \
    && python="$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
    && cp "/opt/tritonserver/python_backend_stubs/$python/triton_python_backend_stub" /opt/tritonserver/backends/python/ \
    && rm -rf /opt/tritonserver/python_backend_stubs /tmp/pytriton
