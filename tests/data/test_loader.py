"""The data contract: a batch is a pure function of data, seed and position, whoever asks for which part of it."""

import gc
import json
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.config.schema import DataConfig
from jaxlm.data.corpus import open_corpora
from jaxlm.data.loader import Loader, _order, batches
from jaxlm.data.store import TokenFolder

NAMES = {"tokens", "targets", "segment_ids", "positions", "loss_mask"}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def part(batch, start, stop):
    return {name: array[start:stop] for name, array in batch.items()}


def row_by_hand(documents, row, length, document_mask):
    """Row `row` of the concat packing of documents (lists of ids with eos), one token at a time."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    window = stream[row * length : row * length + length + 1]
    made = {name: [] for name in NAMES}
    segment = position = 0
    for i in range(length):
        inside, follows = i < len(window), i + 1 < len(window)
        fresh = i == 0 or (inside and document_mask and window[i][1] != window[i - 1][1])
        segment, position = (segment + 1, 0) if fresh and inside else (segment, position + 1)
        same = follows and (window[i][1] == window[i + 1][1] or not document_mask)
        made["tokens"].append(window[i][0] if inside else 256)
        made["targets"].append(window[i + 1][0] if follows else 256)
        made["segment_ids"].append(segment if inside else 0)
        made["positions"].append(position if inside else i - len(window))
        made["loss_mask"].append(float(same))
    return made


@pytest.mark.parametrize("document_mask", [True, False])
def test_rows_by_hand(corpora, config, texts, document_mask):
    loader = Loader(corpora, config(document_mask=document_mask))
    (corpus,) = corpora.corpora
    documents = [[*texts[number].encode(), 256] for number in corpus.train.documents]
    count = loader.samples_per_epoch
    assert count == -(-(sum(map(len, documents)) - 1) // 64)
    batch, ids = loader.rows(0, 0, count), loader.sample_ids(0, count)
    assert {name: array.dtype for name, array in batch.items()} == {
        name: np.float32 if name == "loss_mask" else np.int32 for name in NAMES
    }
    for i, sample in enumerate(ids):
        expected = row_by_hand(documents, int(sample.split(":")[1]), 64, document_mask)
        for name in NAMES:
            assert batch[name][i].tolist() == expected[name], (sample, name)
    assert batch["segment_ids"].max() > 2 if document_mask else batch["segment_ids"].max() == 1


@pytest.mark.parametrize("document_mask", [True, False])
def test_fit_rows_predict_each_token_once_and_mask_the_padding(corpora, config, document_mask):
    loader = Loader(corpora, config(packing="fit", document_mask=document_mask, sequence_length=300))
    batch = loader.rows(0, 0, loader.samples_per_epoch)
    (corpus,) = corpora.corpora
    padding = batch["segment_ids"] == 0
    assert padding.any() and not batch["loss_mask"][padding].any()
    if document_mask:
        assert batch["loss_mask"].sum() == (corpus.train.lengths - 1).sum()
        assert not batch["loss_mask"][batch["tokens"] == 256].any()
        assert ((batch["positions"] == 0) <= (np.diff(batch["segment_ids"], prepend=-1) != 0)).all()
    else:
        assert (batch["segment_ids"].max(), batch["loss_mask"][batch["tokens"] == 256].max()) == (1, 1)
        assert (batch["loss_mask"][:, :-1] == batch["segment_ids"][:, 1:]).all()


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_rows_are_the_same_whoever_asks(corpora, config, packing):
    loader, other = Loader(corpora, config(packing=packing)), Loader(corpora, config(packing=packing, batch_size=3))
    whole = loader.rows(7, 0, 12)
    for hosts in (2, 3, 12):
        size = 12 // hosts
        assert all(
            equal(other.rows(7, h * size, (h + 1) * size), part(whole, h * size, h * size + size)) for h in range(hosts)
        )
    for position in range(7, 19):  # another batch size
        assert equal(other.rows(position, 0, 1), part(whole, position - 7, position - 6))
    assert other.sample_ids(7, 12) == loader.sample_ids(7, 5) + loader.sample_ids(12, 7)


def test_each_epoch_has_the_same_samples_in_its_own_order(corpora, config):
    loader = Loader(corpora, config())
    n = loader.samples_per_epoch
    first, second = loader.sample_ids(0, n), loader.sample_ids(n, n)
    assert len(set(first)) == n and sorted(first) == sorted(second) and first != second
    assert first != sorted(first, key=lambda sample: int(sample.split(":")[1]))
    other = Loader(corpora, config(seed=1))
    assert sorted(other.sample_ids(0, n)) == sorted(first)
    assert other.sample_ids(0, n) not in (first, second)
    assert not equal(loader.rows(0, 0, n), loader.rows(n, 0, n))


@pytest.mark.parametrize("rows", [1, 2, 3, 1000, 2**16])
def test_order_of_any_number_of_rows(rows):
    """Below and above the number from which Grain shuffles."""
    order = _order([0, rows], [], 3)
    epochs = [[int(order[i]) for i in range(e * rows, (e + 1) * rows)] for e in range(2 if rows < 2**16 else 1)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 4 or len({tuple(range(rows)), *map(tuple, epochs)}) == 1 + len(epochs)
    assert 0 <= order[10**14] < rows


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [_order([0, rows], [], seed) for rows in (100, 2**16) for seed in range(4)]
    epochs = [
        tuple(int(order[e * n + i]) for i in range(50))
        for order, n in zip(orders, [100] * 4 + [2**16] * 4, strict=True)
        for e in range(4)
    ]
    assert len(set(epochs)) == len(epochs)


def test_far_positions_cost_nothing(corpora, config):
    loader = Loader(corpora, config())
    loader.rows(0, 0, 1)
    began = time.perf_counter()
    assert loader.rows(10**13, 0, 4)["tokens"].shape == (4, 64)
    assert time.perf_counter() - began < 0.5


def test_validation_samples_do_not_depend_on_the_seed(corpora, config):
    a, b = (Loader(corpora, config(seed=seed), "validation") for seed in (0, 1))
    assert a.sample_ids(0, 9) == b.sample_ids(0, 9)
    trained = {bytes(row) for row in Loader(corpora, config()).rows(0, 0, 200)["tokens"]}
    assert not trained & {bytes(row) for row in a.rows(0, 0, a.samples_per_epoch)["tokens"]}


@pytest.fixture
def two(tmp_path, texts):
    """Two corpora, one three times the other."""

    def make(**changes):
        for name, chosen in (("a", texts[:10] * 3), ("b", texts[:10])):
            lines = (json.dumps({"text": text}) + "\n" for text in chosen)
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        paths = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
        config = DataConfig(
            **{"path": paths, "tokenizer": "bytes", "cache": str(tmp_path), "validation": 0.0, "sequence_length": 32}
            | changes
        )
        return Loader(open_corpora(config), config)

    return make


def corpora_of(samples):
    return Counter(sample.split(":")[0] for sample in samples)


def test_mixture_by_weight(two):
    loader = two(weights=(1.0, 4.0))
    counts = corpora_of(loader.sample_ids(0, 5000))
    assert counts["b.jsonl"] == pytest.approx(4000, abs=20)
    assert corpora_of(loader.sample_ids(10**9, 50))["b.jsonl"] == pytest.approx(40, abs=2)  # evenly all along
    small = [s for s in loader.sample_ids(0, 5000) if s.startswith("b")]
    n = len(set(small))
    assert sorted(small[:n]) == sorted(small[n : 2 * n]) and small[:n] != small[n : 2 * n]


def test_mixture_by_size_is_every_sample_once_an_epoch(two):
    loader = two()
    n = loader.samples_per_epoch
    samples = loader.sample_ids(0, n)
    assert len(set(samples)) == n
    counts = corpora_of(samples)
    assert counts["a.jsonl"] == pytest.approx(3 * counts["b.jsonl"], abs=3)
    assert set(corpora_of(samples[:20])) == {"a.jsonl", "b.jsonl"}


def test_too_little_data_names_split_count_and_cure(corpora, config):
    tokens = corpora.tokens("validation")
    with pytest.raises(
        UserError, match=f"too long for the validation split, which has {tokens} tokens.*most {tokens - 1}"
    ):
        Loader(corpora, config(sequence_length=tokens), "validation")
    assert Loader(corpora, config(sequence_length=tokens - 1), "validation").samples_per_epoch == 1
    empty = config(validation=0.0)
    with pytest.raises(UserError, match="--data.validation=0 holds nothing out"):
        Loader(open_corpora(empty), empty, "validation")


def test_an_id_outside_the_vocabulary_names_its_shard(damaged, config):
    path = damaged / "shard-00002.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[5] = 257
    tokens.tofile(path)
    changed = config(path=(str(damaged),), validation=0.0)
    loader = Loader(open_corpora(changed), changed)
    with pytest.raises(UserError, match="holds token 257, outside its vocabulary of 257") as error:
        loader.rows(0, 0, loader.samples_per_epoch)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="SHA-256"):
        TokenFolder(damaged).verify()


MESH = (("data", 4), ("model", 2))


def sharding(_name):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    return NamedSharding(mesh, PartitionSpec("data"))


class Spy(Loader):
    """Remembers which rows were asked for; fails at `fails_at`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked, self.fails_at = [], None

    def rows(self, position, start, stop):
        self.asked.append((position, start, stop))
        if position == self.fails_at:
            raise UserError("the disk went away")
        return super().rows(position, start, stop)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_device_batches_equal_rows(corpora, config, prefetch):
    loader = Spy(corpora, config())
    with batches(loader, 5, 8, sharding, prefetch, stop=5 + 3 * 8) as stream:
        got = list(stream)
    assert [after for after, _, _ in got] == [13, 21, 29]
    assert all(wait >= 0 for _, _, wait in got)
    for position, (_, batch, _) in zip((5, 13, 21), got, strict=True):
        assert equal({name: np.asarray(array) for name, array in batch.items()}, Loader.rows(loader, position, 0, 8))
        assert all(array.sharding == sharding(name) for name, array in batch.items())
    # Each part of the batch is read once, for its own devices, never the batch as a whole.
    assert sorted(loader.asked) == [(p, s, s + 2) for p in (5, 13, 21) for s in (0, 2, 4, 6)]


def test_sequence_sharding(corpora, config):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "context"))
    split = NamedSharding(mesh, PartitionSpec("data", "context"))
    loader = Loader(corpora, config())
    _, batch, _ = next(batches(loader, 0, 4, lambda name: split, 0))
    assert equal({name: np.asarray(array) for name, array in batch.items()}, loader.rows(0, 0, 4))
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 32)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxlm-data"]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_runs_ahead_and_no_further(corpora, config, prefetch):
    loader = Spy(corpora, config())
    stream = batches(loader, 0, 4, sharding, prefetch)
    wait_for(lambda: len(loader.asked) >= prefetch * 4)  # without anyone asking
    time.sleep(0.3)
    assert len(loader.asked) == prefetch * 4
    next(stream)
    wait_for(lambda: len(loader.asked) == prefetch * 4 + 4)
    stream.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer(corpora, config, prefetch):
    loader = Spy(corpora, config())
    loader.fails_at = 8
    stream = batches(loader, 0, 4, sharding, prefetch)
    assert [next(stream)[0], next(stream)[0]] == [4, 8]
    with pytest.raises(UserError, match="the disk went away"):
        next(stream)
    stream.close()
    assert not threads()


def test_forgotten_streams_stop_their_thread(corpora, config):
    stream = batches(Loader(corpora, config()), 0, 4, sharding, prefetch=2)
    next(stream)
    assert threads()
    del stream
    gc.collect()
    assert not threads()
