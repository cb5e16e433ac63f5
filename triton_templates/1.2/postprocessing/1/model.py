"""Triton model: token ids -> text, of every beam, up to its sequence length.

Needs numpy and tokenizers. Runs as it is in Triton's container and with the reference executor.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = {key: v["string_value"] for key, v in json.loads(args["model_config"])["parameters"].items()}
        root = Path(args["model_repository"]).parent
        self.tokenizer = Tokenizer.from_file(str(root / parameters["tokenizer_dir"] / "tokenizer.json"))
        self.skip_special_tokens = parameters["skip_special_tokens"] == "true"

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", self.decode(request))])
        except ValueError as error:
            message = str(error)
        except Exception as error:
            traceback.print_exc()
            message = f"postprocessing failed: {type(error).__name__}; the server's log says more"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))

    def decode(self, request):
        """[batch, beams] of UTF-8 bytes."""
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        texts = np.empty(lengths.shape, dtype=object)
        for index, length in np.ndenumerate(lengths):
            if not 0 <= length <= tokens.shape[-1]:
                raise ValueError(f"the engine names a sequence of {length} tokens and gave {tokens.shape[-1]}")
            ids = tokens[index][:length].tolist()
            if any(id < 0 for id in ids):
                raise ValueError("the engine gave a negative token id inside a sequence")
            texts[index] = self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens).encode("utf-8")
        return texts
