"""What all parts of a recipe are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A part of the recipe. Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
