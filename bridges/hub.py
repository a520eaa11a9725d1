"""From the name that the user typed to a folder on this machine; a branch becomes a commit.

With HF_HUB_OFFLINE=1 no call is made and the hub cache answers.
"""

import re
from pathlib import Path

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from bridges.trust import COMMIT, DenseConfig, Folder, check_pinned
from extractor.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")
FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
# other formats of the same weights: sub-folders (onnx/, original/), Mistral's own layout
DUPLICATES = ["*/*", "consolidated*"]


def resolve_folder(config: DenseConfig) -> Folder:
    """The checkpoint's folder: itself, or the hub cache's snapshot of a commit.

    Raises:
        InputError: a hub model that cannot be had, with what to do; a revision for a plain folder.
        UsageError: a hub model whose code is trusted at a revision that can move.
    """
    path = Path(config.path).expanduser()
    if path.exists() or not HUB_ID.fullmatch(config.path):
        folder = _local(path, config.path)
        if config.revision not in (None, folder.commit):
            raise InputError(
                f"dense.revision {config.revision!r} is for hub ids; '{config.path}' is a folder here"
            )
        return folder
    check_pinned(config)
    try:
        snapshot = snapshot_download(
            config.path,
            revision=config.revision,
            **file_patterns(config),
            local_files_only=is_offline_mode(),
        )
    except Exception as error:  # the hub's errors, and its HTTP library's, share no base class
        raise _explain(config, error) from error
    return Folder(Path(snapshot), Path(snapshot).name, config.path)


def file_patterns(config: DenseConfig) -> dict[str, list[str]]:
    """Which files of a hub model are fetched: pickled weights and code only where they are allowed."""
    pickled = ["*.bin"] if config.allow_pickle else []
    code = ["*.py"] if config.trust_remote_code else []
    weights = ["*.safetensors", "*.bin"] if config.random_weights else []
    return {"allow_patterns": [*FILES, *pickled, *code], "ignore_patterns": [*DUPLICATES, *weights]}


def check_blobs(folder: Folder, hashes: dict[str, str]) -> None:
    """Refuse files of the hub cache that are no longer what was downloaded.

    The cache names a large file by its SHA-256, so a flipped bit shows.

    Args:
        hashes: SHA-256 by file name, of files in the folder.
    """
    for name, sha256 in hashes.items():
        blob = (folder.path / name).resolve()
        if folder.commit and len(blob.name) == len(sha256) and blob.name != sha256:
            raise InputError(
                f"'{blob}' in the hub cache has changed (SHA-256 {sha256[:12]}, downloaded as "
                f"{blob.name[:12]}); delete that file and run again online"
            )


def _local(path: Path, name: str) -> Folder:
    """A folder of the user's; one inside a hub cache knows its commit and its id."""
    real = path.resolve()
    cached = CACHE_FOLDER.fullmatch(real.parent.parent.name)
    if real.parent.name == "snapshots" and COMMIT.fullmatch(real.name) and cached:
        return Folder(path, real.name, "/".join(cached.groups()))
    return Folder(path, None, name)


def _explain(config: DenseConfig, error: Exception) -> InputError:
    """One line: what failed and what to do about it."""
    name, page = config.path, f"{constants.ENDPOINT}/{config.path}"
    status = _http_status(error)
    if isinstance(error, GatedRepoError):
        text = f"'{name}' is gated: accept its terms on {page} and set HF_TOKEN to a token of that account"
    elif isinstance(error, RevisionNotFoundError):
        text = f"'{name}' has no revision '{config.revision}'; see {page}/commits"
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        text = (
            f"no folder '{name}' here, and no hub model of that name that you may read; check {page}, and "
            "set HF_TOKEN if it is private"
        )
    elif status == 429:
        text = f"the hub limits your requests (429) for '{name}'; wait some minutes, or set HF_TOKEN"
    elif status is not None:
        text = f"the hub answered {status} for {page}; try again later"
    elif is_offline_mode():
        text = (
            f"no folder '{name}' here, and revision '{config.revision or 'main'}' of that hub model is not "
            f"whole in the cache '{constants.HF_HUB_CACHE}'; unset HF_HUB_OFFLINE to fetch it, or give a "
            "folder"
        )
    else:
        text = (
            f"no folder '{name}' here, and the hub model {page} cannot be fetched ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:200]}); check the connection, or give a folder"
        )
    return InputError(text)


def _http_status(error: BaseException | None) -> int | None:
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None
