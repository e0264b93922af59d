"""Cards as people look at them, compare them, derive new ones and share them, through the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, Hub, Repository
from markdown_it import MarkdownIt

from interp_rlhf.cli import main
from interp_rlhf.commands.evidence_chart import WIDTH, Axis
from interp_rlhf.concepts.card import load_card

ROOT = Path(__file__).resolve().parent.parent
WARMTH = ROOT / "reward" / "warmth"


@pytest.fixture
def cards(tmp_path):
    """A copy of the shipped cards of version 3."""
    folder = tmp_path / "cards"
    folder.mkdir()
    for name in ("reward.v3.yaml", "monitor.v3.yaml", "warmth.v3.safetensors", "warmth-holdout.v3.safetensors"):
        shutil.copy(WARMTH / name, folder)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words, capsys) -> dict:
    assert main(["card", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_axis_puts_equal_numbers_in_the_same_column_and_one_at_its_end():
    axis = Axis(0.22)  # starts at 0.2, so that 0.6 lies in the middle
    assert axis.start == 0.2
    assert [axis(value) for value in (0.1, 0.2, 0.6, 1.0)] == [0, 0, (WIDTH - 1) // 2, WIDTH - 1]
    row = axis.drawn({0.6: "●"}, (0.52, 0.68))  # 0.08 is a tenth of the axis
    assert [row.index(mark) for mark in "├●┤"] == [20, 25, 30]
    assert row.index("┊") == axis(0.5)
    assert Axis(0.9).start == 0.4  # chance is always on the axis


def test_show_draws_every_number_of_the_evidence(cards, capsys):
    assert main(["card", "show", str(cards / "reward.v3.yaml")]) == 0
    shown = capsys.readouterr().out
    loaded = load_card(cards / "reward.v3.yaml")
    found = loaded.card.evidence.held_out
    rows = [found.probe, found.tfidf, found.length, found.punctuation, found.embedding, *found.likelihood.values()]
    rows += [
        found.prompt.tfidf,
        found.prompt.probe,
        found.prompt.within,
        found.prompt.other_answers,
        found.measures["vader"],
    ]
    for estimate in rows:
        assert f"{estimate.auroc:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" in shown
    for control in (found.permutation, found.random_direction):
        assert f"p95 {control.p95:.3f} of {control.repeats}" in shown
    assert f"{found.adds.auroc.value:+.3f}" in shown
    assert "slope 1.46" in shown
    assert "canaries   4 sequences" in shown
    for digest in (loaded.sha256, loaded.card.readout.artifact.sha256, loaded.card.model.identity):
        assert digest in shown
    assert "gate: may be a reward" in shown
    chart = [line for line in shown.splitlines() if "●" in line and "interval" not in line]
    assert len(chart) == len(rows) + 1  # TF-IDF of prompt and completion together
    assert run("show", cards / "reward.v3.yaml", capsys=capsys)["passed"]


def test_show_says_why_a_card_without_evidence_may_be_a_monitor_only(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    (cards / "bare.yaml").write_text(text[: text.index("evidence:")])
    assert main(["card", "show", str(cards / "bare.yaml")]) == 0
    assert "gate: may be a monitor only\n  - it has no evidence" in capsys.readouterr().out


def test_show_refuses_a_card_whose_artifact_was_changed(cards, capsys):
    artifact = cards / "warmth.v3.safetensors"
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    assert main(["card", "show", str(cards / "reward.v3.yaml")]) == 2
    assert "was changed or swapped" in capsys.readouterr().err


def test_diff_lists_what_differs_and_its_exit_code_says_if_the_cards_read_the_same(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    (cards / "lighter.yaml").write_text(
        text.replace("weight: 1.0", "weight: 0.5").replace("auroc: 0.9241", "auroc: 0.9")
    )
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "lighter.yaml")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^weight +1\.0 → 0\.5$", shown, re.M)
    assert re.search(r"^evidence\.held_out\.probe +0\.9241 \[.*\] → 0\.9 \[.*\]  intervals overlap$", shown, re.M)
    assert "they read the same" in shown
    (cards / "other.yaml").write_text(text.replace("pooling: mean", "pooling: ema_max"))
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "other.yaml"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [difference["key"] for difference in found["differences"]] == ["readout.pooling"]
    assert not found["same_readout"]
    assert main(["card", "diff", str(cards / "reward.v3.yaml"), str(cards / "reward.v3.yaml")]) == 0
    assert "the cards say the same" in capsys.readouterr().out


def test_diff_says_where_intervals_lie_apart(cards, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    apart = text.replace(
        "auroc: 0.9241\n      low: 0.8809\n      high: 0.9639", "auroc: 0.6\n      low: 0.5\n      high: 0.7"
    )
    (cards / "apart.yaml").write_text(apart)
    found = run("diff", cards / "reward.v3.yaml", cards / "apart.yaml", capsys=capsys)["differences"]
    assert [(difference["key"], difference["overlap"]) for difference in found] == [("evidence.held_out.probe", False)]


def test_a_new_card_keeps_its_evidence_as_long_as_it_reads_the_same(cards, tmp_path, capsys):
    before = content_of(cards)
    made = run(
        "new", cards / "reward.v3.yaml", "--role", "penalty", "--weight", 0.2, "--transform=-1,2,-3,3", capsys=capsys
    )
    assert made["evidence_kept"]
    assert made["passed"]
    old, new = load_card(cards / "reward.v3.yaml").card, load_card(cards / "penalty.v4.yaml").card
    assert (new.role, new.weight, new.version, new.evidence) == ("penalty", 0.2, 4, old.evidence)
    assert (new.transform.mean, new.transform.std, new.transform.clip) == (-1, 2, [-3, 3])
    made = run("new", cards / "reward.v3.yaml", "--pooling", "ema_max", "--out", tmp_path / "elsewhere", capsys=capsys)
    assert not made["evidence_kept"]
    elsewhere = load_card(tmp_path / "elsewhere" / "reward.v4.yaml").card
    assert (elsewhere.readout.pooling, elsewhere.evidence) == ("ema_max", None)
    assert sorted(content_of(tmp_path / "elsewhere")) == [
        "monitor.v3.yaml", "reward.v4.yaml", "warmth-holdout.v3.safetensors", "warmth.v3.safetensors",
    ]  # fmt: skip
    assert {name: data for name, data in content_of(cards).items() if name in before} == before


def test_the_first_card_of_an_artifact_says_what_the_artifact_says(cards, capsys):
    made = run("new", cards / "warmth.v3.safetensors", "--role", "monitor", "--concept", "Warm.", capsys=capsys)
    card, shipped = load_card(made["card"]).card, load_card(cards / "reward.v3.yaml").card
    assert (card.name, card.version, card.role, card.concept) == ("warmth", 1, "monitor", "Warm.")
    assert (card.model, card.readout.artifact) == (shipped.model, shipped.readout.artifact)
    assert card.evidence is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected a change"),
        (["--version", "7"], "expected a change"),
        (["--weight", "2", "--version", "3"], r"reward\.v3\.yaml` exists – expected a new version"),
        (["--version", "0"], "expected at least 1"),
        (["--weight", "-1"], "expected a finite number above 0"),
        (["--pooling", "median"], "`--pooling median` – expected one of"),
        (["--pooling", "attention"], "the artifact is calibrated for"),
        (["--transform", "1"], "expected MEAN,STD or MEAN,STD,LOWER,UPPER"),
        (["--transform", "0,0"], "with STD above 0"),
        (["--name", "Warm!"], "expected lower-case letters"),
        (["--holdout", "../other.yaml"], "expected a file in the card's own folder"),
        (["--holdout", "missing.yaml"], "does not exist"),
    ],
)
def test_a_new_card_that_cannot_be_is_refused_and_nothing_is_written(words, said, cards, capsys):
    before = content_of(cards)
    assert main(["card", "new", str(cards / "reward.v3.yaml"), *words]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert content_of(cards) == before


class Client:
    """Commands of users of the stand-in, each run in processes that know it as the Hub."""

    def __init__(self, url: str, home: Path):
        self.url, self.home = url, home

    def __call__(self, *commands: list, token: str | None = TOKEN, **environment: str) -> list[tuple[int, str, str]]:
        """Exit code, output and errors of each command, run one after the other in one process."""
        known = {
            name: value for name, value in os.environ.items() if "OFFLINE" not in name and not name.startswith("HF_")
        }
        known |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        known |= {} if token is None else {"HF_TOKEN": token}
        words = json.dumps([["card", *map(str, command)] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, words], env=known | environment, capture_output=True, text=True,
            cwd=self.home,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]


SCRIPT = """
import contextlib, io, json, sys
from interp_rlhf.cli import main
found = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    (tmp_path / "home").mkdir()
    return Client(hub.url, tmp_path / "home")


def test_a_card_makes_the_round_trip_in_one_commit_and_arrives_to_the_byte(cards, hub, client, tmp_path):
    out = tmp_path / "pulled"
    push, again, pull, resumed = client(
        ["push", cards / "reward.v3.yaml", "me/warmth", "--private", "--message", "Share it"],
        ["push", cards / "reward.v3.yaml", "me/warmth", "--json"],
        ["pull", "me/warmth", "--out", out, "--json"],
        ["pull", "me/warmth", "--out", out, "--json"],
    )
    assert [entry[0] for entry in (push, again, pull, resumed)] == [0, 0, 0, 0], (push, again, pull, resumed)
    repository = hub.repositories["me/warmth"]
    assert repository.private
    assert repository.messages == ["initial commit", "Share it"]  # the second push changes nothing
    sha = repository.branches["main"]
    assert f"revision: {sha}" in push[1]
    assert json.loads(again[1])["revision"] == json.loads(pull[1])["revision"] == sha
    pulled = content_of(out)
    lock = json.loads(pulled.pop("reward.v3.lock.json"))
    assert pulled == content_of(cards)
    assert (lock["source"], lock["revision"], lock["card"]) == ("me/warmth", sha, "reward.v3.yaml")
    assert lock["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in pulled.items()}
    assert json.loads(resumed[1])["written"] == []
    sums = repository.commits[sha]["SHA256SUMS"].decode().splitlines()
    assert [line.split("  ")[1] for line in sums] == ["README.md", *sorted(pulled)]
    assert hashlib.sha256(pulled["warmth.v3.safetensors"]).hexdigest() in hub.lfs  # not in the commit itself


def test_the_page_of_a_shared_card_has_metadata_evidence_usage_and_limits(cards, tmp_path, capsys):
    run("push", cards / "reward.v3.yaml", "me/warmth", "--dry-run", tmp_path / "shared", capsys=capsys)
    page = (tmp_path / "shared" / "README.md").read_text()
    metadata = yaml.safe_load(page.split("---\n")[1])
    assert metadata["library_name"] == "interp-rlhf"
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "probe" in metadata["tags"]
    found = load_card(cards / "reward.v3.yaml").card.evidence.held_out
    for name, estimate in (("probe", found.probe), ("TF-IDF", found.tfidf), ("vader", found.measures["vader"])):
        assert f"| {name} | {estimate.auroc:.3f} | [{estimate.low:.3f}, {estimate.high:.3f}] |" in page
    for said in (
        "interp-rlhf card pull me/warmth", "ConceptReward.from_card", "A probe is a claim", "does not show that the probe adds",
        "not checked on the model's own completions", "The gate: may be a reward.",
    ):  # fmt: skip
        assert said in page
    tables = [token.type for token in MarkdownIt("commonmark").enable("table").parse(page)]
    assert tables.count("table_open") == 2


def test_a_concept_cannot_write_html_or_a_table_into_the_page(cards, tmp_path, capsys):
    text = (cards / "reward.v3.yaml").read_text()
    (cards / "odd.yaml").write_text(
        re.sub("^concept: .*$", "concept: 'a|b <script>x</script> [l](u)'", text, flags=re.M)
    )
    run("push", cards / "odd.yaml", "me/odd", "--dry-run", tmp_path / "shared", capsys=capsys)
    tokens = MarkdownIt("commonmark").enable("table").parse((tmp_path / "shared" / "README.md").read_text())
    inside = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inside] if token.type in ("html_block", "html_inline", "link_open")]
    assert any(
        "a|b <script>x</script> [l](u)" in "".join(child.content for child in token.children or []) for token in tokens
    )


def test_a_branch_is_made_on_request_and_a_pull_pins_its_commit(cards, hub, client, tmp_path):
    first, second = client(
        ["push", cards / "monitor.v3.yaml", "me/warmth", "--revision", "trial", "--json"],
        ["pull", "me/warmth", "--revision", "trial", "--out", tmp_path / "out", "--json"],
    )
    sha = hub.repositories["me/warmth"].branches["trial"]
    assert json.loads(first[1])["revision"] == json.loads(second[1])["revision"] == sha
    assert list(hub.repositories["me/warmth"].commits[hub.repositories["me/warmth"].branches["main"]]) == [
        ".gitattributes"
    ]
    [offline] = client(
        ["pull", "me/warmth", "--revision", sha, "--out", tmp_path / "again", "--json"], HF_HUB_OFFLINE="1"
    )  # from the cache: a commit needs no connection
    assert offline[0] == 0, offline
    assert content_of(tmp_path / "again") == content_of(tmp_path / "out")


def test_a_released_card_is_not_edited_on_the_hub_but_a_next_version_joins_it(cards, hub, client, tmp_path):
    client(["push", cards / "reward.v3.yaml", "me/warmth"])
    sha = hub.repositories["me/warmth"].branches["main"]
    (cards / "reward.v3.yaml").write_text((cards / "reward.v3.yaml").read_text().replace("weight: 1.0", "weight: 2.0"))
    refused, made, joined, old = client(
        ["push", cards / "reward.v3.yaml", "me/warmth"],
        ["new", cards / "reward.v3.yaml", "--weight", "0.5"],
        ["push", cards / "reward.v4.yaml", "me/warmth", "--json"],
        ["pull", "me/warmth", "--card", "reward.v3.yaml", "--out", tmp_path / "old", "--json"],
    )
    assert refused[0] == 2
    assert "has other content under `reward.v3.yaml`" in refused[2]
    assert (made[0], joined[0], old[0]) == (0, 0, 0), (made, joined, old)
    repository = hub.repositories["me/warmth"]
    files = repository.commits[repository.branches["main"]]
    assert files["reward.v3.yaml"] == repository.commits[sha]["reward.v3.yaml"]
    assert b"card: reward.v4.yaml" in files["README.md"]
    assert load_card(tmp_path / "old" / "reward.v3.yaml").card.weight == 1


def test_what_was_changed_after_the_push_is_refused_and_nothing_is_written(cards, hub, client, tmp_path):
    names = {"me/a": "reward.v3.yaml", "me/b": "warmth.v3.safetensors", "me/c": "README.md"}
    client(*(["push", cards / "reward.v3.yaml", repo_id] for repo_id in [*names, "me/swapped"]))
    for repo_id, name in names.items():
        data = bytearray(hub.last(repo_id)[name])
        data[-2] ^= 1
        hub.corrupted[repo_id, name] = bytes(data)
    # Whoever can push can also write sums that fit. The card itself still names its artifact.
    files = hub.last("me/swapped")
    other = (cards / "warmth-holdout.v3.safetensors").read_bytes()
    was, now = (hashlib.sha256(data).hexdigest() for data in (files["warmth.v3.safetensors"], other))
    files["warmth.v3.safetensors"] = other
    files["SHA256SUMS"] = files["SHA256SUMS"].replace(was.encode(), now.encode())
    *found, swapped = client(
        *(["pull", repo_id, "--out", tmp_path / "out"] for repo_id in [*names, "me/swapped"]),
        HF_HOME=str(tmp_path / "cache"),
    )
    for (repo_id, name), (code, _, error) in zip(names.items(), found, strict=True):
        assert code == 2
        said = rf"^error: `{name}` of `{repo_id}@\w+` has SHA-256 \w+ – `SHA256SUMS` says \w+\."
        assert re.search(said, error, re.M), error
    assert swapped[0] == 2
    assert "the card expects" in swapped[2]
    assert str(tmp_path) not in swapped[2]
    assert not (tmp_path / "out").exists()


def test_what_the_hub_cannot_give_ends_in_one_line(cards, hub, client, tmp_path):
    hub.repositories["me/empty"] = Repository(private=False)
    hub.repositories["me/empty"].commit("main", {"README.md": b"# nothing"}, "initial commit")
    hub.repositories["me/secret"] = Repository(private=True)
    out = ["--out", tmp_path / "out"]
    found = client(
        ["pull", "me/missing", *out], ["pull", "me/empty", *out], ["pull", "me/empty", "--revision", "nowhere", *out],
        ["pull", "nothing", *out], ["pull", "me/secret", *out], ["push", cards / "reward.v3.yaml", "me/warmth"],
        ["push", cards / "reward.v3.yaml", "warmth"], token=None,
    )  # fmt: skip
    expected = [
        "`me/missing` is not on the Hub, or is private", "`me/empty` has no file `SHA256SUMS`",
        "`me/empty` has no revision `nowhere`", "`nothing` – expected a repository on the Hub", "`me/secret` is not on the Hub",
        "The Hub refuses this for `me/warmth` (Invalid username or password.): no token", "`warmth` – expected a repository",
    ]  # fmt: skip
    for (code, _, error), said in zip(found, expected, strict=True):
        assert code == 2
        assert said in error, error
        assert len(error.strip().splitlines()) == 1, error
    assert "me/warmth" not in hub.repositories
    assert not (tmp_path / "out").exists()


def test_the_page_of_a_model_is_not_overwritten(cards, hub, client):
    hub.repositories["me/model"] = Repository(private=False)
    hub.repositories["me/model"].commit("main", {"README.md": b"---\nlicense: mit\n---\n# My model"}, "initial commit")
    [push] = client(["push", cards / "reward.v3.yaml", "me/model"])
    assert push[0] == 2
    assert "has a `README.md` that is not the page of a card" in push[2]
    assert hub.repositories["me/model"].messages == ["initial commit"]


def test_a_push_after_somebody_elses_and_a_wrong_token_are_refused(cards, hub, client):
    [first] = client(["push", cards / "reward.v3.yaml", "me/warmth"])
    assert first[0] == 0
    repository = hub.repositories["me/warmth"]

    def somebody_else_pushes():
        repository.commit("main", hub.last("me/warmth") | {"reward.v5.yaml": b"theirs"}, "Theirs")

    hub.before_commit = somebody_else_pushes
    made, late = client(
        ["new", cards / "reward.v3.yaml", "--weight", "0.5"], ["push", cards / "reward.v4.yaml", "me/warmth"]
    )
    assert (made[0], late[0]) == (0, 2)
    assert "Somebody else has pushed: push again." in late[2]
    assert repository.messages == ["initial commit", "Share warmth, version 3", "Theirs"]
    [wrong] = client(["push", cards / "reward.v4.yaml", "me/other"], token="hf_wrong")
    assert wrong[0] == 2
    assert "no token, or one without the right" in wrong[2]
    assert "hf_wrong" not in wrong[2]


def test_a_hub_that_is_not_there_ends_in_one_line(cards, client, tmp_path):
    client.url = "http://127.0.0.1:1"  # nothing listens there
    commands = [["pull", "me/warmth", "--out", tmp_path / "out"], ["push", cards / "reward.v3.yaml", "me/warmth"]]
    pinned = ["pull", "me/warmth", "--revision", "0" * 40, "--out", tmp_path / "out"]
    for code, _, error in client(*commands) + client(*commands, pinned, HF_HUB_OFFLINE="1"):
        assert code == 2
        assert error.startswith("error: The Hub could not be reached for `me/warmth`"), error
        assert len(error.strip().splitlines()) == 1, error


@pytest.fixture
def shared(cards, tmp_path, capsys):
    """A folder that a dry run wrote."""
    folder = tmp_path / "shared"
    run("push", cards / "reward.v3.yaml", "me/warmth", "--dry-run", folder, capsys=capsys)
    return folder


def test_a_pull_leaves_files_that_exist_and_force_replaces_only_its_own(shared, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "warmth.v3.safetensors").write_text("another artifact")
    before = content_of(out)
    assert main(["card", "pull", str(shared), "--out", str(out)]) == 2
    assert "holds other files under the names `warmth.v3.safetensors`" in capsys.readouterr().err
    assert content_of(out) == before
    assert run("pull", shared, "--out", out, "--force", capsys=capsys)["passed"]
    assert (out / "notes.txt").read_text() == "mine"
    assert (
        load_card(out / "reward.v3.yaml").artifact_path.read_bytes() == (shared / "warmth.v3.safetensors").read_bytes()
    )


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_pull_leaves_nothing_behind(exists, shared, tmp_path, monkeypatch):
    """The interruption comes at every file in turn, as Ctrl-C would."""
    out = tmp_path / "out"
    for stop in range(5):
        if exists:
            out.mkdir()
        written = []

        def replace(source, target, stop=stop, written=written, real=os.replace):
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(target)
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            assert main(["card", "pull", str(shared), "--out", str(out)]) == 130
        assert len(written) == stop
        assert not out.exists() or content_of(out) == {}
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            {"cards", "shared", *(["out"] if exists else [])}
        )
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/b.safetensors", "..", "conftest.py"]
)
def test_a_card_cannot_name_a_file_outside_its_folder(name, shared, tmp_path, capsys):
    text = (shared / "reward.v3.yaml").read_text().replace("path: warmth.v3.safetensors", f"path: {name}")
    (shared / "reward.v3.yaml").write_text(text)
    sums = (shared / "SHA256SUMS").read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    sums = re.sub(r"\w{64}(?=  reward\.v3\.yaml)", digest, sums) + f"{'0' * 64}  {name}\n"
    (shared / "conftest.py").write_text("")
    (shared / "SHA256SUMS").write_text(sums.replace("0" * 64, hashlib.sha256(b"").hexdigest()))
    assert main(["card", "pull", str(shared), "--out", str(tmp_path / "out")]) == 2
    assert re.search(
        r"expected (a file in the card's own folder|a card \(`\.yaml`\) or an artifact)", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: (folder / "SHA256SUMS").write_text("nothing\n"),
            "expected a SHA-256, two spaces and a file name",
        ),
        (lambda folder: (folder / "SHA256SUMS").write_text(""), "expected it there; it lists nothing"),
        (lambda folder: (folder / "monitor.v3.yaml").unlink(), "has no file `monitor.v3.yaml`"),
    ],
)
def test_a_broken_folder_of_a_dry_run_is_refused(change, said, shared, tmp_path, capsys):
    change(shared)
    assert main(["card", "pull", str(shared), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_push_that_lacks_a_file_sends_nothing(cards, tmp_path, capsys):
    (cards / "monitor.v3.yaml").unlink()
    assert (
        main(["card", "push", str(cards / "reward.v3.yaml"), "me/warmth", "--dry-run", str(tmp_path / "shared")]) == 2
    )
    assert "expected the holdout card" in capsys.readouterr().err
    assert not (tmp_path / "shared").exists()
