"""Chunks and stitching: the truth is the written contract, searched by brute force, and hand-worked cases."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.audio import chunk as chunk_module
from htsat.audio.chunk import Chunk, Stitcher, chunk_stream, num_tokens, pool_chunks, token_sample


def split(recording, sizes):
    """Cut a recording into blocks of the given sizes, repeated."""
    blocks, start = [], 0
    while start < len(recording):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(recording[start : start + size])
        start += size
    return blocks


def starts_by_definition(num_samples, chunk_samples, tokens, hop):
    """Start tokens read off the contract, token by token."""
    grid = [
        int(np.floor(t * chunk_samples / tokens + 0.5))
        for t in range(2 * (num_samples * tokens // chunk_samples + tokens + 2))
    ]
    if num_samples <= chunk_samples:
        return [0]
    inside = [t for t in range(0, len(grid), hop) if grid[t] + chunk_samples <= num_samples]
    last = next(t for t in range(len(grid)) if grid[t] + chunk_samples >= num_samples)
    return sorted({*inside, last})


shapes = st.integers(1, 12).flatmap(
    lambda tokens: st.tuples(st.integers(tokens, 60), st.just(tokens), st.integers(1, tokens))
)
sizes = st.lists(st.integers(0, 90), min_size=1, max_size=5).filter(any)


@settings(max_examples=150, deadline=None)
@given(shapes, st.integers(1, 400), sizes, st.sampled_from(["pad", "tile"]))
def test_chunks_keep_the_contract(shape, num_samples, block_sizes, short):
    chunk_samples, tokens, hop = shape
    recording = np.arange(1, num_samples + 1, dtype=np.float32)
    chunks = list(chunk_stream(split(recording, block_sizes), chunk_samples, tokens, hop, short))
    assert [c.start_token for c in chunks] == starts_by_definition(num_samples, chunk_samples, tokens, hop)
    covered = np.zeros(num_samples, bool)
    for c in chunks:
        assert c.samples.shape == (chunk_samples,)
        assert c.samples.dtype == np.float32
        assert c.start_sample == token_sample(c.start_token, chunk_samples, tokens)
        np.testing.assert_array_equal(c.samples[: c.length], recording[c.start_sample : c.start_sample + c.length])
        covered[c.start_sample : c.start_sample + c.length] = True
        rest = c.samples[c.length :]
        if num_samples < chunk_samples and short == "tile":
            np.testing.assert_array_equal(c.samples, np.resize(recording, chunk_samples))
        else:
            assert not rest.any()
        if num_samples > chunk_samples:
            assert len(rest) < chunk_samples / tokens + 1, "less than one token of silence"
    assert covered.all()
    whole = chunk_stream([recording], chunk_samples, tokens, hop, short)
    for one, other in zip(chunks, whole, strict=True):
        assert (one.start_token, one.start_sample, one.length) == (other.start_token, other.start_sample, other.length)
        np.testing.assert_array_equal(one.samples, other.samples)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 400))
def test_the_last_chunk_ends_with_the_last_token(shape, num_samples):
    chunk_samples, tokens, hop = shape
    count = num_tokens(num_samples, chunk_samples, tokens)
    assert token_sample(count, chunk_samples, tokens) >= num_samples > token_sample(count - 1, chunk_samples, tokens)
    *_, last = chunk_stream([np.zeros(num_samples, np.float32)], chunk_samples, tokens, hop, "pad")
    if num_samples > chunk_samples:
        assert last.start_token + tokens == count
    else:
        assert count <= tokens


def test_published_numbers():
    """10-s chunks at 32 kHz: tokens of 10,000 samples; 23.1 s with a hop of 5 s."""
    chunks = list(chunk_stream([np.ones(739_200, np.float32)], 320_000, 32, 16, "pad"))
    assert [(c.start_token, c.start_sample, c.length) for c in chunks] == [
        (0, 0, 320_000),
        (16, 160_000, 320_000),
        (32, 320_000, 320_000),
        (42, 420_000, 319_200),
    ]
    assert num_tokens(739_200, 320_000, 32) == 74
    assert [c.start_token for c in chunk_stream([np.ones(640_000, np.float32)], 320_000, 32, 16, "pad")] == [0, 16, 32]


def test_an_empty_recording_has_no_chunks():
    assert list(chunk_stream([], 10, 2, 1, "pad")) == []
    assert num_tokens(0, 10, 2) == 0


def test_chunks_are_copies():
    block = np.ones(50, np.float32)
    stream = chunk_stream([block], 10, 2, 1, "pad")
    first, second = next(stream), next(stream)
    first.samples[:] = 7
    assert second.samples.tolist() == [1.0] * 10
    assert block.max() == 1
    assert isinstance(first, Chunk)


def test_chunks_come_as_soon_as_they_are_complete():
    """A live source must not wait for the end; and memory holds no more than the stream asked for."""
    given_out = 0

    def source():
        nonlocal given_out
        for _ in range(100):
            given_out += 1
            yield np.zeros(10, np.float32)

    stream = chunk_stream(source(), 100, 10, 5, "pad")
    next(stream)
    assert given_out == 10
    next(stream)
    assert given_out == 15


@pytest.mark.parametrize(
    "arguments", [(10, 11, 1, "pad"), (10, 0, 1, "pad"), (10, 2, 3, "pad"), (10, 2, 0, "pad"), (10, 2, 1, "loop")]
)
def test_wrong_arguments_are_refused_at_once(arguments):
    with pytest.raises(ValueError, match=r"expected|must be"):
        chunk_stream([], *arguments)


# stitching


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 400), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_chunks_of_one_function_give_it_back(shape, num_samples, rows_per_page, seed):
    chunk_samples, tokens, hop = shape
    count = num_tokens(num_samples, chunk_samples, tokens)
    truth = np.random.default_rng(seed).random((count + tokens, 3), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_module, "_ROWS_PER_PAGE", rows_per_page)
        stitcher = Stitcher(3, tokens)
        for c in chunk_stream([np.zeros(num_samples, np.float32)], chunk_samples, tokens, hop, "pad"):
            stitcher.add(c.start_token, truth[c.start_token : c.start_token + tokens])
        got = stitcher.finish(count)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, truth[:count])


def test_a_single_chunk_passes_bit_for_bit():
    posteriors = np.random.default_rng(0).random((32, 527), dtype=np.float32)
    stitcher = Stitcher(527, 32)
    stitcher.add(0, posteriors)
    np.testing.assert_array_equal(stitcher.finish(7), posteriors[:7])


def test_cross_fade_worked_by_hand():
    """Weights of 4 tokens: .5 1.5 1.5 .5; silence, then an event, half a chunk later."""
    stitcher = Stitcher(1, 4)
    stitcher.add(0, np.zeros((4, 1)))
    stitcher.add(2, np.ones((4, 1)))
    np.testing.assert_allclose(stitcher.finish(6)[:, 0], [0, 0, 0.25, 0.75, 1, 1])


def test_three_chunks_are_weighted_as_one_sum():
    rng = np.random.default_rng(3)
    starts, tokens = [0, 2, 3, 7], 8
    outputs = rng.random((len(starts), tokens, 2))
    weights = np.minimum(np.arange(tokens) + 0.5, tokens - 0.5 - np.arange(tokens))
    total, norm = np.zeros((15, 2)), np.zeros((15, 1))
    stitcher = Stitcher(2, tokens)
    for start, output in zip(starts, outputs, strict=True):
        stitcher.add(start, output)
        total[start : start + tokens] += weights[:, None] * output
        norm[start : start + tokens] += weights[:, None]
    np.testing.assert_allclose(stitcher.finish(15), total / norm, rtol=1e-6)


def test_stitcher_refuses_what_would_be_wrong():
    rows = np.zeros((4, 2))
    stitcher = Stitcher(2, 4)
    with pytest.raises(ValueError, match=r"not beyond token 0, got 1"):
        stitcher.add(1, rows)
    with pytest.raises(ValueError, match=r"shape \(4, 2\), got \(2, 4\)"):
        stitcher.add(0, rows.T)
    stitcher.add(0, rows)
    for start in (0, 5, -1):
        with pytest.raises(ValueError, match=rf"got {start}"):
            stitcher.add(start, rows)
    with pytest.raises(ValueError, match=r"cover 4 tokens, fewer than the 5"):
        stitcher.finish(5)
    stitcher.finish(4)
    with pytest.raises(ValueError, match=r"finished"):
        stitcher.add(2, rows)
    with pytest.raises(ValueError, match=r"finished"):
        stitcher.finish(4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_is_that_of_the_result():
    """Three hours of 527 classes: 73 MB; twice that would fail."""
    program = """
import numpy as np
from pathlib import Path
from htsat.audio.chunk import Stitcher
def resident(key):
    return int(Path('/proc/self/status').read_text().split(key)[1].split()[0]) * 1024
stitcher = Stitcher(527, 32)
posteriors = np.random.default_rng(0).random((32, 527), dtype=np.float32)
stitcher.add(0, posteriors)
before = resident('VmRSS:')
tokens = 34560
for start in range(16, tokens - 31, 16):
    stitcher.add(start, posteriors)
result = stitcher.finish(tokens)
assert result[-1].any()
print((resident('VmHWM:') - before) / result.nbytes)
"""
    source = str(Path(chunk_module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    assert 0.9 < float(done.stdout) < 1.4


# pooling


def test_pooling_worked_by_hand():
    posteriors = np.array(
        [[0.1, 0.9], [0.5, 0.5], [0.2, 0.0], [0.3, 0.1], [0.4, 0.8], [0.0, 0.2], [0.6, 0.3], [0.7, 0.4]], np.float32
    )
    weights = np.array([4, 4, 4, 4, 4, 4, 4, 1])
    np.testing.assert_allclose(pool_chunks(posteriors, weights, "max"), [0.7, 0.9])
    np.testing.assert_allclose(pool_chunks(posteriors, weights, "top"), [0.65, 0.85])
    np.testing.assert_allclose(
        pool_chunks(posteriors, weights, "mean"), [(4 * 2.1 + 0.7) / 29, (4 * 2.8 + 0.4) / 29], rtol=1e-6
    )
    np.testing.assert_allclose(pool_chunks(posteriors[:3], weights[:3], "top"), [0.5, 0.9])


@pytest.mark.parametrize("rule", ["max", "mean", "top"])
def test_a_single_chunk_is_its_own_pool(rule):
    posteriors = np.random.default_rng(0).random((1, 527), dtype=np.float32)
    pooled = pool_chunks(posteriors, np.array([317_123]), rule)
    assert pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled, posteriors[0])


def test_pooling_refuses_what_would_be_wrong():
    for posteriors, weights in [
        (np.zeros((0, 2)), np.zeros(0)),
        (np.zeros((2, 2)), np.ones(3)),
        (np.zeros(2), np.ones(2)),
    ]:
        with pytest.raises(ValueError, match=r"expected .num_chunks, num_classes"):
            pool_chunks(posteriors, weights, "max")
    with pytest.raises(ValueError, match=r"positive"):
        pool_chunks(np.zeros((2, 2)), np.array([1, 0]), "mean")
    with pytest.raises(ValueError, match=r"rule must be"):
        pool_chunks(np.zeros((2, 2)), np.ones(2), "median")
