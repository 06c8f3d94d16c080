"""What `pip install .` and the Makefile install."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def test_a_torch_that_is_there_is_never_replaced() -> None:
    """Any torch from 2.9 on satisfies the requirement, so pip has no reason to touch it."""
    (torch,) = [need for need in map(Requirement, PROJECT["dependencies"]) if need.name == "torch"]
    assert all(torch.specifier.contains(version) for version in ("2.9.0", "2.13.0+cpu", "2.14.1+cu130", "3.0"))
    assert not torch.specifier.contains("2.8.0")
    extras = [need for needs in PROJECT["optional-dependencies"].values() for need in map(Requirement, needs)]
    assert all(need.name != "torch" for need in extras)


def test_pins_satisfy_every_requirement() -> None:
    installed = ("deepspeed", "tune", "eval", "dev")  # the extras that the Makefile installs
    needs = PROJECT["dependencies"] + [need for extra in installed for need in PROJECT["optional-dependencies"][extra]]
    for need in map(Requirement, needs):
        name = canonicalize_name(need.name)
        if name.startswith("types-"):
            continue
        assert name in PINS, f"{name} has no pin"
        assert need.specifier.contains(PINS[name]), f"{need} against {PINS[name]}"
    assert PINS["torch"] == "2.13.0"


def test_all_names_every_extra() -> None:
    (everything,) = map(Requirement, PROJECT["optional-dependencies"]["all"])
    assert everything.extras == set(PROJECT["optional-dependencies"]) - {"all", "dev"}
