"""S3 and Azure behind a proxy that breaks requests: each one in turn, or many of them."""

import pytest
from servers import make_expert_folders

from mole.experts import read_card
from mole.experts.backends import Change
from mole.experts.errors import Unreachable

pytest.importorskip("obstore")


@pytest.fixture
def folders(make, tmp_path):
    return make_expert_folders(make, tmp_path, 2)


def revision(folder):
    return read_card(folder).revision


def fetched(backend, name, tmp_path):
    dest = tmp_path / f"fetched-{len(list(tmp_path.iterdir()))}"
    dest.mkdir()
    return backend.fetch(name, dest).revision


def again(call):
    """What the call gives, asked for once more after an error."""
    try:
        return call()
    except Unreachable:
        return call()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuse", "lose", "cut"])
@pytest.mark.parametrize("operation", ["add", "update", "remove", "rename"])
def test_after_a_fault_at_any_request_asking_again_succeeds(behind_proxy, folders, tmp_path, operation, kind):
    proxy, opened, direct = behind_proxy
    straight, backend = direct(), opened()
    straight._store.check_conditions()
    backend._store._obeys.set()
    old, new = (revision(folder) for folder in folders)
    for number in range(1, 40):
        name, other = f"mrpc-{number}", f"other-{number}"
        version = None if operation == "add" else straight.publish(name, folders[0])
        changes = {
            "add": [Change(name, folders[1], None)],
            "update": [Change(name, folders[1], version)],
            "remove": [Change(name, None, version)],
            "rename": [Change(other, folders[0], None), Change(name, None, version)],
        }[operation]
        proxy.watch({number: kind})
        again(lambda changes=changes: backend.apply(changes, ""))
        expected = {"remove": {}, "rename": {other: old}}.get(operation, {name: new})
        assert {one: card.revision for one, card in straight.read_cards([name, other])} == expected
        for one, wanted in expected.items():
            assert fetched(straight, one, tmp_path) == wanted
        if not proxy.hits:
            break
    assert number > {"add": 6, "update": 7, "remove": 3, "rename": 9}[operation]


@pytest.mark.parametrize("kind", ["refuse", "lose", "cut"])
def test_after_a_fault_at_any_request_reading_again_succeeds_and_nothing_is_left(behind_proxy, folders, tmp_path, kind):
    proxy, opened, direct = behind_proxy
    direct().publish("mrpc", folders[0])
    backend = opened()
    for number in range(1, 20):
        proxy.watch({number: kind})
        (dest := tmp_path / f"dest-{number}").mkdir()
        try:
            backend.fetch("mrpc", dest)
        except Unreachable:
            assert list(dest.iterdir()) == []
            backend.fetch("mrpc", dest)
        assert read_card(dest).revision == revision(folders[0])
        if not proxy.hits:
            break
    assert number > 3
    for call in (backend.cards, lambda: backend.verify("mrpc"), backend.strays, lambda: backend.card("mrpc")):
        proxy.watch()
        whole = call()
        for number in range(1, len(proxy.seen) + 1):
            proxy.watch({number: kind})
            assert again(call) == whole
            assert proxy.hits == 1


@pytest.mark.parametrize("kind", ["refuse", "busy", "lose", "late"])
def test_the_client_gets_over_faults_by_itself(behind_proxy, folders, tmp_path, kind):
    proxy, opened, _ = behind_proxy
    for start in range(3):
        proxy.watch(dict.fromkeys(range(1 + start, 200, 3), kind))
        backend = opened(retries=3, prefix=f"lib-{start}")
        version = backend.publish("mrpc", folders[0])
        version = backend.publish("mrpc", folders[1], version)
        backend.apply([Change("other", folders[1], None), Change("mrpc", None, version)], "rename")
        assert list(backend.cards()) == ["other"]
        assert fetched(backend, "other", tmp_path) == revision(folders[1])
        assert proxy.hits > 8
