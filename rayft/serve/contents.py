"""The adapters of a plan, as jobs name them."""

from __future__ import annotations

from functools import lru_cache

from rayft.runs import reference
from rayft.serve.job import Content
from rayft.serve.plan import Plan


def contents(plan: Plan) -> dict[str, Content]:
    """By the last part of their names (folders have long ones), or the whole where that is not enough."""
    from rayft.multilora.bank import AdapterState

    short = {name: name.rstrip("/").rpartition("/")[2] for name in plan.adapters}
    found = {}
    for name, trained in plan.adapters.items():
        hash = AdapterState.read(trained.fetch()).content_hash()
        unique = list(short.values()).count(short[name]) == 1
        found[short[name] if unique else name] = Content(hash, trained.path)
    return found


@lru_cache
def here(content: Content) -> Content:
    """With a path on this machine: contents of buckets are copied once."""
    return Content(content.hash, reference.on_this_machine(content.path))
