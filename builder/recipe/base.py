"""What all parts of a recipe are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 2**31 - 1  # TensorRT-LLM and Triton count in 32 bits
Positive = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
# GPUs of one engine, and processes of one server: more is a slip, and would be counted through one by one.
Ranks = Annotated[int, Field(ge=1, le=1024)]
Processes = Annotated[int, Field(ge=1, le=1024)]


class Part(BaseModel):
    """A part of the recipe. Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
