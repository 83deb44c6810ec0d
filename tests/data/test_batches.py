"""Row order, batches and splits."""

import numpy as np
import pytest

from ticktune.data.batches import (
    Epochs,
    count_batches,
    epoch_batches,
    largest_packed,
    largest_padded,
    micro_batches,
    packed_rows,
    sorted_batches,
    split_rows,
)

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


def test_batches_of_tokens_hold_as_many_as_fit() -> None:
    batches = epoch_batches(LENGTHS, None, seed=1, epoch=0, tokens=800)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    padded = [len(batch) * max(LENGTHS[i] for i in batch) for batch in batches]
    assert max(padded) <= 800
    assert sum(padded) < 1.1 * sum(LENGTHS)
    assert len(batches) < 1.2 * sum(LENGTHS) / 800


def test_batches_of_tokens_are_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_batches(LENGTHS, None, seed=seed, epoch=epoch, tokens=800)

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)


def test_an_example_longer_than_a_batch_of_tokens_is_a_batch_of_its_own() -> None:
    batches = epoch_batches([3, 50, 4, 5], None, seed=0, epoch=0, tokens=10)
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(("batch_size", "tokens"), [(7, None), (None, 800)])
def test_every_step_lies_in_the_epoch_whose_batches_it_takes(batch_size: int | None, tokens: int | None) -> None:
    epochs = Epochs(LENGTHS, batch_size, tokens, seed=1)
    counts = [len(epochs.batches(epoch)) for epoch in range(3)]
    assert [epochs.end(epoch) for epoch in range(3)] == np.cumsum(counts).tolist()
    for step, epoch in ((0, 0), (counts[0] - 1, 0), (counts[0], 1), (counts[0] + counts[1], 2)):
        # Of an object that was asked for nothing before, as after a resume.
        assert Epochs(LENGTHS, batch_size, tokens, seed=1).find(step) == (epoch, sum(counts[:epoch]))


def test_epochs_of_tokens_need_not_have_as_many_batches() -> None:
    epochs = Epochs(LENGTHS, None, 800, seed=1)
    assert len({len(epochs.batches(epoch)) for epoch in range(8)}) > 1


def test_packed_rows_hold_every_example_once_and_no_more_than_fits() -> None:
    rows = packed_rows(LENGTHS, 256)
    assert sorted(i for row in rows for i in row) == list(range(1000))
    assert max(sum(LENGTHS[i] for i in row) for row in rows) <= 256
    assert len(rows) < 1.05 * sum(LENGTHS) / 256


def test_an_example_longer_than_a_row_has_one_of_its_own() -> None:
    assert packed_rows([3, 9, 2], 5) == [[1], [0, 2]]


def test_batches_of_packed_examples_are_of_mixed_lengths() -> None:
    batches = epoch_batches(LENGTHS, 8, seed=1, epoch=0, packed=True)
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert min(max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches) > 30


def test_tokens_of_packed_examples_are_theirs_alone() -> None:
    batches = epoch_batches(LENGTHS, None, seed=1, epoch=0, tokens=800, packed=True)
    sums = [sum(LENGTHS[i] for i in batch) for batch in batches]
    assert sorted(i for batch in batches for i in batch) == list(range(1000))
    assert max(sums) <= 800
    assert np.median(sums) > 600


def filled_one_by_one(order: list[int], tokens: int, packed: bool) -> list[list[int]]:
    """What :func:`epoch_batches` does with a chunk, example by example."""
    batches: list[list[int]] = []
    for number in order:
        last = [*batches[-1], number] if batches else [number]
        lengths = [LENGTHS[i] for i in last]
        if not batches or (sum(lengths) if packed else len(last) * lengths[-1]) > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 150, 800, 3000, 300_000])
def test_batches_of_tokens_are_filled_one_example_after_the_other(tokens: int, packed: bool) -> None:
    rng = np.random.default_rng([1, 2])
    order, chunk = rng.permutation(1000).tolist(), max(1, int(tokens / np.mean(LENGTHS))) * 50
    expected = []
    for start in range(0, 1000, chunk):
        part = order[start : start + chunk]
        cut = filled_one_by_one(part if packed else sorted(part, key=LENGTHS.__getitem__), tokens, packed)
        expected += [cut[i] for i in rng.permutation(len(cut))]
    assert epoch_batches(LENGTHS, None, seed=1, epoch=2, tokens=tokens, packed=packed) == expected
    assert count_batches(LENGTHS, seed=1, epoch=2, tokens=tokens, packed=packed) == len(expected)


def test_steps_of_many_epochs_are_counted_without_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Epochs(LENGTHS, None, 800, seed=1).end(2)
    monkeypatch.setattr("ticktune.data.batches.epoch_batches", None)
    asked = list[int]()
    assert Epochs(LENGTHS, None, 800, seed=1, poll=lambda: asked.append(1)).end(2) == expected
    assert len(asked) == 3


def test_a_signal_is_noticed_while_steps_are_counted() -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        Epochs(LENGTHS, None, 800, seed=1, poll=stop).find(10_000)


def padded_sizes(part: list[int]) -> tuple[int, int]:
    longest = max(LENGTHS[i] for i in part)
    return len(part) * longest**2, len(part) * longest


def packed_sizes(part: list[int]) -> tuple[int, int]:
    rows = packed_rows([LENGTHS[i] for i in part], 256)
    longest = max(sum(LENGTHS[part[place]] for place in row) for row in rows)
    return len(rows) * longest**2, len(rows) * longest


def largest_of(sizes: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(map(max, zip(*sizes, strict=True)))


@pytest.mark.parametrize(("batch_size", "tokens", "size"), [(32, None, 32), (32, None, 7), (None, 512, 7)])
def test_no_micro_batch_is_larger_than_those_that_are_tried(
    batch_size: int | None, tokens: int | None, size: int
) -> None:
    epochs = Epochs(LENGTHS, batch_size, tokens, seed=1)
    tried = largest_of([padded_sizes(part) for part in largest_padded(LENGTHS, size, tokens)])
    occur = [padded_sizes(p) for epoch in range(30) for b in epochs.batches(epoch) for p in micro_batches(b, size)]
    assert all(a >= b for a, b in zip(tried, largest_of(occur), strict=True))


def test_of_batches_of_tokens_more_than_the_longest_rows_is_tried() -> None:
    # One row of 300, or two of 250 tokens: 500 of 512, and more pairs of tokens too.
    assert largest_padded([10, 250, 300, 250, 10], 5, 512) == [[1, 3]]
    # 20 of 25 tokens, or one of 300.
    assert largest_padded([25] * 30 + [300], 50, 512) == [[30], list(range(20))]
    assert largest_padded([3, 9, 1, 9, 4], 2) == [[1, 3]]
    assert largest_padded([30, 20, 10], 5, 25) == [[0]]  # a longer one is a batch of its own


@pytest.mark.parametrize(("batch_size", "tokens", "size"), [(32, None, 32), (None, 1024, 1000), (None, 1024, 9)])
def test_no_packed_micro_batch_is_larger_than_those_that_are_tried(
    batch_size: int | None, tokens: int | None, size: int
) -> None:
    epochs = Epochs(LENGTHS, batch_size, tokens, seed=1, packed=True)
    steps = epochs.end(10)
    occur = [packed_sizes(p) for epoch in range(11) for b in epochs.batches(epoch) for p in micro_batches(b, size)]
    tried = [packed_sizes(part) for part in largest_packed(epochs, steps, size, 256)]
    assert largest_of(tried) == largest_of(occur)
    polls = list[int]()
    largest_packed(epochs, 5, size, 256, lambda: polls.append(1))
    assert len(polls) == 5  # no step is looked at that is not taken
