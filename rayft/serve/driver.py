"""`deploy`: from a recipe or runs to a server that answers."""

from __future__ import annotations

import ipaddress
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayft.config.recipe import Recipe
from rayft.errors import RunFailed, UsageError
from rayft.serve import keys
from rayft.serve.plan import Plan, plan


@dataclass(frozen=True)
class Server:
    """A server that answers. Use as a context manager, or `stop` it."""

    name: str
    url: str
    models: tuple[str, ...]
    """What requests may name from the start: the base, then adapters."""
    folder: str
    """Of its logs."""
    ray_address: str
    """Of its cluster; `local` for one that ends with this process."""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, if it runs; requests that are running have 30 seconds."""
        from ray import serve

        if _listening() is None:
            return
        serve.delete(application_name(self.name))
        if not serve.status().applications:
            serve.shutdown()  # its proxies would keep the port


def deploy(
    source: str | Path | Mapping[str, Any] | Recipe | Sequence[Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    attach: str | None = None,
    insecure: bool = False,
    patience: float = 600,
) -> Server:
    """Start a server on the cluster (see `runtime.session.connect`) and wait until it answers.

    source: a recipe (its run where there is one), `run:NAME[@...]`, a folder of weights, or several of those that share
    a base. insecure: listen on an address that others reach although no API keys are asked for. patience: seconds
    until it must answer.

    Raises:
        UsageError: R860 and R861 (what cannot be served together), R862 (port in use), R863 (open to others without
            keys), R844 (the file of keys), R867 (no vLLM); R1xx recipe, R3xx models, R4xx references, R5xx cluster.
        RunFailed: R864, the server did not start.
    """
    from rayft.runtime import session

    sources: list[Any] = [] if source is None else list(source) if isinstance(source, list | tuple) else [source]
    planned = replace(plan(sources, overrides), attach=attach)
    section = planned.recipe.serve
    check_keys(planned.recipe, section.host, insecure)
    if session.existing() is None:
        check_address(section.host, section.port)
        check_vllm(planned)
    address = session.connect(planned.recipe)
    listening = _listening()
    host, port = listening or (section.host, section.port or _free_port(section.host))
    check_keys(planned.recipe, host, insecure)
    if listening is None:
        check_address(host, port)
    register(planned)
    return _start(planned, address, host, port, patience)


def check_keys(recipe: Recipe, host: str, insecure: bool) -> None:
    """Raises UsageError R863 where others reach the server and need no key, R844 for a damaged file of keys."""
    if recipe.serve.api_keys:
        keys.read(Path(recipe.serve.api_keys))
    if not (_is_loopback(host) or recipe.serve.api_keys or insecure):
        raise UsageError(
            "R863",
            f"{host} is reachable for others, and no API keys are asked for",
            "rayft keys add --file keys.json NAME and serve.api_keys=keys.json, or --insecure",
        )


def check_address(host: str, port: int) -> None:
    """Raises UsageError R862 for a port that is in use, or an address that is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError("R862", f"cannot listen on {host}:{port}: {error.strerror}", "serve.port=...") from error


def check_vllm(planned: Plan) -> None:
    """Raises UsageError R867 where vLLM is to answer, and is not there."""
    if planned.attach is not None:
        from rayft.serve.vllm_client import address

        try:
            with urllib.request.urlopen(f"{address(planned.attach)}/v1/models", timeout=10):
                return
        except (OSError, ValueError) as error:
            raise UsageError("R867", f"the vLLM at {planned.attach} does not answer: {error}") from error
    if planned.recipe.serve.backend == "vllm":
        from rayft.serve.vllm_process import program

        program(planned.recipe.serve, planned.base)


def register(planned: Plan) -> None:
    """Adapters that were named at the start become versions of the registry, and the ones that are served."""
    from rayft.runs.registry import Registry

    registry = Registry(planned.registry)
    for name, trained in planned.adapters.items():
        version = registry.register(name, trained.path, allow_same=True, source=planned.sources[name])
        if version.stage != "production":
            registry.promote(name, version.number)


def application_name(server: str) -> str:
    return f"rayft-{server}"


def bind(planned: Plan) -> Any:
    """The application that Ray Serve runs on the connected cluster, sized for it.

    Raises UsageError: R503 to R508, the cluster has no room.
    """
    from rayft.serve.deployments import application

    if planned.attach is not None:
        return application(planned, "cpu", None, {})
    placement = _place(planned.recipe)
    device = "gpu" if placement.use_gpu else "cpu"
    threads = None if placement.use_gpu else placement.cpus_per_worker
    return application(planned, device, threads, placement.resources)


def _start(planned: Plan, address: str, host: str, port: int, patience: float) -> Server:
    from ray import serve
    from ray.serve.config import HTTPOptions

    app, name = bind(planned), application_name(planned.name)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    try:
        serve.run(app, name=name, route_prefix="/")
    except Exception as error:
        serve.delete(name)
        raise RunFailed("R864", f"the server did not start: {_last_line(error)}") from error
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    _wait(url, patience)
    return Server(planned.name, url, (planned.base_name, *planned.adapters), planned.folder, address)


def _listening() -> tuple[str, int] | None:
    """Where Ray Serve listens on this cluster, if it runs already; that cannot be changed under other applications."""
    from ray.serve.context import _get_global_client  # Ray Serve does not say it publicly

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


def _place(recipe: Recipe) -> Any:
    """One engine per replica; on CPUs the cores of a node are shared out among the engines on it."""
    from rayft.runtime import preflight
    from rayft.runtime.cluster import snapshot

    cluster = snapshot()
    replicas = recipe.serve.replicas
    low, high = replicas if isinstance(replicas, tuple) else (replicas, replicas)
    cpus = recipe.scale.cpus_per_worker
    if cpus is None and not cluster.total("GPU"):
        largest = max(node.total.get("CPU", 1) for node in cluster.nodes)
        cpus = max(1, min(int(largest), int(cluster.total("CPU") / high)))
    scale = recipe.scale.model_copy(update={"workers": (low, high), "cpus_per_worker": cpus, "strategy": "ddp"})
    return preflight.check(recipe.model_copy(update={"scale": scale}))


def _wait(url: str, patience: float) -> None:
    """Until /health answers 200."""
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > until:
                raise RunFailed("R864", f"the server did not answer within {patience:.0f} s: {error}") from error
            time.sleep(0.2)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
