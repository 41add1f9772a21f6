import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from statespan.models.generate import Decoding, GrowingText, RowDecoder, generate, score
from statespan.models.hook import VANILLA
from statespan.models.runner import Runner, Tokens
from statespan.models.store import StreamStore, tensors
from tests.tiny import tiny_model


class Letters:
    """Token i is the i-th letter, so that stop strings can be read off the ids."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture(params=["mamba1", "mamba2"])
def runner(request):
    return Runner(tiny_model(request.param))


def prompts(n=3, seed=1):
    make = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 257, (10 + 7 * i,), generator=make).tolist() for i in range(n)]


def test_greedy_tokens_are_those_of_a_full_pass(runner):
    (row,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=6)], Letters()).rows
    text = prompts(1)[0]
    for token in row.ids:
        hidden = runner.model(torch.tensor([text]))
        assert int(runner.model.logits(hidden[:, -1]).argmax()) == token
        text = [*text, token]
    assert row.finish == "length" and len(row.ids) == 6


def test_a_row_of_an_unequal_batch_decodes_as_it_does_alone(runner):
    decodings = [Decoding(max_new_tokens=n) for n in (3, 8, 5)]
    together = generate(runner, VANILLA, prompts(), decodings, Letters()).rows
    for prompt, decoding, row in zip(prompts(), decodings, together, strict=True):
        (alone,) = generate(runner, VANILLA, [prompt], [decoding], Letters()).rows
        assert alone.ids == row.ids and len(row.ids) == decoding.max_new_tokens


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_prompts_read_apart_and_decoded_together_get_what_each_gets_alone_to_the_bit(kind):
    runner = Runner(tiny_model(kind, dtype=torch.float32))
    decodings = [Decoding(max_new_tokens=n) for n in (3, 8, 5)]
    together = generate(runner, VANILLA, prompts(), decodings, Letters(), apart=True)
    assert [one.computed for one in together.read] == [3 * len(prompt) for prompt in prompts()]
    assert len(together.read_seconds) == 3
    for prompt, decoding, row in zip(prompts(), decodings, together.rows, strict=True):
        assert generate(runner, VANILLA, [prompt], [decoding], Letters()).rows == [row]


def test_text_ends_before_the_stop_string(runner):
    (free,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8)], Letters()).rows
    stop = free.text[3:5]
    decoding = Decoding(max_new_tokens=8, stop=(stop,))
    (row,) = generate(runner, VANILLA, prompts(1), [decoding], Letters()).rows
    assert row.finish == "stop" and row.text == free.text[: free.text.find(stop)]


def test_the_end_of_text_token_ends_a_row_and_is_left_out(runner):
    (free,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8)], Letters()).rows
    eos = free.ids[4]
    (row,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8, eos_id=eos)], Letters()).rows
    assert row.ids == free.ids[: free.ids.index(eos)] and row.finish == "stop"


def test_what_would_end_a_text_too_soon_is_not_chosen(runner):
    (free,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8)], Letters()).rows
    ends = {"eos_id": free.ids[0]}, {"stop": (free.text[0],)}
    for end in ends:
        (soon,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8, **end)], Letters()).rows
        assert soon.text == "" and soon.finish == "stop"
        (row,) = generate(
            runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8, min_new_tokens=1, **end)], Letters()
        ).rows
        assert row.text and row.ids[0] != free.ids[0]
    (row,) = generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=8, min_new_tokens=1)], Letters()).rows
    assert row.ids == free.ids  # nothing would end it


def test_sampling_repeats_with_its_seed_and_only_then(runner):
    def draw(seed):
        decoding = Decoding(max_new_tokens=12, temperature=5.0, seed=seed)
        return generate(runner, VANILLA, prompts(1), [decoding], Letters()).rows[0].ids

    assert draw(1) == draw(1) != draw(2)


def test_a_tiny_nucleus_is_greedy(runner):
    sampled = Decoding(max_new_tokens=6, temperature=1.0, top_p=1e-6)
    rows = generate(runner, VANILLA, prompts(1), [sampled], Letters()).rows
    assert rows[0].ids == generate(runner, VANILLA, prompts(1), [Decoding(max_new_tokens=6)], Letters()).rows[0].ids


@pytest.mark.parametrize("scope", ["prefix", "window"])
def test_log_likelihood_is_the_full_pass(runner, scope):
    prefix, targets = prompts(1)[0], [[5, 9, 200], [7]]
    scored = score(runner, VANILLA, prefix, targets, scope).rows
    for target, got in zip(targets, scored, strict=True):
        hidden = runner.model(torch.tensor([[*prefix, *target]]))
        logp = F.log_softmax(runner.model.logits(hidden), dim=-1)[0]
        want = sum(float(logp[len(prefix) - 1 + i, token]) for i, token in enumerate(target))
        assert got.total == pytest.approx(want, abs=1e-9) and got.tokens == len(target)


def test_without_a_prefix_the_first_token_is_read_and_not_scored(runner):
    text = prompts(1)[0]
    whole, single = score(runner, VANILLA, [], [text, text[:1]]).rows
    assert whole == score(runner, VANILLA, text[:1], [text[1:]]).rows[0]
    assert (single.total, single.tokens) == (0.0, 0)


def test_an_empty_target_or_prompt_is_refused(runner):
    with pytest.raises(ValueError, match="at least one token"):
        score(runner, VANILLA, [1], [[]])
    with pytest.raises(ValueError, match="at least one token"):
        Tokens.pad([[1], []])


def test_kept_streams_change_no_bit_and_save_the_layers(runner):
    class FromLayerTwo(type(VANILLA)):
        def first_layer_changed(self, length):
            return 2

    prompt = Tokens.pad(prompts(2))
    sharing = Runner(runner.model, store=StreamStore(1 << 20))
    with torch.inference_mode():
        plain = runner.prefill(prompt, FromLayerTwo())
        first = sharing.prefill(prompt, FromLayerTwo())
        again = sharing.prefill(prompt, FromLayerTwo())
        deeper = sharing.prefill(prompt)
    for other in (first, again, deeper):
        assert torch.equal(other.hidden, plain.hidden)
        assert all(torch.equal(a.ssm, b.ssm) for a, b in zip(other.cache.states, plain.cache.states, strict=True))
    tokens = sum(prompt.lengths)
    assert sharing.work.computed == tokens * (3 + 1 + 1) and sharing.work.shared == tokens * (2 + 2)


def test_the_store_forgets_the_least_recently_used(runner):
    with torch.inference_mode():
        streams = [runner.vanilla(Tokens.pad([row]), 2) for row in prompts()]
    store = StreamStore(sum(one.nbytes for one in tensors(streams[1:])))
    for i, stream in enumerate(streams):
        store.put(f"p{i}", 2, stream)
    assert store.deepest("p0", 2) is None and store.deepest("p2", 3) is not None and len(store) == 2


class Bytes:
    """Token i is byte i; what is no whole character shows as U+FFFD, as in a byte-level tokenizer."""

    decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        return bytes(ids).decode(errors="replace")


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_a_growing_text_is_the_text_of_all_its_tokens(raw):
    growing = GrowingText(Bytes())
    for count, token in enumerate(raw, start=1):
        growing.add(token)
        assert growing.whole == bytes(raw[:count]).decode(errors="replace")


def test_a_growing_text_decodes_each_token_a_few_times_only():
    counting = Bytes()
    growing = GrowingText(counting)
    for token in "naïve – 長い文".encode() * 50:
        growing.add(token)
    assert growing.whole == "naïve – 長い文" * 50 and counting.decoded < 6 * 50 * len("naïve – 長い文".encode())


def test_a_stop_string_across_tokens_and_settled_text_is_found(runner):
    decoder = RowDecoder(Decoding(max_new_tokens=9, stop=("cde",)), Letters())
    for token in range(9):
        logits = torch.zeros(26)
        logits[token] = 1.0
        if decoder.accept(logits) is None:
            break
    assert (decoder.text, decoder.finish, decoder.ids) == ("ab", "stop", [0, 1, 2, 3, 4])
