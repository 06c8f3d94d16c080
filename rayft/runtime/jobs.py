"""`rayft submit`: run a recipe as a Ray job, follow its log, and end as it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rayft
from rayft.config import Recipe, load
from rayft.config.document import Document
from rayft.errors import RayftError, RunFailed, RunStopped, UsageError
from rayft.runtime import auth, session
from rayft.runtime.package import pack

STOP_SECONDS = 180
"""How long `ray job stop` lets the driver save before it kills it; Ray's own default is 3 seconds."""


def submit(
    source: str | Path | Mapping[str, Any] | Recipe | None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    follow: bool = True,
    mode: str = "fail",
    entrypoint: Sequence[str] = ("python", "-m", "rayft.train", "recipe.yaml"),
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Submit a recipe to the cluster whose dashboard is at ``address`` ($RAY_API_SERVER_ADDRESS, $RAY_ADDRESS).

    The recipe, the local files it names and this version of rayft are uploaded; the variables in `scale.env` go with
    them by value, into the job's environment only. ``mode`` is fail, resume, overwrite or new. With ``follow`` the
    job's log goes through ``log`` (standard error by default) until the job ends, and its end is this function's:
    it returns when the job succeeded, else it raises.

    Returns ``{"job", "run", "storage", "address", "status"}``. Raises UsageError: R502 token refused, R510 a variable
    of `scale.env` is not set, R511 too large to upload, R512 no dashboard there, R513 storage that only this machine
    has, R515 the job's driver ended with a usage error; RunFailed R514 the job failed; RunStopped R516 it was stopped.
    """
    resolved = load(source, overrides)
    _check_storage(source, overrides)
    recipe = resolved.recipe
    variables = {**session.environment(recipe), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    client = _client(_address(address))
    command = [*entrypoint, *([f"--{mode}"] if mode != "fail" else [])]
    with tempfile.TemporaryDirectory(prefix="rayft-job-") as folder:
        pack(resolved, Path(folder), Path.cwd())
        runtime_env = {"working_dir": folder, "py_modules": [str(Path(rayft.__file__).parent)], "env_vars": variables}
        job = client.submit_job(
            entrypoint=shlex.join(command),
            submission_id=f"rayft-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            runtime_env=runtime_env,
            metadata={"run": recipe.name, "storage": recipe.storage},
        )
    facts = {"job": job, "run": recipe.name, "storage": recipe.storage, "address": client.get_address()}
    if not follow:
        return {**facts, "status": str(client.get_job_status(job))}
    return {**facts, "status": follow_job(client, job, log)}


def follow_job(client: Any, job: str, log: Callable[[str], None] | None = None) -> str:
    """Pass the job's log on until it ends; return its status or raise as `submit` does."""
    write = log or _to_stderr

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            write(lines)

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        raise RunStopped(
            "R516",
            f"no longer following job {job}, which goes on",
            f"ray job logs {job} --follow, or ray job stop {job}",
        ) from None
    except RuntimeError as problem:
        raise RunFailed(
            "R514", f"the cluster went away while job {job} ran: {problem}", "submit it with --resume"
        ) from problem
    info = client.get_job_info(job)
    while not info.status.is_terminal():  # the log can end a moment before the job is written off
        time.sleep(0.5)
        info = client.get_job_info(job)
    if info.status.name == "SUCCEEDED":
        return "SUCCEEDED"
    raise _end(job, info)


def _end(job: str, info: Any) -> RayftError:
    """The error with which a job that did not succeed ends here: the exit code of `rayft train` in it becomes ours."""
    again = "the log above says why; `rayft submit` the recipe again with --resume to go on"
    if info.status.name == "STOPPED" or info.driver_exit_code == RunStopped.exit_code:
        return RunStopped("R516", f"job {job} was stopped", again)
    if info.driver_exit_code == UsageError.exit_code:
        return UsageError("R515", f"job {job} refused the recipe", "the log above says what to change")
    detail = f" (exit code {info.driver_exit_code})" if info.driver_exit_code is not None else f": {info.message}"
    return RunFailed("R514", f"job {job} failed{detail}", again)


def _check_storage(source: Any, overrides: Sequence[str]) -> None:
    """Raises UsageError R513 unless the storage is an absolute path or a URI: it must mean the same over there."""
    if isinstance(source, Recipe):
        storage: str | None = source.storage if "storage" in source.model_fields_set else None
    else:
        document = Document.read(Path(source)) if isinstance(source, str | Path) else Document(dict(source or {}))
        document.data = {"storage": document.data.get("storage")}
        for text in overrides:
            if text.split("=")[0].strip() == "storage":
                document.override(text)
        storage = document.data["storage"]
    if storage is None or not ("://" in storage or os.path.isabs(storage)):
        raise UsageError(
            "R513",
            f"storage is {storage or 'runs'!r}, a folder of this machine; a job runs elsewhere and would lose the run",
            "storage=/a/folder/all/nodes/see or storage=s3://bucket/runs",
        )


def _address(given: str | None) -> str:
    candidates = [given, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS")]
    for address in candidates:
        if address and address.startswith(("http://", "https://")):
            return address.rstrip("/")
    if given:
        raise UsageError("R512", f"--address {given!r} is not a URL", "the dashboard's, such as http://head:8265")
    raise UsageError("R512", "no cluster to submit to", "--address http://head:8265, or set RAY_API_SERVER_ADDRESS")


def _client(address: str) -> Any:
    """A job client that has been heard and, where the cluster wants a token, has shown ours."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not auth.listens(f"{parts.hostname}:{port}"):
        raise UsageError(
            "R512", f"nothing answers at {address}", "is it the dashboard's address (port 8265), and is the tunnel up?"
        )
    logging.getLogger("ray").setLevel(logging.WARNING)  # uploads and sockets are nobody's news
    secret = auth.token()
    headers = {"Authorization": f"Bearer {secret}"} if secret else None
    try:
        client = JobSubmissionClient(address, headers=headers)
        client.list_jobs()
    except AuthenticationError:
        raise auth.refused(address, secret is not None) from None
    except (RuntimeError, ConnectionError, ValueError) as problem:
        raise UsageError(
            "R512", f"what answers at {address} is no Ray dashboard: {problem}", "usually port 8265"
        ) from problem
    return client


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
