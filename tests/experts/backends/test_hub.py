"""What is special to the Hub: commits, branches, the history, the page, and how many requests things take."""

import subprocess

import pytest
from hub_server.fixtures import BOB, HURRIED

from mole.experts import Conflict, NoLibrary, ReadOnly, Refused, UnknownExpert, Unreachable, read_card
from mole.experts.backends import Change
from mole.experts.backends.hub import HubBackend, HubConfig
from mole.experts.backends.hub_reading import git_id
from mole.registry import LIBRARIES


@pytest.fixture
def folders(make, tmp_path):
    """Saves the expert of a seed and gives its folder."""

    def saved(seed=0, **facts):
        folder = tmp_path / f"expert-{seed}-{len(facts)}"
        if not folder.exists():
            make(seed, **facts).save(folder)
        return folder

    return saved


@pytest.fixture
def repo(hub, repo_id):
    """The git repository behind the library."""
    return hub.create(repo_id)


def commit(repo, changes, title="by hand"):
    """A commit that some other program makes."""
    head = repo.refs()["refs/heads/main"]
    return repo.commit("main", head, changes, title)


def files(repo, revision="main"):
    return {path for path, entry in repo.tree(repo.resolve(revision)).items() if entry.kind == "blob"}


def at(repo_id, revision, **options):
    return HubBackend(repo_id, revision=revision, patience=HURRIED, **options)


def fetched(backend, name, dest, revision=None):
    dest.mkdir()
    backend.fetch(name, dest, revision)
    return {path.name: path.read_bytes() for path in dest.iterdir()}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# what a change is


def test_a_change_is_one_commit_that_says_what_it_does(hub_backend, repo, folders):
    first = hub_backend.publish("mrpc", folders(0))
    hub_backend.publish("mrpc", folders(1), first)
    hub_backend.remove("mrpc", hub_backend.card("mrpc")[1])
    titles = [change.title for change in repo.log()]
    assert titles == ["Remove mrpc", "Update mrpc", "Publish mrpc", "initial commit"]
    assert f"mrpc at {read_card(folders(0)).revision}" in repo.log()[2].message
    assert "mrpc removed" in repo.log()[0].message
    assert subprocess.run(["git", "--git-dir", repo.path, "fsck", "--strict"], capture_output=True).returncode == 0


def test_a_batch_is_one_commit_with_the_title_that_is_given(hub_backend, repo, folders):
    version = hub_backend.publish("old", folders(0))
    changes = [Change("old", None, version), *(Change(f"new-{seed}", folders(seed), None) for seed in range(3))]
    hub_backend.apply(changes, "nightly\n\nwith a second line")
    assert repo.log()[0].title == "nightly with a second line"
    assert len(repo.log()) == 3
    assert list(hub_backend.cards()) == ["new-0", "new-1", "new-2"]


def test_a_batch_with_a_conflict_changes_nothing(hub_backend, repo, folders):
    hub_backend.publish("taken", folders(0))
    with pytest.raises(Conflict, match="taken is there, at revision"):
        hub_backend.apply([Change("free", folders(1), None), Change("taken", folders(1), None)], "both")
    assert list(hub_backend.cards()) == ["taken"]
    assert len(repo.log()) == 2


def test_files_that_the_new_revision_lacks_go_in_the_same_commit(hub_backend, repo, folders):
    hub_backend.publish("mrpc", folders(0))
    commit(repo, {"mrpc/notes.txt": b"left by another program", "mrpc/sub/x.json": b"{}"})
    with pytest.raises(Refused, match="notes.txt"):
        hub_backend.verify("mrpc")
    hub_backend.publish("mrpc", folders(1), hub_backend.card("mrpc")[1])
    assert {path for path in files(repo) if path.startswith("mrpc/")} == {
        f"mrpc/{name}" for name in content(folders(1))
    }
    hub_backend.verify("mrpc")


def test_what_is_there_already_makes_no_commit(hub_backend, repo, folders):
    version = hub_backend.publish("mrpc", folders(0))
    assert hub_backend.publish("mrpc", folders(0), version) == version
    assert hub_backend.publish("mrpc", folders(0), "another version") == version
    hub_backend.remove("absent", "any version")
    assert len(repo.log()) == 2


def test_a_folder_without_a_card_is_no_expert_and_is_not_written_over(hub_backend, repo, folders):
    hub_backend.publish("mrpc", folders(0))
    commit(repo, {"images/plot.png": b"png", "images.txt": b"x", "LICENSE": b"mine"})
    assert list(hub_backend.cards()) == ["mrpc"]
    assert hub_backend.strays() == ["images", "images.txt"]
    with pytest.raises(UnknownExpert):
        hub_backend.card("images")
    with pytest.raises(Refused, match="images is there and no expert; move it away"):
        hub_backend.publish("images", folders(1))
    assert "images/plot.png" in files(repo)


def test_a_large_file_goes_up_once_also_under_another_name(hub_backend, repo, hub, folders):
    hub_backend.publish("first", folders(0))
    hub_backend.publish("second", folders(0))
    assert len(hub.seen("PUT /models")) == 1
    assert repo.tree(repo.resolve("main"))["first/adapter_model.safetensors"].lfs is not None


def test_a_removed_expert_stays_in_the_history(hub_backend, repo, folders, tmp_path):
    version = hub_backend.publish("mrpc", folders(0))
    hub_backend.remove("mrpc", version)
    assert not [path for path in files(repo) if path.startswith("mrpc/")]
    assert hub_backend.after_removal == "in the history of the repository, for good"
    assert fetched(hub_backend, "mrpc", tmp_path / "old", read_card(folders(0)).revision[:8]) == content(folders(0))


def test_an_old_revision_that_another_program_committed_is_found(hub_backend, repo, folders, tmp_path):
    for seed in (0, 1):
        commit(repo, {f"mrpc/{name}": data for name, data in content(folders(seed)).items()}, "by hand")
    hub_backend.publish("mrpc", folders(2), hub_backend.card("mrpc")[1])
    for seed in (0, 1, 2):
        revision = read_card(folders(seed)).revision
        assert hub_backend.card("mrpc", revision[:8])[0].revision == revision


def test_what_a_commit_says_is_a_hint_and_the_card_decides(hub_backend, repo, folders):
    hub_backend.publish("mrpc", folders(0))
    lie = f"mrpc at {'ab' * 32}\nchange {'0' * 32}"
    repo.commit("main", repo.refs()["refs/heads/main"], {"x.txt": b"x"}, "a lie", lie)
    with pytest.raises(UnknownExpert, match="no revision starts with abababab"):
        hub_backend.card("mrpc", "abababab")


def test_the_history_is_read_page_by_page(hub_backend, hub, folders, monkeypatch):
    version = None
    for seed in range(4):
        version = hub_backend.publish("mrpc", folders(seed), version)
    monkeypatch.setattr(hub, "page_size", 2)
    revision = read_card(folders(0)).revision
    assert hub_backend.card("mrpc", revision)[0].revision == revision
    assert len(hub.seen("/commits/")) == 3


# branches, tags, commits


def test_a_branch_is_a_library_of_its_own(hub_backend, repo, repo_id, folders):
    hub_backend.publish("mrpc", folders(0))
    repo.set_ref("refs/heads/dev/x", repo.resolve("main"))
    branch = at(repo_id, "dev/x")
    branch.publish("rte", folders(1))
    assert branch.url == f"hf://{repo_id}@dev/x"
    assert list(branch.cards()) == ["mrpc", "rte"]
    assert list(hub_backend.cards()) == ["mrpc"]


def test_a_tag_and_a_commit_are_read_and_not_written(hub_backend, repo, repo_id, folders, tmp_path):
    version = hub_backend.publish("mrpc", folders(0))
    first = repo.resolve("main")
    repo.set_ref("refs/tags/v1", first)
    hub_backend.publish("mrpc", folders(1), version)
    for revision, told in (("v1", "is a tag"), (first, "is one commit")):
        old = at(repo_id, revision)
        assert fetched(old, "mrpc", tmp_path / revision) == content(folders(0))
        old.verify("mrpc")
        for write in (
            old.check_writable,
            lambda old=old: old.publish("rte", folders(2)),
            lambda old=old: old.remove("mrpc", version),
            lambda old=old: old.derived.check_writable(),
        ):
            with pytest.raises(ReadOnly, match=told):
                write()
    assert len(repo.log()) == 3


def test_a_branch_that_is_not_there_is_told(repo, repo_id, folders):
    with pytest.raises(NoLibrary, match="no such branch, tag or commit"):
        at(repo_id, "nowhere").cards()
    with pytest.raises(ReadOnly, match="nowhere is no branch; write to a branch \\(main\\)"):
        at(repo_id, "nowhere").publish("mrpc", folders(0))


# making, and rights


def test_a_repository_is_made_by_publishing_only_if_asked_to(hub, repo_id, folders):
    with pytest.raises(NoLibrary, match="not there, or not yours to see"):
        HubBackend(repo_id, patience=HURRIED).publish("mrpc", folders(0))
    assert hub.repo(repo_id) is None
    HubBackend(repo_id, create=True, patience=HURRIED).publish("mrpc", folders(0))
    assert hub.repo(repo_id).meta["private"] is True
    HubBackend(f"{repo_id}-public", create=True, private=False, patience=HURRIED).publish("mrpc", folders(0))
    assert hub.repo(f"{repo_id}-public").meta["private"] is False


def test_an_update_never_makes_a_repository(hub, hub_backend, repo_id, folders):
    with pytest.raises(NoLibrary):
        hub_backend.publish("mrpc", folders(0), "some version")
    assert hub.repo(repo_id) is None


def test_create_empties_nothing(hub_backend, repo_id, folders):
    hub_backend.publish("mrpc", folders(0))
    HubBackend(repo_id, create=True, patience=HURRIED).publish("rte", folders(1))
    assert list(hub_backend.cards()) == ["mrpc", "rte"]


def test_the_repositories_of_others_are_read_if_public_and_never_written(hub, folders, monkeypatch):
    hub.create("bob/open")
    hub.create("bob/closed", private=True)
    assert at("bob/open", None).cards() == {}
    with pytest.raises(ReadOnly, match="not yours to write"):
        at("bob/open", None).publish("mrpc", folders(0))
    with pytest.raises(NoLibrary, match="not yours to see"):
        at("bob/closed", None).cards()
    monkeypatch.setenv("HF_TOKEN", BOB)
    at("bob/closed", None).publish("mrpc", folders(0))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NoLibrary, match="log in"):
        at("bob/closed", None).cards()


def test_a_token_that_is_not_taken_is_told(hub, repo, hub_backend, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(Exception, match="does not take your token") as caught:
        hub_backend.cards()
    assert "hf_expired" not in str(caught.value)


def test_the_settings_say_what_is_made_and_never_a_token():
    assert set(HubConfig.__pydantic_fields__) == {"name", "url", "create", "private"}
    backend = LIBRARIES.build(HubConfig(url="hf://user/repo@dev"))
    assert backend.url == "hf://user/repo@dev"


# the page


def test_the_page_is_written_in_the_same_commit(hub_backend, repo, folders):
    assert not hub_backend.exists() or hub_backend.readme() is None
    hub_backend.apply([Change("mrpc", folders(0), None)], "add", readme="---\ntags: [mole]\n---\n# Library é\n")
    assert hub_backend.readme() == "---\ntags: [mole]\n---\n# Library é\n"
    assert len(repo.log()) == 2
    hub_backend.apply([], "nothing new", readme="---\ntags: [mole]\n---\n# Library é\n")
    assert len(repo.log()) == 2
    hub_backend.apply([], "the page alone", readme="# Other\n")
    assert repo.log()[0].title == "the page alone"
    assert list(hub_backend.cards()) == ["mrpc"]
    assert hub_backend.strays() == []


def test_a_page_that_the_hub_refuses_is_an_error_and_nothing_is_written(hub_backend, repo, folders):
    with pytest.raises(ValueError, match="Invalid metadata"):
        hub_backend.apply([Change("mrpc", folders(0), None)], "add", readme="---\n: [\n---\n")
    assert len(repo.log()) == 1


# how many requests


def test_a_listing_of_an_unchanged_library_is_one_request(hub_backend, hub, folders):
    for seed in range(3):
        hub_backend.publish(f"e{seed}", folders(seed))
    hub_backend.cards()
    hub.requests.clear()
    assert list(hub_backend.cards()) == ["e0", "e1", "e2"]
    assert len(hub.seen("")) == 1


def test_a_listing_of_a_changed_library_takes_as_many_requests_as_changed(hub, hub_backend, repo, folders, monkeypatch):
    card = content(folders(0))
    commit(repo, {f"e{n:04d}/expert.json": card["expert.json"] for n in range(1200)})
    assert len(hub_backend.cards()) == 1200
    assert len(hub.seen("/tree/")) == 2
    assert len(hub.seen("/paths-info/")) == 3
    changed = [f"e{n:04d}" for n in range(5)]
    commit(repo, {f"{name}/README.md": b"changed" for name in changed})
    hub.requests.clear()
    hub_backend.cards()
    cards = dict(hub_backend.read_cards(changed))
    assert {card.revision for card in cards.values()} == {read_card(folders(0)).revision}
    assert len(hub.seen("/tree/")) == 2
    assert len(hub.seen("")) == 1 + 2 + 1 + 5  # head, pages of the root, whether they hold cards, the cards


def test_a_card_is_two_requests_and_an_expert_two_for_each_file_and_two(hub_backend, hub, folders, tmp_path):
    hub_backend.publish("mrpc", folders(0))
    hub.requests.clear()
    hub_backend.card("mrpc")
    assert len(hub.seen("")) == 2
    hub.requests.clear()
    fetched(hub_backend, "mrpc", tmp_path / "dest")
    assert len(hub.seen("")) <= 2 * len(read_card(folders(0)).files) + 2


def test_publishing_what_is_there_is_three_requests_and_no_commit(hub_backend, hub, folders):
    changes = [Change(f"e{seed}", folders(seed), None) for seed in range(3)]
    hub_backend.apply(changes, "all")
    hub.requests.clear()
    hub_backend.apply(changes, "all again")
    assert len(hub.seen("")) == 2
    assert not hub.seen("/commit/")


def test_a_hundred_experts_are_one_commit(hub_backend, hub, repo, folders):
    hub_backend.apply([Change(f"e{number:03d}", folders(number % 4), None) for number in range(100)], "all of them")
    assert len(repo.log()) == 2
    assert len(hub.seen("POST .*/commit/")) == 1
    assert len(hub_backend.cards()) == 100
    assert not [seen for seen in hub.requests if seen.status == 501]


def test_the_storage_never_gets_the_token(hub_backend, hub, folders, tmp_path):
    hub_backend.publish("mrpc", folders(0))
    fetched(hub_backend, "mrpc", tmp_path / "dest")
    storage = [seen for seen in hub.requests if seen.origin == "storage"]
    assert {seen.method for seen in storage} == {"PUT", "GET"}
    assert [seen.authorization for seen in storage] == [None] * len(storage)
    assert all(seen.authorization for seen in hub.seen("/api/models|/resolve/"))


def test_a_constructor_makes_no_request_and_no_client(hub, repo_id):
    HubBackend(repo_id)
    HubBackend(repo_id, create=True).derived  # noqa: B018
    assert hub.requests == []


def test_the_git_id_of_bytes_is_the_one_that_git_gives(repo):
    assert repo.git("hash-object", "--stdin", stdin=b"hello").decode().strip() == git_id(b"hello")


def test_a_client_that_was_told_to_stay_offline_says_so_at_once(hub, hub_backend, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="offline mode is enabled"):
        hub_backend.cards()
    assert hub.requests == []
