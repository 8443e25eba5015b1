"""The hash router: the same choice on every machine, of the token, the task or the prompt alone."""

import pytest
import torch
from router_cases import frame, named

from mole.routers import HashConfig, HashRouter
from mole.routers.hashing import hash_of_text, hash_of_tokens, mixed, signed, splitmix64

MASK = (1 << 64) - 1


def rows(names="abcd", **options):
    return HashRouter(HashConfig(**options), named(names))


def by_hand(number: int) -> int:
    """splitmix64 as published: the state goes on by the golden ratio, and its bits are mixed."""
    state = (number + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_splitmix64_gives_the_published_numbers():
    # the first outputs of the generator whose state is 0: its state grows by the golden ratio at each of them
    states = [0, 0x9E3779B97F4A7C15, 2 * 0x9E3779B97F4A7C15 & MASK]
    assert [splitmix64(s) for s in states] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_tensors_are_mixed_as_numbers_are():
    numbers = [0, 1, 2**63, MASK, 12345678901234567890]
    found = mixed(torch.tensor([signed(number) for number in numbers]))
    assert [value & MASK for value in found.tolist()] == [by_hand(number) for number in numbers]
    assert [splitmix64(number) for number in numbers] == [by_hand(number) for number in numbers]


def test_the_choice_of_a_token_is_the_largest_hash_by_hand():
    made = rows(seed=7)
    ids = torch.arange(200).view(2, 100)
    salts = [hash_of_text(name, 7) for name in "abcd"]
    want = [max(range(4), key=lambda e, t=t: (by_hand(t ^ salts[e]) >> 1, -e)) for t in range(200)]
    routing = made(None, frame(input_ids=ids))
    assert routing.expert_ids.flatten().tolist() == want
    assert (routing.weights == 1).all()


def test_every_process_on_every_machine_chooses_this():
    """Numbers by an implementation in plain integers, apart from this one."""
    ids = torch.arange(24).view(3, 8)
    given = frame(task_names=("x", "y", "ß"), input_ids=ids, prompt_mask=ids % 8 < 5)
    found = {by: rows(by=by, seed=3)(None, given).expert_ids.flatten().tolist() for by in ("token", "task", "example")}
    assert found["token"] == [0, 2, 1, 1, 3, 0, 1, 2, 2, 0, 3, 3, 0, 1, 2, 0, 3, 3, 2, 3, 3, 1, 0, 1]
    assert found["task"] == [2, 1, 0]
    assert found["example"] == [3, 0, 0]


def test_experts_get_equal_shares():
    ids = torch.arange(40_000).view(4, -1)
    counts = torch.bincount(rows("abcdefg")(None, frame(input_ids=ids)).expert_ids.flatten(), minlength=7)
    assert (counts - 40_000 / 7).abs().max() < 5 * (40_000 / 7) ** 0.5


def test_a_new_expert_takes_its_share_and_moves_nothing_between_the_others():
    ids = torch.arange(5000).view(1, -1)
    old = rows("abcd")(None, frame(input_ids=ids)).expert_ids
    new = rows("xdcba")(None, frame(input_ids=ids)).expert_ids
    moved = new == 0
    assert 0.15 < moved.float().mean() < 0.25
    assert (new[~moved] == 4 - old[~moved]).all()


def test_several_hashes_are_distinct_experts_with_equal_weights():
    routing = rows(num_hashes=3)(None, frame(input_ids=torch.arange(50).view(1, -1)))
    assert (routing.weights == 1 / 3).all()
    assert all(len(set(row)) == 3 for row in routing.expert_ids[0].tolist())
    with pytest.raises(ValueError, match="lower router.num_hashes"):
        rows("ab", num_hashes=3)


def test_another_seed_is_another_function():
    ids = torch.arange(500).view(1, -1)
    first, second = (rows(seed=seed)(None, frame(input_ids=ids)).expert_ids for seed in (0, 1))
    assert 0.1 < (first == second).float().mean() < 0.4


def test_a_prompt_hashes_alike_wherever_its_padding_is_and_whatever_follows():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 5, 6, 7, 9], [5, 7, 6, 0, 0]])
    counted = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    first, second, other = hash_of_tokens(ids, counted, 0).tolist()
    assert first == second
    assert first != other  # another order
    routing = rows(by="example")(None, frame(input_ids=ids, prompt_mask=counted))
    assert routing.expert_ids.shape == (3, 1, 1)
    assert routing.expert_ids[0] == routing.expert_ids[1]


def test_what_is_needed_depends_on_what_is_hashed():
    for by, need in (("task", "task_names"), ("token", "input_ids"), ("example", "input_ids")):
        with pytest.raises(ValueError, match=need):
            rows(by=by)(None, frame())


# ---- balanced
def test_balanced_tokens_go_to_the_expert_with_the_least_so_far():
    made = rows("abc", balanced=True)
    made.take_counts({1: 50, 2: 30, 3: 25, 4: 10, 5: 4}, 8)
    # 50 → a; 30 → b; 25 → c; 10 → c (25 < 30 < 50); 4 → b (30 < 35)
    assert made.table.tolist()[1:6] == [0, 1, 2, 2, 1]
    routing = made(None, frame(input_ids=torch.tensor([[1, 2, 3, 4, 5, 0, 7, 100]])))
    assert routing.expert_ids[0, :5, 0].tolist() == [0, 1, 2, 2, 1]
    plain = rows("abc")(None, frame(input_ids=torch.tensor([[0, 7, 100]])))
    assert torch.equal(routing.expert_ids[0, 5:], plain.expert_ids[0])


def test_a_table_is_needed_before_balanced_routing():
    with pytest.raises(ValueError, match="dataset="):
        rows(balanced=True)(None, frame(input_ids=torch.ones(1, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="by=token"):
        HashConfig(balanced=True, by="task")


def test_a_table_is_carried_for_the_experts_that_stay():
    old = rows("abc", balanced=True)
    old.take_counts({1: 50, 2: 30, 3: 25}, 5)
    new = rows("cxa", balanced=True)
    new.carry(old)
    assert new.table.tolist() == [-1, 2, -1, 0, -1]


def test_a_table_of_other_experts_is_refused():
    made = rows("ab", balanced=True)
    made.table = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="does not have"):
        made.check_state()
