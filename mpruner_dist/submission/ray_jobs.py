"""Runs as jobs of a Ray cluster, through its Jobs server."""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpruner_dist.config_file import load_config
from mpruner_dist.errors import MPrunerError, Preempted, StageFailure, UserError, first_line
from mpruner_dist.submission.portable import portable

log = logging.getLogger(__name__)

STOP_WAIT_S = 600
"""So long a job that is stopped may take to save before Ray kills it; Ray's own default is 3."""
POLL_S = 1.0
AWAY_S = 300
"""So long a dashboard that was there may not answer."""
LAST_LINES = 20
"""Of what Ray tells of a job that failed, which ends with the end of its log."""
INTERRUPTED = 130


def submit_job(
    config: Path, address: str, run_dir: Path | None, overrides: list[str], env: list[str], *,
    follow: bool, dry_run: bool,
) -> int:  # fmt: skip
    """Submit a run, and follow it to its end if asked to.

    Args:
        config: the YAML file.
        address: of the dashboard, http://HEAD:8265.
        run_dir: on storage that all nodes share.
        overrides: `a.b=c` each.
        env: `NAME=value` each, for the job and its workers.
        follow: print its log until it ends.
        dry_run: print what would be submitted instead.

    Returns:
        The job's exit code; 0 if it is not followed, 130 if following was interrupted.

    Raises:
        UserError: a mistake in any of these, or a token that the cluster does not take.
        StageFailure: nobody answers at the address, or the cluster refuses the job.
    """
    settings = portable(load_config(config, overrides))
    folder = (run_dir or Path("runs") / config.stem).expanduser().absolute()
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)} | _variables(env)
    # whether or not the head has GPUs, the driver is on none
    entrypoint = f"CUDA_VISIBLE_DEVICES= {shlex.join(['python', '-m', 'mpruner_dist', 'run', config.name])}"
    entrypoint += f" --run-dir {shlex.quote(str(folder))}"
    if dry_run:
        print(f"address: {address}\nentrypoint: {entrypoint}\nvariables: {' '.join(variables)}\n{settings.to_yaml()}")
        return 0
    client = _connect(address)
    with TemporaryDirectory() as sent, _refusals(address):
        (Path(sent) / config.name).write_text(settings.to_yaml())
        job = client.submit_job(
            entrypoint=entrypoint,
            runtime_env={"working_dir": sent, "env_vars": variables},
            metadata={"run_dir": str(folder)},
            # with a number of CPUs the driver would go to any node, and take them from a worker; without, to the head
            entrypoint_num_gpus=0,
        )
    log.info("submitted as %s; run folder %s, which all nodes must share", job, folder)
    log.info("mpruner submit status %s --address %s; mpruner submit stop %s --address %s", job, address, job, address)
    if not follow:
        print(job)
        return 0
    return _follow(client, job, address)


def job_status(job: str, address: str) -> str:
    """A line on a job; of one that failed, the end of its log too.

    Raises:
        UserError: no such job, or a token that the cluster does not take.
        StageFailure: nobody answers at the address.
    """
    client = _connect(address)
    with _refusals(address, job):
        details = client.get_job_info(job)
    state, begun = details.status.value, details.start_time or 0
    seconds = ((details.end_time or time.time() * 1000) - begun) / 1000
    code = "" if details.driver_exit_code is None else f" with exit code {details.driver_exit_code}"
    folder = (details.metadata or {}).get("run_dir")
    line = f"{job}: {state}{code}, {seconds:.0f} s since it was submitted" + (
        f"; run folder {folder}" if folder else ""
    )
    if state in ("RUNNING", "SUCCEEDED"):
        return line
    return "\n".join([line, *(details.message or "").strip().splitlines()[-LAST_LINES:]])


def stop_job(job: str, address: str) -> str:
    """Ask a job to save and end, and wait until it has.

    Returns:
        A line on how it ended.

    Raises:
        UserError: no such job, or a token that the cluster does not take.
        StageFailure: nobody answers at the address.
    """
    client = _connect(address)
    with _refusals(address, job):
        if not client.stop_job(job):
            return f"{job} is not running: {client.get_job_status(job).value}"
        log.info("asked %s to save and end; Ray kills it after %d s", job, STOP_WAIT_S)
        details = _await_end(client, job)
        said = [line for line in client.get_job_logs(job).splitlines() if line.startswith("mpruner: ")]
    return "\n".join([f"{job}: {details.status.value}; the same submission goes on", *said[-1:]])


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--env {entry!r}: write NAME=value, such as HF_HOME=/shared/hub")
        if name.startswith("RAY_AUTH"):
            raise UserError(f"--env {name}: the cluster has its token; all who may see the job would see it here")
        variables[name] = value
    return variables


def _connect(address: str) -> Any:
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: write the address of the dashboard, such as http://HEAD:8265 (not ray://, and not "
            "the port that cluster.address names)"
        )
    from ray.job_submission import JobSubmissionClient

    for name in ("job.sdk", "dashboard_sdk"):  # they report what is said here
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would take the place of what is given
    with _refusals(address):
        return JobSubmissionClient(address)


@contextmanager
def _refusals(address: str, job: str | None = None) -> Iterator[None]:
    """Say in our words what the client of the Jobs server raises."""
    import requests  # as Ray's client does
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} refuses: {first_line(error)}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH (default ~/.ray/auth_token) to the cluster's token"
        ) from error
    except (ConnectionError, requests.exceptions.ConnectionError) as error:
        raise StageFailure(
            f"nobody answers at {address}: is it the address of the dashboard, can this machine reach it, and was Ray "
            f"installed as ray[default] on the head? ({first_line(error)})"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if job and "404" in str(error):
            raise UserError(f"the Ray cluster at {address} knows no job {job}; `ray job list` names them") from error
        raise StageFailure(f"the Ray cluster at {address} refuses: {first_line(error)}") from error


def _follow(client: Any, job: str, address: str) -> int:
    try:
        asyncio.run(_print_log(client, job))
        with _refusals(address, job):
            details = _await_end(client, job)
    except KeyboardInterrupt:
        log.info(
            "not followed any more; the job goes on. To stop it: mpruner submit stop %s --address %s", job, address
        )
        return INTERRUPTED
    return _exit_code(details)


async def _print_log(client: Any, job: str) -> None:
    import aiohttp

    try:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()
    except (aiohttp.ClientError, RuntimeError, OSError) as error:
        log.warning("the log of %s broke off (%s); waiting for its end", job, first_line(error))


def _await_end(client: Any, job: str) -> Any:
    """How the job ended; a dashboard that is away for a while does not end the waiting, for the job goes on."""
    away_since = None
    while True:
        try:
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            away_since = None
        except (OSError, RuntimeError) as error:
            if away_since is None:
                log.warning("how %s is cannot be asked (%s); trying for %d s", job, first_line(error), AWAY_S)
                away_since = time.monotonic()
            if "404" in str(error) or time.monotonic() - away_since > AWAY_S:
                raise
        time.sleep(POLL_S)


def _exit_code(details: Any) -> int:
    """That of the command; of a job that was stopped, for which Ray keeps none, that of a run that goes on."""
    state, code = details.status.value, details.driver_exit_code
    if state == "STOPPED":
        log.warning("the job was stopped; the same submission goes on")
        return Preempted.exit_code
    if state == "FAILED" and code is None:
        log.warning("the job failed before or beside its command: %s", details.message)
    if state == "FAILED" and not (code and 0 < code < 256):
        return MPrunerError.exit_code
    return int(code or 0)
