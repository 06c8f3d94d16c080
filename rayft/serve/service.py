"""The server as an application of a Ray Serve config file: KubeRay's RayService, `serve deploy`.

applications:
  - name: rayft
    import_path: rayft.serve.service:app
    route_prefix: /
    args: {sources: [run:orders], overrides: [storage=/mnt/runs, serve.api_keys=/mnt/keys.json]}
"""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from rayft.serve.driver import bind, check_keys, register
from rayft.serve.plan import plan


def app(args: dict[str, Any]) -> Application:
    """args: `sources` and `overrides` as `rayft serve` takes them; `insecure: true` for a server without API keys.

    Raises UsageError as `deploy` does.
    """
    planned = plan(args.get("sources", []), args.get("overrides", []))
    check_keys(planned.recipe, "the service", bool(args.get("insecure")))
    register(planned)
    bound: Application = bind(planned)
    return bound
