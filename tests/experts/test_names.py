import pytest

from mole.experts import LibraryError, check_name, is_name, proposal

BAD = [
    *("", ".", "..", "a/b", "a\\b", "/abs", "C:x", "con", "nul.x", "com1", "lpt9.txt", "x.", ".x", "-rf", "x-", "_x"),
    *("x\n", "x\0", "a" * 97, "a" * 300, "Upper", "é", "e\u0301", "\u0430", "🙂", "%2e%2e", ".mole", "a..b", "a b"),
    *(None, 3, b"x"),
]


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_a_bad_name_is_refused_with_a_good_one(name):
    with pytest.raises(LibraryError, match="how about") as caught:
        check_name(name)
    assert is_name(proposal(name))
    assert repr(proposal(name)) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "0", "mrpc", "mrpc-glue", "a.b_c-d", "a" * 96, "console", "nulx"])
def test_a_good_name_is_kept_and_is_its_own_proposal(name):
    assert check_name(name) == proposal(name) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("MRPC (GLUE)", "mrpc-glue"),
        ("Ünïcode", "unicode"),
        ("con", "expert-con"),
        ("a/b\\c", "a-b-c"),
        ("!!", "expert"),
    ],
)
def test_a_proposal_is_like_the_text(text, name):
    assert proposal(text) == name
