"""Facts of the columns that are computed anew and of the store of keys and values."""

import random

import pytest
import torch

from CoDALanguageModel.cache import PAGE, SLACK, CachedText, CanvasCache, Columns, PagedCache

HEADS, HEAD_DIM, LAYERS = 2, 3, 2
TOKEN_BYTES = 2 * LAYERS * HEADS * HEAD_DIM * 4


def test_columns_are_gathered_in_order_and_short_rows_repeat_their_first():
    wanted = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    columns = Columns.of(wanted)
    assert columns.index.tolist() == [[1, 3, 4], [2, 2, 2]]
    assert columns.valid.tolist() == [[True, True, True], [True, False, False]]
    for row, column in wanted.nonzero().tolist():
        assert columns.index[row, columns.slot[row, column]] == column
    assert columns.take(torch.arange(10).view(2, 5)).tolist() == [[1, 3, 4], [7, 7, 7]]


def test_the_store_keeps_what_a_pass_does_not_compute():
    cache = CanvasCache(3, 4)
    whole = torch.randn(3, 2, 4, 5)
    keys, _ = cache.bind(None, None).update(whole, whole, 0)
    assert torch.equal(keys, whole)
    fresh = torch.randn(1, 2, 2, 5)
    keys, _ = cache.bind(torch.tensor([1]), torch.tensor([[0, 3]])).update(fresh, fresh, 0)
    assert torch.equal(keys[0, :, [0, 3]], fresh[0])
    assert torch.equal(keys[0, :, [1, 2]], whole[1, :, [1, 2]])
    keys, _ = cache.bind(torch.tensor([0, 2]), torch.tensor([[1], [1]])).update(whole[:2, :, :1], whole[:2, :, :1], 0)
    assert torch.equal(keys[:, :, [0, 2, 3]], whole[[0, 2]][:, :, [0, 2, 3]])


def test_a_row_can_be_taken_over_from_another_cache():
    mine, other = CanvasCache(2, 3), CanvasCache(1, 3)
    a, b = torch.randn(2, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mine.bind(None, None).update(a, a, 0)
    other.bind(None, None).update(b, b, 0)
    mine.adopt(other, torch.tensor([1]), torch.tensor([0]))
    assert torch.equal(mine.keys[0][1], b[0])
    assert torch.equal(mine.keys[0][0], a[0])


def run(
    cache: PagedCache, texts: list[CachedText], keep: torch.Tensor, seed: int = 0
) -> list[tuple[torch.Tensor, ...]]:
    """A pass of all layers; of each one its columns' keys and values, and what the cache gives back."""
    cache.bind(texts, keep)
    draws = torch.Generator().manual_seed(seed)
    layers = []
    for layer_idx in range(LAYERS):
        keys, values = torch.randn(2, len(texts), HEADS, keep.shape[1], HEAD_DIM, generator=draws)
        layers.append((keys, values, *cache.update(keys, values, layer_idx)))
    return layers


def append(cache: PagedCache, text: CachedText, count: int) -> None:
    run(cache, [text], torch.ones(1, count, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(6))
def test_pages_give_what_lists_of_all_tokens_give(seed):
    """Under texts that come, share, grow by ragged parts and leave in any order."""
    draws = random.Random(seed)
    cache, lists = PagedCache(), {}  # text -> per layer and kind the (H_kv, D) of its tokens
    for number in range(80):
        if len(lists) < 2 or draws.random() < 0.3:
            parent = draws.choice([None, *lists])
            length = 0 if parent is None else draws.randint(0, cache.length(parent))
            child = cache.open(parent, length)
            lists[child] = [
                [[] if parent is None else old[:length] for old in x] for x in lists.get(parent, [[[], []]] * 2)
            ]
        if draws.random() < 0.25:
            leaving = draws.choice(list(lists))
            cache.close(leaving)
            del lists[leaving]
        texts = draws.sample(list(lists), draws.randint(1, len(lists))) if lists else [cache.open()]
        lists.setdefault(texts[0], [[[], []] for _ in range(LAYERS)])
        texts.append(texts[0])
        width = draws.choice([1, 4, 40])
        keep = torch.rand(len(texts), width, generator=torch.Generator().manual_seed(number)) < draws.random()
        keep[-1] = False
        before = [cache.length(text) for text in texts]
        layers = run(cache, texts, keep, seed=number)
        assert cache.key_lengths.tolist() == before
        for layer, (*fresh, keys, values) in enumerate(layers):
            for kind, given in enumerate((keys, values)):
                assert given.shape == (len(texts), HEADS, max(before) + width, HEAD_DIM)
                for row, text in enumerate(texts):
                    stored = lists[text][layer][kind][: before[row]]
                    if stored:
                        assert torch.equal(given[row, :, : before[row]], torch.stack(stored, dim=1))
                    assert not given[row, :, before[row] : max(before)].any()
                    assert torch.equal(given[row, :, max(before) :], fresh[kind][row])
                    lists[text][layer][kind] += list(fresh[kind][row][:, keep[row]].unbind(1))
        assert [cache.length(text) for text in lists] == [len(x[0][0]) for x in lists.values()]


def test_memory_follows_the_live_tokens():
    cache = PagedCache()
    texts = [cache.open() for _ in range(8)]
    lengths = [16 * 2**i for i in range(8)]
    for text, length in zip(texts, lengths, strict=True):
        for start in range(0, length, 100):
            append(cache, text, min(100, length - start))
        live = sum(map(cache.length, texts))
        assert live * TOKEN_BYTES <= cache.num_bytes <= (live + 9 * PAGE) * (1 + 1 / SLACK) * TOKEN_BYTES
    cache.close(texts[-1])
    assert cache.num_bytes == TOKEN_BYTES * (sum(lengths[:-1]) + PAGE)  # what lay at the end of the pool is given back
    for text in texts[:-1]:
        cache.close(text)
    assert cache.num_bytes == 0


def test_a_shared_beginning_is_stored_once():
    cache = PagedCache()
    parent = cache.open()
    append(cache, parent, 10 * PAGE + 3)
    before = cache.num_bytes
    children = [cache.open(parent, 10 * PAGE + 3) for _ in range(8)]
    assert cache.num_bytes <= (before + 8 * PAGE * TOKEN_BYTES) * (1 + 1 / SLACK)
    cache.close(parent)
    for child in children[1:]:
        cache.close(child)
    append(cache, children[0], 1)
    assert cache.length(children[0]) == 10 * PAGE + 4


def test_freed_pages_are_used_again():
    cache = PagedCache()
    staying, leaving = cache.open(), cache.open()
    append(cache, leaving, 20 * PAGE)
    append(cache, staying, 30 * PAGE)
    before = cache.num_bytes
    for _ in range(5):
        cache.close(leaving)
        leaving = cache.open()
        append(cache, leaving, 20 * PAGE)
    assert cache.num_bytes == before


def test_what_is_not_finite_in_one_text_reaches_no_other():
    cache = PagedCache()
    broken, short, long = (cache.open() for _ in range(3))
    append(cache, long, 2 * PAGE)
    cache.bind([broken], torch.ones(1, PAGE, dtype=torch.bool))
    nan = torch.full((1, HEADS, PAGE, HEAD_DIM), torch.nan)
    cache.update(nan, nan, 0)
    cache.close(broken)
    append(cache, short, 3)
    for _, _, keys, values in run(cache, [short, long], torch.zeros(2, 1, dtype=torch.bool)):
        assert keys.isfinite().all()
        assert values.isfinite().all()


def test_texts_come_and_go_outside_of_the_inference_mode_of_the_passes():
    cache = PagedCache()
    parent, other = cache.open(), cache.open()
    with torch.inference_mode():
        append(cache, parent, 3)
        append(cache, other, 5 * PAGE)
    child = cache.open(parent, 2)
    cache.close(other)
    with torch.inference_mode():
        (_, _, keys, _), *_ = run(cache, [parent, child], torch.tensor([[True], [False]]))
    assert torch.equal(keys[0, :, :2], keys[1, :, :2])


def test_texts_that_cannot_be_are_refused():
    cache = PagedCache()
    text = cache.open()
    append(cache, text, 3)
    with pytest.raises(ValueError, match="grows in one row"):
        cache.bind([text, text], torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="first 4 tokens"):
        cache.open(text, 4)
    with pytest.raises(ValueError, match="first 1 tokens"):
        cache.open(None, 1)
    assert cache.length(text) == 3
    cache.close(text)
    with pytest.raises(KeyError):
        cache.close(text)
    with pytest.raises(ValueError, match="text that is open"):
        cache.bind([text], torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(("kernel", "atol"), [("sdpa", 1e-12), ("eager", 1e-5)])  # eager's softmax is one of float32
@torch.no_grad()
def test_the_model_sees_through_pages_what_it_sees_in_whole_texts(make_model, tokens, kernel, atol):
    """Of ragged texts, one of which began as a copy of another, and with a block that nobody keeps."""
    model = make_model(attention="block_causal", block_size=4).double()
    model.set_attn_implementation(kernel)
    lengths = [36, 8, 20]
    ids = tokens(3, 40)
    ids[2, :20] = ids[0, :20]
    cache = PagedCache()
    first, second = cache.open(), cache.open()
    keep = torch.arange(36) < torch.tensor(lengths[:2])[:, None]
    place = torch.arange(36)
    causal = place[:, None] // 4 >= place // 4
    model(ids[:2, :36], attention_mask=causal.expand(2, 1, 36, 36), past_key_values=cache.bind([first, second], keep))
    texts = [first, second, cache.open(first, 20)]
    for kept in (False, True):
        keep = torch.full((3, 4), kept)
        cache.bind(texts, keep)
        position_ids = cache.key_lengths[:, None] + torch.arange(4)
        seen = torch.arange(max(lengths)) < cache.key_lengths[:, None]
        mask = torch.cat([seen, torch.ones(3, 4, dtype=torch.bool)], dim=1)[:, None, None].expand(3, 1, 4, -1)
        logits = model(
            ids.gather(1, position_ids), attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).logits
        for row, length in enumerate(lengths):
            whole = model(ids[row : row + 1, : length + 4]).logits[0, -4:]
            torch.testing.assert_close(logits[row], whole, atol=atol, rtol=0)
    assert [cache.length(text) for text in texts] == [40, 12, 24]
