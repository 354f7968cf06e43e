"""Heads on the Hugging Face Hub: whether one may be uploaded, and the upload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class AccessError(ValueError):
    """The Hub would refuse an upload; the message says what would do."""


class HubError(OSError):
    """The Hub cannot be reached, or something went wrong there."""


def client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'swift_kernels[hub]'") from error
    return huggingface_hub


def check_access(repo_id: str) -> None:
    """Asks the Hub whether its token may write to `repo_id`, which need not exist; nothing is created.

    Raises:
        AccessError: the name is none for a repository, or there is no token, or one that may not write there.
        HubError: the Hub does not answer.
    """
    hub = client()
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        user = hub.HfApi().whoami()
    except HFValidationError as error:
        raise AccessError(f"{repo_id!r} is no name for a repository of the Hub: {first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise AccessError(
            f"{repo_id} cannot be pushed to without a token of the Hub: run `hf auth login`, or set HF_TOKEN"
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise AccessError(
                f"{repo_id} cannot be pushed to, the Hub does not accept the token: run `hf auth login` for a new one"
            ) from None
        raise HubError(f"the Hub does not say whether {repo_id} can be pushed to: {first_line(error)}") from error
    except Exception as error:  # each version of the library has its own for a network that is down
        raise HubError(f"{repo_id} cannot be pushed to, the Hub does not answer: {first_line(error)}") from error
    owner = repo_id.partition("/")[0] if "/" in repo_id else user["name"]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    if owner not in owners:
        raise AccessError(f"{repo_id} cannot be pushed to: the token of the Hub is for {', '.join(owners)}")
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise AccessError(
            f"{repo_id} cannot be pushed to, the token of {user['name']} is for reading alone: run `hf auth login` "
            "with one that may write"
        )


def upload(
    folder: str | Path,
    repo_id: str,
    names: Sequence[str],
    *,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Uploads these files of a folder, makes the repository where there is none, and returns the commit's address.

    Raises:
        HubError: it failed.
    """
    api = client().HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        return str(api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(names), **options))
    except Exception as error:
        raise HubError(f"{repo_id} was not pushed to: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
