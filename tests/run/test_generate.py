"""Generation: what comes out, where it stops, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_plan import CONTEXT, run_tiny, tiny_plan, write_text

from snugpt.data.tokenizer import byte_tokenizer
from snugpt.errors import BadQuestionError, FailedError
from snugpt.model.loss import capped_logits
from snugpt.model.sampling import Sampling, choose, cut_tail
from snugpt.run.generate import (
    TrainedModel,
    load_model,
    sample_texts,
    text_stream,
    token_stream,
)
from snugpt.run.run_folder import RunFolder

careful = settings(deadline=None, derandomize=True)
GREEDY = Sampling(temperature=0.0)
PROMPT = "ka le"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    root = tmp_path_factory.mktemp("trained")
    text, quick = write_text(root / "text.txt"), {"learning_rate": 0.01, "save_every_steps": 100}
    return {
        style: run_tiny(tiny_plan(text, style, steps=25, **quick), root / style).folder
        for style in ("nanochat", "llama", "gpt2")
    }


@pytest.fixture(params=["nanochat", "llama", "gpt2"])
def trained(folders: dict[str, RunFolder], request: pytest.FixtureRequest) -> TrainedModel:
    return load_model(folders[request.param])


def ids_of(
    trained: TrainedModel, new: int, sampling: Sampling, samples: int = 1
) -> list[list[int]]:
    stream = token_stream(
        trained, trained.encode(PROMPT), max_new_tokens=new, sampling=sampling, num_samples=samples
    )
    return torch.cat(list(stream), 1).tolist()


@torch.no_grad()
def greedy_by_full_passes(trained: TrainedModel, new: int) -> list[int]:
    model, tokens = trained.model, trained.encode(PROMPT)
    prompt_len = len(tokens)
    for _ in range(new):
        h = model.hidden(torch.tensor([tokens]))[-1:]
        logits = capped_logits(h, model.head_weight, model.shape.logit_softcap)
        tokens.append(int(logits[0, : trained.tokenizer.vocab_size].argmax()))
    return tokens[prompt_len:]


def test_greedy_tokens_are_the_likeliest_of_full_passes(trained: TrainedModel) -> None:
    assert ids_of(trained, 20, GREEDY) == [greedy_by_full_passes(trained, 20)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(trained) -> None:
    texts = [
        "".join(text_stream(trained, PROMPT, max_new_tokens=20, sampling=Sampling(seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_batch_of_greedy_samples_is_the_single_one_repeated(trained: TrainedModel) -> None:
    texts = sample_texts(trained, PROMPT, max_new_tokens=20, sampling=GREEDY, count=3)
    assert texts == ["".join(text_stream(trained, PROMPT, max_new_tokens=20, sampling=GREEDY))] * 3


def test_samples_of_a_batch_differ(trained: TrainedModel) -> None:
    texts = sample_texts(trained, PROMPT, max_new_tokens=15, sampling=Sampling(), count=4)
    assert len(set(texts)) == 4


@pytest.mark.parametrize("seed", range(5))
def test_streamed_text_is_the_decoding_of_the_ids(trained: TrainedModel, seed: int) -> None:
    sampling = Sampling(temperature=2.0, top_k=None, seed=seed)  # also bytes that are not UTF-8
    pieces = list(text_stream(trained, PROMPT, max_new_tokens=20, sampling=sampling))
    assert all(pieces)
    assert "".join(pieces) == trained.tokenizer.decode(ids_of(trained, 20, sampling)[0])


def test_a_character_that_stays_unfinished_is_marked(folders, monkeypatch) -> None:
    trained = TrainedModel(
        load_model(folders["llama"]).model, byte_tokenizer(), torch.device("cpu")
    )
    content = iter("aé".encode()[:2])
    monkeypatch.setattr(
        "snugpt.run.generate.choose", lambda *arguments: torch.tensor([[next(content)]])
    )
    pieces = list(text_stream(trained, PROMPT, max_new_tokens=2, sampling=GREEDY))
    assert pieces == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_it_stops_where_the_context_is_full(trained: TrainedModel) -> None:
    room = CONTEXT - len(trained.encode(PROMPT))
    assert len(ids_of(trained, 10_000, GREEDY)[0]) == room
    assert len(ids_of(trained, room - 1, GREEDY)[0]) == room - 1


def with_end_of_text_at(
    trained: TrainedModel, monkeypatch, ends: list[list[int]]
) -> list[list[int]]:
    """Generate with rows that end at these steps: the choice is replaced by a script."""
    end, step = trained.tokenizer.end_of_text_id, 0

    def scripted(logits, sampling, generator):
        nonlocal step
        step += 1
        return torch.tensor([[end if step in row else 5] for row in ends])

    monkeypatch.setattr("snugpt.run.generate.choose", scripted)
    return [
        trained.tokenizer.encode(text)
        for text in sample_texts(
            trained, PROMPT, max_new_tokens=9, sampling=GREEDY, count=len(ends)
        )
    ] + [[step]]


def test_a_sample_ends_at_the_end_of_text_and_the_stream_with_the_last_one(
    folders, monkeypatch
) -> None:
    trained = load_model(folders["llama"])
    first, second, steps = with_end_of_text_at(trained, monkeypatch, [[3], [6]])
    one = trained.tokenizer.decode([5])
    assert (trained.tokenizer.decode(first), trained.tokenizer.decode(second)) == (one * 2, one * 5)
    assert steps == [6]


def test_a_sample_that_ended_stays_ended(folders, monkeypatch) -> None:
    trained = load_model(folders["llama"])
    first, _, steps = with_end_of_text_at(trained, monkeypatch, [[2], [9]])
    assert trained.tokenizer.decode(first) == trained.tokenizer.decode([5])
    assert steps == [9]


@pytest.mark.parametrize("extra", [0, 1, 50])
def test_prompts_that_leave_no_room_are_refused(trained: TrainedModel, extra: int) -> None:
    with pytest.raises(BadQuestionError, match=f"the model's context is {CONTEXT}") as caught:
        token_stream(trained, [5] * (CONTEXT + extra), max_new_tokens=1, sampling=GREEDY)
    assert caught.value.hint
    list(token_stream(trained, [5] * (CONTEXT - 1), max_new_tokens=1, sampling=GREEDY))


@pytest.mark.parametrize(
    ("field", "prompt", "asked"),
    [
        ("prompt", [], {"max_new_tokens": 1}),
        ("max_new_tokens", [5], {"max_new_tokens": 0}),
        ("num_samples", [5], {"max_new_tokens": 1, "num_samples": 0}),
    ],
)
def test_nothing_asked_for_is_refused_at_once(folders, field, prompt, asked) -> None:
    with pytest.raises(BadQuestionError, match=field):
        token_stream(load_model(folders["llama"]), prompt, sampling=GREEDY, **asked)


def test_an_empty_prompt_begins_a_document(folders) -> None:
    trained = load_model(folders["llama"])
    assert trained.encode("") == [trained.tokenizer.end_of_text_id]
    bytes_only = TrainedModel(trained.model, byte_tokenizer(), trained.device)
    assert bytes_only.encode("") == [ord("\n")]


def test_rows_of_the_vocabulary_that_no_token_has_are_never_chosen(folders) -> None:
    trained = load_model(folders["llama"])
    bytes_only = TrainedModel(trained.model, byte_tokenizer(), trained.device)
    with torch.no_grad():
        trained.model.head[256:] = trained.model.head[:1] * 50  # the likeliest by far, or the least
        trained.model.head[280:] *= -1
    for sampling in (GREEDY, Sampling(temperature=100.0, top_k=None)):
        assert max(ids_of(bytes_only, 20, sampling)[0]) < 256


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(tiny_plan(tmp_path / "text.txt"), ())
    with pytest.raises(FailedError, match="has no checkpoint yet") as caught:
        load_model(folder)
    assert "snugpt train" in (caught.value.hint or "")


def test_another_tokenizer_in_the_folder_is_refused(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=1)
    folder = run_tiny(plan, tmp_path / "run").folder
    byte_tokenizer().save(folder.tokenizer_file)
    with pytest.raises(FailedError, match=r"tokenizer\.json"):
        load_model(folder)


def test_weights_in_bf16_generate_on_the_cpu(folders: dict[str, RunFolder]) -> None:
    for folder in folders.values():
        trained = load_model(folder, "bf16")
        assert {weight.dtype for weight in trained.model.parameters()} == {torch.bfloat16}
        assert len(ids_of(trained, 12, Sampling(), samples=2)[1]) == 12
        assert sample_texts(trained, PROMPT, max_new_tokens=5, sampling=GREEDY, count=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", 1e9),
        ("top_k", 0), ("top_k", -3), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")),
        ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_ways_of_sampling_that_can_not_be_are_refused(field: str, value: float) -> None:
    with pytest.raises(BadQuestionError, match=field) as caught:
        Sampling(**{field: value})
    assert caught.value.hint


@st.composite
def random_logits(draw) -> torch.Tensor:
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(2, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    masked = draw(st.integers(0, vocab - 1))
    logits[:, torch.randperm(vocab, generator=generator)[:masked]] = -torch.inf
    return logits


samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(1e-300, 100.0)),
    top_k=st.one_of(st.none(), st.integers(1, 70)),
    top_p=st.one_of(st.none(), st.floats(1e-6, 1.0)),
    seed=st.integers(0, 1000),
)


@careful
@given(random_logits(), samplings)
def test_a_token_that_is_masked_is_never_chosen(logits: torch.Tensor, sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(5):
        tokens = choose(logits.clone(), sampling, generator)
        assert tokens.shape == (len(logits), 1)
        assert torch.isfinite(logits.gather(1, tokens)).all()


@careful
@given(random_logits(), st.integers(1, 70), st.integers(0, 1000))
def test_a_token_is_chosen_among_the_k_likeliest(logits, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = choose(logits.clone(), Sampling(temperature=5.0, top_k=top_k), generator)
    likelier = (logits > logits.gather(1, tokens)).sum(1)
    assert (likelier < top_k).all()


@careful
@given(random_logits(), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(logits, top_p: float) -> None:
    probabilities = logits.double().softmax(-1)
    left = logits.clone()
    cut_tail(left, top_p)
    for row, kept in zip(probabilities, torch.isfinite(left), strict=True):
        assert row[kept].sum() >= top_p - 1e-5
        assert row[kept].sum() - row[kept].min() < top_p + 1e-5
        assert row[kept].min() >= row[~kept].max() - 1e-12 if (~kept).any() else True
    assert torch.equal(left[torch.isfinite(left)], logits[torch.isfinite(left)])


@careful
@given(random_logits(), st.integers(0, 1000))
def test_no_temperature_takes_the_likeliest(logits: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for sampling in (GREEDY, Sampling(temperature=1e-40), Sampling(temperature=3.0, top_k=1)):
        tokens = choose(logits.clone(), sampling, generator)
        assert torch.equal(logits.gather(1, tokens), logits.amax(-1, keepdim=True))


def test_the_frequencies_are_those_of_the_softmax() -> None:
    logits, temperature = torch.tensor([0.0, 1.0, 2.0, -1.0]), 1.7
    many = logits.expand(40_000, -1).contiguous()
    sampling = Sampling(temperature=temperature, top_k=None)
    tokens = choose(many, sampling, torch.Generator().manual_seed(0))
    found = torch.bincount(tokens[:, 0], minlength=4) / len(tokens)
    torch.testing.assert_close(found, (logits / temperature).softmax(0), atol=0.01, rtol=0)
