"""Cards as people share them: `push_card` puts a card with all its files on the Hub, `pull_card` fetches and checks it.

In: a card, or a repository. Out: one commit, or files in a folder with the commit that they come from. It must not know models.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..concepts.card import load_card
from ..concepts.card_files import digests_of, files_of, place, require_placeable, require_plain
from ..concepts.hub import commit_files, commit_of, file_of, require_repo_id
from .card_page import PAGE, card_page, named_card

if TYPE_CHECKING:
    from collections.abc import Callable

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class PushedCard:
    """What `push_card` has shared.

    Attributes:
        repo_id (`str`): the repository.
        revision (`str`, *optional*): SHA of the commit. None for a dry run.
        files (`dict[str, str]`): SHA-256 of each file, by its name.
    """

    repo_id: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class PulledCard:
    """What `pull_card` has fetched.

    Attributes:
        path (`Path`): the card.
        source (`str`): the repository or folder that it comes from.
        revision (`str`, *optional*): SHA of the commit. None for a folder.
        files (`dict[str, str]`): SHA-256 of each file, by its name.
        written (`list[str]`): files that were not there before.
    """

    path: Path
    source: str
    revision: str | None
    files: dict[str, str]
    written: list[str]


def push_card(
    card: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: str | Path | None = None,
) -> PushedCard:
    """Share a card on the Hub: the card, its artifact, its holdout cards, a page and `SHA256SUMS`, in one commit.

    Args:
        card (`str` or `Path`): the card's YAML file.
        repo_id (`str`): `owner/name`. The repository is made if there is none.
        private (`bool`, *optional*, defaults to `False`): make a private repository. One that exists stays as it is.
        revision (`str`, *optional*): branch of the commit; made if there is none (default: `main`).
        message (`str`, *optional*): message of the commit.
        dry_run (`str` or `Path`, *optional*): a folder. The files are written there, and nothing is sent.

    Returns:
        `PushedCard`: the commit's SHA and the digest of each file.

    Raises:
        `FileNotFoundError`: the card, an artifact or a holdout card is missing.
        `OSError`: the Hub cannot be reached, or refuses the token.
        `ValueError`: the card does not describe its artifact, or the repository has other content under a file's name (a
            released card is never edited) or the page of something else.

    Example:
        >>> from pathlib import Path
        >>> from interp_rlhf import push_card
        >>> push_card("warmth.yaml", "me/warmth", dry_run="shared").revision is None
        True
        >>> sorted(path.name for path in Path("shared").iterdir())
        ['README.md', 'SHA256SUMS', 'warmth.safetensors', 'warmth.yaml']
    """
    require_repo_id(repo_id)
    loaded = load_card(card)
    files = files_of(loaded)
    if reserved := sorted({PAGE, SUMS} & set(files)):
        raise ValueError(f"`{card}` has a file named `{reserved[0]}` – expected another name: the shared page has it.")
    page = card_page(loaded, repo_id).encode()
    if dry_run is not None:
        shared = _with_sums(files, page, lambda name: None, str(dry_run))
        require_placeable(shared, Path(dry_run))
        place(shared, dry_run)
        return PushedCard(repo_id, None, digests_of({**files, PAGE: page}))
    named = f"{loaded.card.name}, version {loaded.card.version}"
    commit = commit_files(
        repo_id, lambda last: _with_sums(files, page, last, repo_id), private=private, branch=revision,
        message=message or f"Share {named}",
    )  # fmt: skip
    return PushedCard(repo_id, commit, digests_of({**files, PAGE: page}))


def pull_card(
    source: str | Path, out: str | Path, *, revision: str = "main", card: str | None = None, force: bool = False
) -> PulledCard:
    """Fetch a shared card with all its files, check them, and write down the commit that they come from.

    Every file must have the SHA-256 that `SHA256SUMS` says, and the artifact the one that the card says. All files are checked
    before one is written. `<card>.lock.json` holds the repository, the commit and the digests.

    Args:
        source (`str` or `Path`): `owner/name` on the Hub, or a folder that `push_card(..., dry_run=folder)` wrote.
        out (`str` or `Path`): folder for the files.
        revision (`str`, *optional*, defaults to `"main"`): SHA of a commit, or a branch or tag, which is resolved to one.
        card (`str`, *optional*): file name of the card (default: the one that the repository's page is about).
        force (`bool`, *optional*, defaults to `False`): replace other files under the same names.

    Returns:
        `PulledCard`: the card's path, the commit and the digest of each file.

    Raises:
        `OSError`: the Hub cannot be reached, or has no such repository, revision or file.
        `ValueError`: a file has another digest, the repository has no card, or `out` holds other files under the same names.

    Example:
        >>> from interp_rlhf import pull_card, push_card
        >>> pushed = push_card("warmth.yaml", "me/warmth", dry_run="shared")
        >>> pulled = pull_card("shared", "cards")
        >>> pulled.path.as_posix(), pulled.files["warmth.yaml"] == pushed.files["warmth.yaml"]
        ('cards/warmth.yaml', True)
    """
    source, out, commit = str(source), Path(out), None
    if (Path(source) / SUMS).is_file():
        fetch = partial(_file_in, Path(source))
    else:
        require_repo_id(source)
        commit = commit_of(source, revision)
        fetch = partial(file_of, source, commit)
    where = f"{source}@{commit}" if commit else source
    sums = _listed_digests(fetch(SUMS).decode("utf-8", "replace"), where)
    checked = _Checked(fetch, sums, where)
    name = card or named_card(checked(PAGE).decode("utf-8", "replace"))
    if name is None:
        raise ValueError(
            f"`{where}` names no card in its `{PAGE}` – expected one. Name the file: `--card reward.v1.yaml`."
        )
    files = _card_and_its_files(name, checked, where)
    digests = digests_of(files)
    lock = f"{Path(name).stem}.lock.json"
    entry = {"source": source, "revision": commit, "card": name, "files": digests}
    if force or not _is_locked(out / lock, digests):
        files[lock] = (json.dumps(entry, indent=2) + "\n").encode()
    require_placeable({} if force else files, out)
    return PulledCard(out / name, source, commit, digests, place(files, out))


def _file_in(folder: Path, name: str) -> bytes:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"`{folder}` has no file `{name}` – expected all files that `{SUMS}` lists. Copy it again."
        )
    return (folder / name).read_bytes()


class _Checked:
    """Reads a file and holds it against its digest."""

    def __init__(self, fetch: Callable[[str], bytes], sums: dict[str, str], where: str):
        self._fetch, self._sums, self._where = fetch, sums, where

    def __call__(self, name: str) -> bytes:
        require_plain(name, self._where)
        if name not in self._sums:
            known = ", ".join(f"`{file}`" for file in sorted(self._sums)) or "nothing"
            raise ValueError(
                f"`{self._where}` does not list `{name}` in `{SUMS}` – expected it there; it lists {known}."
            )
        data = self._fetch(name)
        if (digest := digests_of({name: data})[name]) != self._sums[name]:
            raise ValueError(
                f"`{name}` of `{self._where}` has SHA-256 {digest} – `{SUMS}` says {self._sums[name]}. It was changed after the "
                "push, or did not arrive whole. Nothing was written: ask who shared it."
            )
        return data


def _card_and_its_files(name: str, checked: _Checked, where: str) -> dict[str, bytes]:
    """Files of a card, the card last. They are checked against each other in a folder that nobody else sees."""
    with tempfile.TemporaryDirectory() as aside:
        wanted, written = [name], set()
        try:
            while wanted:
                current = wanted.pop()
                written.add(current)
                path = Path(aside) / current
                if path.suffix not in (".yaml", ".yml", ".safetensors"):
                    raise ValueError(
                        f"`{where}/{current}` – expected a card (`.yaml`) or an artifact (`.safetensors`)."
                    )
                path.write_bytes(checked(current))
                if path.suffix != ".safetensors":
                    loaded = load_card(path).card
                    wanted += [
                        file for file in (loaded.readout.artifact.path, *loaded.holdouts) if file not in written
                    ]
            return files_of(load_card(Path(aside) / name))
        except ValueError as error:
            raise ValueError(str(error).replace(f"{aside}/", f"{where}/")) from None


def _with_sums(
    files: dict[str, bytes], page: bytes, last: Callable[[str], bytes | None], where: str
) -> dict[str, bytes]:
    """The files, the page and `SHA256SUMS`, which goes on listing what was shared before.

    Args:
        last: content of a file that is shared already, or None.

    Raises:
        `ValueError`: other content is shared under the name of one of the files, or a page that `push_card` has not written.
    """
    changed = [name for name, data in sorted(files.items()) if last(name) not in (None, data)]
    if changed:
        raise ValueError(
            f"`{where}` has other content under {', '.join(f'`{name}`' for name in changed)} – expected new names: a released "
            "card is never edited. Make the next version (`interp-rlhf card new`), or choose another repository."
        )
    there = last(PAGE)
    if there is not None and named_card(there.decode("utf-8", "replace")) is None:
        raise ValueError(
            f"`{where}` has a `{PAGE}` that is not the page of a card – expected none: it would be overwritten. Choose another "
            "repository for the card, such as a new one."
        )
    before = _listed_digests((last(SUMS) or b"").decode("utf-8", "replace"), where)
    listed = before | digests_of({**files, PAGE: page})
    text = "".join(f"{listed[name]}  {name}\n" for name in sorted(listed))
    return {**files, PAGE: page, SUMS: text.encode()}


def _listed_digests(text: str, where: str) -> dict[str, str]:
    """Digests of `SHA256SUMS`, by file."""
    digests = {}
    for number, line in enumerate(text.splitlines(), start=1):
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if found is None:
            raise ValueError(
                f"Line {number} of `{SUMS}` of `{where}` is `{line[:80]}` – expected a SHA-256, two spaces and a file name."
            )
        digests[found[2]] = found[1]
    return digests


def _is_locked(path: Path, digests: dict[str, str]) -> bool:
    """True if a lock lists the same files, from any commit. It then stays."""
    try:
        return bool(json.loads(path.read_bytes())["files"] == digests)
    except (OSError, ValueError, KeyError, TypeError):
        return False
