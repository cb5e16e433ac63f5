"""Sends a prompt over gRPC and prints the answer piece by piece, as the model generates it.

pip install 'tritonclient[grpc]'
builder serve artifacts/models/tiny-qwen3-cpu-nvfp4 --grpc-port 8001
python examples/client_grpc_stream.py "Return the number of" --max-tokens 32
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

MODEL = "tensorrt_llm_bls"  # its detokenizer keeps state, so characters of several tokens arrive whole


def tensor(name: str, value: Any, dtype: Any) -> grpc.InferInput:
    """An input of one request: shape [1, 1]."""
    array = np.array([[value]], dtype=dtype)
    made = grpc.InferInput(name, [1, 1], np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def stream(url: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of the answer. Raises InferenceServerException if the server rejects the request."""
    inputs = [
        tensor("text_input", prompt.encode(), np.object_),
        tensor("max_tokens", max_tokens, np.int32),
        tensor("top_k", 1, np.int32),  # greedy
        tensor("stream", True, np.bool_),
    ]
    responses: queue.Queue[tuple[Any, InferenceServerException | None]] = queue.Queue()
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        # Without the empty final response a client can't tell a pause from the end.
        client.async_stream_infer(MODEL, inputs, enable_empty_final_response=True)
        while True:
            result, error = responses.get(timeout=120)
            if error is not None:
                raise error
            text = result.as_numpy("text_output")
            if text is not None and text.size:
                yield text.reshape(-1)[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Stream an answer over gRPC.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        for piece in stream(arguments.url, arguments.prompt, arguments.max_tokens):
            print(piece, end="", flush=True)
        print()
    except InferenceServerException as error:
        sys.exit(f"error: {error.message()}")
