"""Every speaker equally often, in an order that repeats."""

from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.dataio.sampler import DistributedSamplerWrapper, ReproducibleRandomSampler

from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.sampling import BalancedSampler, SharedOrder
from speechbrain_qmargin.data.speech_dataset import SpeechDataset

CLASSES = ["b", "a", "a", "c", "a", "c", "a"]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(0, 3),
    st.integers(1, 9),
)
def test_every_class_equally_often_in_rounds(classes, epoch, rounds):
    sampler = BalancedSampler(classes, rounds=rounds)
    sampler.set_epoch(epoch)
    order = list(sampler)
    count = len(set(classes))
    assert len(order) == len(sampler) == rounds * count
    assert len(set(order)) == len(order)  # no draw twice
    for start in range(0, len(order), count):
        names = [classes[index % len(classes)] for index in order[start : start + count]]
        assert len(set(names)) == count
    items = Counter(index % len(classes) for index in order)
    for name in set(classes):  # an item again only when all of its class have been
        counts = [items[i] for i, other in enumerate(classes) if other == name]
        assert max(counts) - min(counts) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed=0, epoch=1):
        return list(BalancedSampler(CLASSES, seed=seed, epoch=lambda: epoch))

    assert order() == order()
    assert order() != order(epoch=2)
    assert order() != order(seed=1)
    sampler = BalancedSampler(CLASSES)
    sampler.set_epoch(1)
    assert list(sampler) == order()


def test_size_of_an_epoch_and_bad_values():
    assert len(BalancedSampler(CLASSES)) == 9
    with pytest.raises(ValueError, match="no items"):
        BalancedSampler([])
    with pytest.raises(ValueError, match="rounds: 0"):
        BalancedSampler(CLASSES, rounds=0)
    plain = BalancedSampler(CLASSES, rounds=8, distinct_draws=False)
    assert max(plain) < len(CLASSES)


def test_ranks_share_an_epoch():
    whole = list(BalancedSampler(CLASSES, rounds=4, epoch=lambda: 2))
    parts = []
    for rank in range(2):
        wrapped = DistributedSamplerWrapper(
            BalancedSampler(CLASSES, rounds=4, epoch=lambda: 2),
            num_replicas=2,
            rank=rank,
            shuffle=False,
            drop_last=True,
        )
        parts.append(list(wrapped))
    assert [parts[i % 2][i // 2] for i in range(len(whole))] == whole


def test_another_draw_of_an_item_is_another_crop(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(16000) / 9, 16000)
    path = str(tmp_path / "a.wav")
    manifest = Manifest.of(Item(name, path, "a", 0.0, 1.0) for name in "xy")
    data = SpeechDataset(manifest, 16000, crop=0.1)
    again = [data[index] for index in (0, 2, 4, 0, 2, -2)]
    assert {found["id"] for found in again} == {"x"}
    assert not torch.equal(again[0]["sig"], again[1]["sig"])
    assert not torch.equal(again[1]["sig"], again[2]["sig"])
    assert torch.equal(again[0]["sig"], again[3]["sig"])
    assert torch.equal(again[1]["sig"], again[4]["sig"])
    assert torch.equal(again[0]["sig"], again[5]["sig"])


@pytest.mark.parametrize(("items", "processes"), [(103, 4), (8, 2), (3, 1), (2, 3)])
def test_a_shared_order_is_that_of_speechbrain(items, processes):
    """Which holds it as Python's numbers, several times, in every process."""
    for rank in range(processes):
        dealt = DistributedSamplerWrapper(
            ReproducibleRandomSampler(range(items), seed=5),
            num_replicas=processes,
            rank=rank,
            shuffle=False,
            drop_last=True,
        )
        order = SharedOrder(items, rank, processes, seed=5)
        for epoch in (1, 2):
            order.set_epoch(epoch)
            dealt.set_epoch(epoch)
            assert len(order) == len(list(order)) == items // processes
            if len(order) > 1:  # of one item theirs makes a number
                assert list(order) == list(dealt)
