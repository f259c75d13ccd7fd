"""Files of the Hugging Face hub, or one message that says why they cannot be had."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError


def fetch(
    name: str,
    patterns: list[str],
    revision: str | None = None,
    *,
    kind: str = "model",
    instead: str = "--model tiny needs no download",
) -> Path:
    """A repository's files, in the hub's cache; what is not there yet is downloaded.

    Args:
        name: ``owner/name``.
        patterns: of the files.
        revision: None: the newest.
        kind: what it is, for the message.
        instead: what else can be done, for the message.

    Raises:
        ModelError: they cannot be had; says why, and where they were looked for.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=10))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"the {kind} {name}{at} is not here, and cannot be downloaded: {_why_not(error)}",
            where=f"looked in {constants.HF_HUB_CACHE} and on the hub ({constants.ENDPOINT})",
            fix="check the name and the network (export HF_ENDPOINT=https://... names a mirror), or fetch it "
            f"elsewhere with `hf download {name} --local-dir FOLDER` and give --model FOLDER; {instead}",
        ) from error


def is_reached(patience: float = 5.0) -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, answers at all.

    Args:
        patience: seconds to wait for it.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=patience)
    except Exception:  # no connection, no such host, a proxy's refusal, an address that is none: httpx has no one class
        return False
    return True


def _why_not(error: Exception) -> str:
    """Why the hub gave nothing."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its terms must be accepted on the hub first, then `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the hub no longer has this revision; --model NAME@main takes the newest"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or shows it only to others"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so the hub is not asked"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return "the hub cannot be reached"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no more is known'}"
