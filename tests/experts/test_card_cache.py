"""The cache of cards: what has not changed is not read again, what has is, and nothing in it is believed blindly."""

import pytest

from mole.experts import ExpertLibrary, LocalBackend
from mole.experts.expert_cache import ExpertCache, Limits


class Watched(LocalBackend):
    """A backend that counts what is asked of it; with `head` it is one that has such a thing."""

    def __init__(self, path, head=None):
        super().__init__(path)
        self.head_now, self.reads, self.listings = head, [], 0

    def head(self):
        return self.head_now

    def cards(self):
        self.listings += 1
        return super().cards()

    def read_cards(self, names):
        names = list(names)
        self.reads.append(names)
        return super().read_cards(names)


@pytest.fixture
def filled(library, make):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make(seed), name)
    return library


def opened(library, tmp_path, head=None):
    watched = Watched(library.url, head)
    return ExpertLibrary(watched, cache_dir=tmp_path / "cache"), watched


def test_only_changed_cards_are_read_again_also_by_another_process(filled, tmp_path, make):
    reader, watched = opened(filled, tmp_path)
    assert reader.cards() == filled.cards()
    assert reader.cards() == filled.cards()
    filled.edit_card("b", tags=["new"])
    filled.remove_expert("c")
    filled.add_expert(make(7), "d")
    assert reader.cards() == filled.cards()
    assert watched.reads == [["a", "b", "c"], [], ["b", "d"]]
    later, watched = opened(filled, tmp_path)
    assert later.cards() == filled.cards()
    assert watched.reads == [[]]


def test_a_head_that_has_not_moved_needs_no_listing(filled, tmp_path):
    first, _ = opened(filled, tmp_path, "h1")
    first.cards()
    reader, watched = opened(filled, tmp_path, "h1")
    assert reader.cards() == filled.cards()
    assert reader.names() == ["a", "b", "c"]
    assert (watched.listings, watched.reads) == (0, [])
    filled.edit_card("b", tags=["new"])
    watched.head_now = "h2"
    assert reader.cards()["b"].tags == ("new",)
    assert (watched.listings, watched.reads) == (1, [["b"]])


def test_a_damaged_card_is_never_kept(filled, tmp_path):
    card = filled.backend.root / "b" / "expert.json"
    data = card.read_bytes()
    card.write_bytes(b"{}")
    reader, watched = opened(filled, tmp_path, "h1")
    cards, problems = reader.look()
    assert (list(cards), list(problems)) == (["a", "c"], ["b"])
    card.write_bytes(data)
    assert list(reader.look()[0]) == ["a", "b", "c"]
    assert watched.reads == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data.replace(b"sums", b"sins"),
        lambda data: b"",
        lambda data: b"\xff" * 80,
        lambda data: data.split(b"\n")[1],
    ],
    ids=["cut", "changed", "empty", "binary", "no digest"],
)
def test_a_damaged_cache_is_dropped_whole(filled, tmp_path, damage):
    opened(filled, tmp_path)[0].cards()
    (file,) = (tmp_path / "cache").rglob("cards.json")
    file.write_bytes(damage(file.read_bytes()))
    reader, watched = opened(filled, tmp_path)
    assert reader.cards() == filled.cards()
    assert watched.reads == [["a", "b", "c"]]


def test_a_cache_of_another_format_or_library_is_not_used(filled, tmp_path, make):
    other = ExpertLibrary.open(str(tmp_path / "other"))
    other.add_expert(make(8), "x")
    opened(filled, tmp_path)[0].cards()
    opened(other, tmp_path)[0].cards()
    mine, theirs = sorted((tmp_path / "cache").rglob("cards.json"), key=lambda file: b"other" in file.read_bytes())
    mine.write_bytes(theirs.read_bytes())
    assert opened(filled, tmp_path)[0].cards() == filled.cards()


def test_a_cache_that_cannot_be_written_costs_only_time(filled, tmp_path):
    (tmp_path / "cache").write_text("a file")
    reader, _ = opened(filled, tmp_path)
    assert reader.cards() == filled.cards()


def test_the_same_folder_by_another_path_is_the_same_library(filled, tmp_path, monkeypatch):
    opened(filled, tmp_path)[0].cards()
    monkeypatch.chdir(tmp_path)
    reader, watched = opened(ExpertLibrary.open("lib"), tmp_path)
    reader.cards()
    assert watched.reads == [[]]


class TestFetched:
    @pytest.fixture
    def far(self, filled, tmp_path):
        """A library elsewhere, and how often an expert was fetched from it."""

        class Far:
            url = "hf://user/repo"

            def __init__(self):
                self.fetched = 0

            def fetch(self, name, dest, revision=None):
                self.fetched += 1
                return filled.backend.fetch(name, dest, revision)

        return Far()

    def fetch(self, far, filled, tmp_path, name="a"):
        dest = tmp_path / f"dest-{len(list(tmp_path.iterdir()))}"
        dest.mkdir()
        ExpertCache(far, tmp_path / "cache", Limits()).fetch(name, dest, filled.card(name))
        return {path.name: path.read_bytes() for path in dest.iterdir()}

    def test_an_expert_is_fetched_once_whatever_its_name(self, far, filled, tmp_path):
        wanted = {path.name: path.read_bytes() for path in (filled.backend.root / "a").iterdir()}
        assert self.fetch(far, filled, tmp_path) == wanted
        filled.rename_expert("a", "z")
        filled.edit_card("z", tags=["new"])
        assert self.fetch(far, filled, tmp_path, "z").keys() == wanted.keys()
        assert far.fetched == 1

    def test_a_changed_file_is_noticed_and_fetched_again(self, far, filled, tmp_path):
        wanted = self.fetch(far, filled, tmp_path)
        (kept,) = (tmp_path / "cache" / "experts").iterdir()
        weights = kept / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
        assert self.fetch(far, filled, tmp_path) == wanted
        assert far.fetched == 2

    def test_a_fetch_that_fails_keeps_nothing(self, far, filled, tmp_path):
        filled.backend.fetch = None
        with pytest.raises(TypeError):
            self.fetch(far, filled, tmp_path)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
