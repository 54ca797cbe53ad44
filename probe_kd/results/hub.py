"""An exported folder on the Hugging Face hub: uploaded where it was asked for, and never otherwise."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from probe_kd.errors import RunError, short

_TOKEN = "log in by `hf auth login`, or set HF_TOKEN to a token that may write"


def check_hub(repo_id: str, *, overwrite: bool = False) -> None:
    """Check, before anything is written, that a folder can be uploaded to a repository `ORG/NAME`.

    Raises RunError for a name that is none, without a token or the hub, and for a repository that exists unless
    `overwrite` is set.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise RunError(f"--push-to-hub {repo_id!r}: expected ORG/NAME, an account and the name of the model")
    api = HfApi()
    with _told(f"cannot upload to {repo_id}"):
        api.whoami()
        exists = api.repo_exists(repo_id)
    if exists and not overwrite:
        raise RunError(f"{repo_id} exists on the hub; --overwrite adds a commit to it")


def push(folder: Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a folder as one commit of a repository, which is made if there is none. Returns its address.

    `private` counts for a new repository. Raises RunError if the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _told(f"the export is in {folder}, and cannot be uploaded to {repo_id}"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of probe-kd")
    return str(address)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the errors of the hub, of its client and of the network into one RunError, which says first `what` fails."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise RunError(f"{what}: there is no token of the Hugging Face hub; {_TOKEN}") from None
    except OfflineModeIsEnabled:
        raise RunError(f"{what}: HF_HUB_OFFLINE keeps the hub out; unset it") from None
    except HfHubHTTPError as refusal:
        status = getattr(getattr(refusal, "response", None), "status_code", None)
        why = f"the token is not accepted (status {status}); {_TOKEN}" if status in (401, 403) else short(refusal)
        raise RunError(f"{what}: {why}") from refusal
    except Exception as refusal:  # the network, in the words of many libraries
        raise RunError(f"{what}: the Hugging Face hub is not reached ({short(refusal)})") from refusal
