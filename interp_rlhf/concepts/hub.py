"""The Hub: files of a commit, and one commit with some files.

In: a repository's id and a revision. Out: bytes, the SHA of a commit, or one error that says what is missing. It must not know
what is in the files.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOKEN_ADVICE = "Log in with `hf auth login`, or set `HF_TOKEN` to a token with the right to do so."


def require_repo_id(repo_id: str) -> None:
    """Raises `ValueError` for what is not `owner/name`."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
        raise ValueError(f"`{repo_id}` – expected a repository on the Hub, `owner/name`.")


def commit_of(repo_id: str, revision: str) -> str:
    """SHA of the commit that a branch or tag stands for. A whole SHA is returned as it is, without a connection.

    Raises:
        `OSError`: the Hub cannot be reached, or has no such repository or revision.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    with _readable_errors(repo_id, revision):
        sha = HfApi().model_info(repo_id, revision=revision).sha
    if sha is None:
        raise OSError(f"`{repo_id}` has no commit at revision `{revision}` – expected one. Push a card first.")
    return sha


def file_of(repo_id: str, commit: str, name: str) -> bytes:
    """Content of a file at a commit, from the Hub or its cache on this machine.

    Raises:
        `OSError`: the Hub cannot be reached, or has no such repository, commit or file.
    """
    from huggingface_hub import hf_hub_download

    with _readable_errors(repo_id, commit, name):
        path = hf_hub_download(repo_id, name, revision=commit)
    return Path(path).read_bytes()


def commit_files(
    repo_id: str,
    files_at: Callable[[Callable[[str], bytes | None]], dict[str, bytes]],
    *,
    private: bool,
    branch: str | None,
    message: str,
) -> str:
    """Put files into a repository in one commit. The repository and the branch are made if there are none.

    Args:
        files_at: called with a function that reads a file of the last commit (None if there is none). Returns the files.
        branch (`str`, *optional*): None is `main`.

    Returns:
        `str`: SHA of the commit. If nothing differs there is no new commit, and it is the SHA of the last one.

    Raises:
        `OSError`: the Hub cannot be reached, refuses the token, or somebody else has pushed in the meantime.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, revision = HfApi(), branch or "main"
    with _readable_errors(repo_id, revision):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in info.siblings or []}

    def last(name: str) -> bytes | None:
        return file_of(repo_id, info.sha or revision, name) if name in there else None

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files_at(last).items()]
    with _readable_errors(repo_id, revision):
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=branch, parent_commit=info.sha
        )
    return str(commit.oid)


@contextmanager
def _readable_errors(repo_id: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Errors of the Hub's library as one `OSError` that says what to do."""
    from huggingface_hub import errors

    # Without a connection, the Hub's HTTP library raises its own errors. The Hub's error class derives from them.
    unreachable: tuple[type[BaseException], ...] = (errors.LocalEntryNotFoundError, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"`{repo_id}` is gated, and your token has no access – expected access. Ask for it on the repository's page."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"`{repo_id}` is not on the Hub, or is private and your token may not see it – expected a repository "
            f"`owner/name`. {TOKEN_ADVICE}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(
            f"`{repo_id}` has no revision `{revision}` – expected a branch, a tag or the SHA of a commit."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise OSError(
            f"`{repo_id}` has no file `{name}` at `{revision}` – expected a repository that `interp-rlhf card push` has filled."
        ) from error
    except errors.HfHubHTTPError as error:
        raise OSError(_answered(repo_id, revision, error.response.status_code, error.server_message)) from error
    except unreachable as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"The Hub could not be reached for `{repo_id}` at `{revision}` ({said[0]}) – expected a connection. Check it, and "
            "`HF_ENDPOINT` and `HF_HUB_OFFLINE` if they are set."
        ) from error


def _answered(repo_id: str, revision: str, status: int, said: str | None) -> str:
    reason = f" ({' '.join(said.split())})" if said else ""
    if status in (401, 403):
        return f"The Hub refuses this for `{repo_id}`{reason}: no token, or one without the right – expected one. {TOKEN_ADVICE}"
    if status in (409, 412):
        return (
            f"`{repo_id}` has another last commit at `{revision}` than a moment ago{reason} – expected the same. "
            "Somebody else has pushed: push again."
        )
    return f"The Hub answers {status} for `{repo_id}` at `{revision}`{reason} – expected success. Try again later."
