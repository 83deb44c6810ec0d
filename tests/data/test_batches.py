"""Row order, batches and splits."""

import numpy as np
import pytest

from ticktune.data.batches import epoch_batches, micro_batches, sorted_batches, split_rows

LENGTHS = np.random.default_rng(0).integers(5, 200, 1000).tolist()


def test_every_example_appears_once_in_an_epoch() -> None:
    batches = epoch_batches(LENGTHS, 7, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))


def test_all_batches_but_one_are_full() -> None:
    sizes = sorted(len(batch) for batch in epoch_batches(LENGTHS, 7, seed=1, epoch=0))
    assert sizes == [1000 % 7] + [7] * (1000 // 7)


def test_an_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_batches(LENGTHS, 7, seed=1, epoch=3) == epoch_batches(LENGTHS, 7, seed=1, epoch=3)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 4), (2, 3)])
def test_another_seed_or_epoch_has_another_order(seed: int, epoch: int) -> None:
    assert epoch_batches(LENGTHS, 7, seed=seed, epoch=epoch) != epoch_batches(LENGTHS, 7, seed=1, epoch=3)


def test_batches_of_an_epoch_have_other_members_than_those_of_the_next() -> None:
    first, second = ({frozenset(b) for b in epoch_batches(LENGTHS, 7, seed=1, epoch=e)} for e in (0, 1))
    assert len(first & second) < 5


def test_a_batch_holds_examples_of_about_one_length() -> None:
    batches = epoch_batches(LENGTHS, 8, seed=1, epoch=0)
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)


def test_short_batches_do_not_come_first() -> None:
    firsts = [LENGTHS[batch[0]] for batch in epoch_batches(LENGTHS, 8, seed=1, epoch=0)]
    assert abs(np.corrcoef(range(len(firsts)), firsts)[0, 1]) < 0.3


def test_fewer_examples_than_a_batch_make_one_batch() -> None:
    assert [sorted(batch) for batch in epoch_batches([3, 1, 2], 8, seed=0, epoch=0)] == [[0, 1, 2]]


def test_micro_batches_cut_a_batch_in_its_order() -> None:
    assert micro_batches([5, 3, 8, 1, 2], 2) == [[5, 3], [8, 1], [2]]


def test_evaluation_starts_with_the_longest() -> None:
    assert list(sorted_batches([3, 9, 1, 9, 4], 2)) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    ("count", "fraction", "size"), [(10, 0.3, 3), (7, 0.5, 4), (10, 0.001, 1), (10, 0.999, 9), (2, 0.5, 1)]
)
def test_a_split_has_the_asked_share_and_leaves_rows_on_both_sides(count: int, fraction: float, size: int) -> None:
    rest, chosen = split_rows(count, fraction, seed=0, name="validation")
    assert len(chosen) == size
    assert sorted(rest + chosen) == list(range(count))


def test_a_split_is_a_function_of_its_arguments() -> None:
    assert split_rows(50, 0.2, seed=0, name="test") == split_rows(50, 0.2, seed=0, name="test")


@pytest.mark.parametrize(("seed", "name"), [(1, "test"), (0, "validation")])
def test_another_seed_or_name_gives_another_split(seed: int, name: str) -> None:
    assert split_rows(50, 0.2, seed=seed, name=name) != split_rows(50, 0.2, seed=0, name="test")
