"""The recipe: one YAML file that serves every verb."""

from __future__ import annotations

from pydantic import Field

from rayft.config.adapter import Adapter
from rayft.config.data import Data
from rayft.config.evaluate import Evaluate
from rayft.config.federate import Federate
from rayft.config.model import Model
from rayft.config.scale import Scale
from rayft.config.section import Section
from rayft.config.serve import Serve
from rayft.config.train import Train
from rayft.config.tune import Tune

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"


class Recipe(Section):
    name: str = Field("run", pattern=NAME_PATTERN)
    """(storage, name) identifies a run."""
    storage: str = "runs"
    """A folder that all nodes see, or a bucket (s3:// gs:// abfss://)."""
    seed: int = Field(17, ge=0, lt=2**32)
    """Decides the order of the examples, the validation split, the adapter's start and dropout."""
    model: Model
    adapter: Adapter | None = None
    """Absent = the weights themselves are trained."""
    data: Data
    train: Train = Train()
    scale: Scale = Scale()
    evaluate: Evaluate = Evaluate()
    tune: Tune | None = None
    """The sweep of `rayft tune`; absent: its defaults."""
    federate: Federate | None = None
    """The federation of `rayft federate`; absent: its defaults."""
    serve: Serve = Serve()
