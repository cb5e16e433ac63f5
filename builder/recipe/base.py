"""The base class and the number types of every part of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST = 2**31 - 1  # TensorRT-LLM and Triton count in 32 bits
Positive = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
# GPUs of one engine, processes of one server. A larger number is a slip, and some loops run over all of them.
Ranks = Annotated[int, Field(ge=1, le=1024)]
Processes = Annotated[int, Field(ge=1, le=1024)]


class Part(BaseModel):
    """A part of the recipe. Immutable; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
