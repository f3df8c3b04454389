"""Where an entry is extended in place, where it is copied, and how much room there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adaskip_compile.kv_cache.growing_storage import GrowingStorages
from adaskip_passes.specialise.append_in_place import token_major

SHAPE = torch.Size((2, 3, 160, 8))


@pytest.fixture
def storages():
    return GrowingStorages()


@pytest.fixture
def entry(storages):
    (begun,) = storages.begun([SHAPE], [torch.empty(0)])
    return begun.copy_(torch.randn(SHAPE))


def assert_extended(longer: torch.Tensor, before: torch.Tensor, tokens: int) -> None:
    *outer, length, width = before.shape
    assert longer.shape == (*outer, length + tokens, width)
    assert longer.stride() == token_major(longer.shape)
    assert longer.dtype == before.dtype
    assert not longer._is_view()
    assert torch.equal(longer.narrow(-2, 0, length), before)


def test_room_is_a_sixteenth_of_the_tokens_and_copies_are_few(storages, entry):
    places, before = set(), entry.clone()
    for length in range(160, 2000):
        places.add(entry.data_ptr())
        room = entry.untyped_storage().nbytes() // (4 * 2 * 3 * 8)
        assert length <= room <= length + max(length // 16, 64)
        (entry,) = storages.extended([entry], 1)
        assert_extended(entry, before, entry.shape[-2] - 160)
    assert len(places) < 25


SHORTER_OR_OTHER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cropped": lambda entry: entry[..., :-1, :],
    "later tokens": lambda entry: entry[..., 1:, :],
    "fewer rows": lambda entry: entry[:1],
    "the last row": lambda entry: entry[1:],
    "fewer heads": lambda entry: entry[:, :2],
    "narrower": lambda entry: entry[..., :4],
    "of another type": lambda entry: entry.view(torch.int32),
    "a copy": lambda entry: entry.clone(),
    "heads outermost": lambda entry: entry.contiguous(),
}


@pytest.mark.parametrize("change", SHORTER_OR_OTHER.values(), ids=SHORTER_OR_OTHER)
@pytest.mark.parametrize("tokens", [1, 5])
def test_all_but_the_longest_view_is_copied(storages, entry, change, tokens):
    other = change(entry)
    before, whole = other.clone(), entry.clone()
    (longer,) = storages.extended([other], tokens)
    assert_extended(longer, before, tokens)
    assert longer.untyped_storage().data_ptr() != entry.untyped_storage().data_ptr()
    (own,) = storages.extended([entry], tokens)
    assert own.data_ptr() == entry.data_ptr()  # the longest view itself still has its room
    longer.zero_()
    assert torch.equal(entry, whole)


def test_of_two_ends_of_a_fork_one_goes_on_in_place(storages, entry):
    before = entry.clone()
    first, second = storages.extended([entry, entry], 1)
    assert first.data_ptr() == entry.data_ptr() != second.data_ptr()
    first[..., -1, :], second[..., -1, :] = 1.0, 2.0
    for end, value in ((first, 1.0), (second, 2.0)):
        (longer,) = storages.extended([end], 1)
        assert longer.data_ptr() == end.data_ptr()
        assert torch.equal(longer[..., :160, :], before)
        assert longer[..., 160, :].eq(value).all()


def test_entries_made_in_inference_mode_are_written_outside_of_it(storages):
    with torch.inference_mode():
        (entry,) = storages.begun([SHAPE], [torch.empty(0)])
        (longer,) = storages.extended([entry], 1)
    for one in (entry, longer):
        assert one.zero_().eq(0).all()


def test_records_of_storages_that_are_gone_are_dropped(storages):
    for _ in range(3000):
        storages.begun([torch.Size((1, 1, 1, 1))], [torch.empty(0)])
    assert len(storages._known) <= 1025


def test_nothing_is_held_of_requests_that_have_ended():
    storages = GrowingStorages()
    for _ in range(5):
        entries = storages.begun([torch.Size((1, 2, 8, 4))] * 3, [torch.zeros(1)] * 3)
    assert len(storages._known) == 6  # those of this request, and those that were there when it began
    del entries
    storages.begun([torch.Size((1, 2, 8, 4))], [torch.zeros(1)])
    assert len(storages._known) == 1
