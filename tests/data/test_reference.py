"""Numbers of a reference on disk: kept whole or not at all, and a pass that goes on where it was."""

import os
import re
import resource

import numpy as np
import pytest

from jaxpost.data.reference import GroupLogprobs, Part, ReferenceCache, file_hash

OFFSETS = np.array([0, 2, 3, 6])
PARTS = [
    Part(np.array([2, 0]), np.array([3.0, 4.0, 5.0, 0.0, 1.0], np.float32)),
    Part(np.array([1]), np.array([2.0], np.float32)),
]


def test_groups_come_back_in_their_order_whatever_the_batches(tmp_path):
    cache = ReferenceCache(tmp_path, "key", OFFSETS)
    assert cache.read() is None
    assert cache.batches_done("plan") == 0
    for index, part in enumerate(PARTS):
        cache.add(index, part)
    found = cache.finish(cache.stored(2))
    assert [x.tolist() for x in found] == [[0.0, 1.0], [2.0], [3.0, 4.0, 5.0]]
    assert [x.tolist() for x in ReferenceCache(tmp_path, "key", OFFSETS).read()] == [x.tolist() for x in found]
    assert [path.name for path in tmp_path.iterdir()] == ["key.npy"]


def test_an_interrupted_pass_goes_on_unless_its_plan_changed(tmp_path):
    cache = ReferenceCache(tmp_path, "key", OFFSETS)
    assert cache.batches_done("plan") == 0
    cache.add(0, PARTS[0])
    assert cache.read() is None
    assert ReferenceCache(tmp_path, "key", OFFSETS).batches_done("plan") == 1
    assert ReferenceCache(tmp_path, "key", OFFSETS).batches_done("another plan") == 0
    assert not (cache.parts / "0.npz").exists()


def test_what_is_missing_or_not_finite_is_never_kept(tmp_path):
    cache = ReferenceCache(tmp_path, "key", OFFSETS)
    with pytest.raises(ValueError, match="1 tokens have no finite log-probability"):
        cache.finish(PARTS[:1])
    assert cache.read() is None
    with pytest.raises(ValueError, match="5 log-probabilities do not fit 6 tokens"):
        GroupLogprobs(np.zeros(5, np.float32), OFFSETS)


def test_a_full_disk_keeps_nothing_and_names_the_file(tmp_path):
    """RLIMIT_FSIZE makes the file system refuse further bytes; NumPy alone would leave half an array in silence."""
    cache = ReferenceCache(tmp_path, "key", np.array([0, 100]))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, unlimited[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(cache.file))):
            cache.finish([Part(np.array([0]), np.zeros(100, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


def test_other_bytes_have_another_hash(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "memory"
    file.write_bytes(b"one")
    first = file_hash(file, memory)
    assert file_hash(file, memory) == first
    file.write_bytes(b"two")
    assert file_hash(file, memory) != first


def test_other_bytes_with_the_old_time_have_another_hash(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "memory"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    first = file_hash(file, memory)
    (tmp_path / "copy").write_bytes(b"two")
    os.utime(tmp_path / "copy", ns=(1, 1))
    os.replace(tmp_path / "copy", file)
    assert file_hash(file, memory) != first
