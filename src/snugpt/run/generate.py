"""Generate text with a trained model: one prefill of the prompt, then token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snugpt.data.tokenizer import Tokenizer
from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.model.build import build_for_generation
from snugpt.model.gpt import GPT
from snugpt.model.kv_cache import KVCache
from snugpt.model.sampling import Sampling, choose
from snugpt.run.checkpoint import load_newest, restore_weights
from snugpt.run.run_folder import RunFolder
from snugpt.spec.recipe import ComputeDtype
from snugpt.spec.runtime import FIRST_BF16, Runtime


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model ready to generate, with its tokenizer."""

    model: GPT
    tokenizer: Tokenizer
    device: torch.device

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a prompt, after the separator that begins every document."""
        start = self.tokenizer.end_of_text_id
        ids = self.tokenizer.encode(prompt)
        if start is not None:
            return [start, *ids]
        return ids or self.tokenizer.encode("\n")


def load_model(folder: RunFolder, weight_dtype: ComputeDtype | None = None) -> TrainedModel:
    """Load the newest verified checkpoint of a run, on CUDA if there is one.

    Raises:
        FailedError: there is no checkpoint yet, none is intact, or the tokenizer is another.
    """
    plan = folder.plan()
    found = load_newest(folder.checkpoints, weights_only=True)
    if found is None:
        raise FailedError(
            f"{folder.path} has no checkpoint yet",
            hint=f"snugpt train {folder.plan_file} --name {folder.path.name}",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = generation_runtime(device, weight_dtype)
    dtype = weight_dtype or generation_dtype(runtime)
    model = build_for_generation(plan.shape, runtime, dtype, device)
    restore_weights(found, model)
    tokenizer = Tokenizer.load(
        folder.tokenizer_file, expected_sha256=found.state.get("tokenizer_sha256")
    )
    return TrainedModel(model, tokenizer, device)


def generation_dtype(runtime: Runtime) -> ComputeDtype:
    """The dtype of weights that were not asked for in another: the planner's choice."""
    if runtime.device == "cpu":
        return "fp32"
    return "bf16" if runtime.attention == "flash" else "fp16"


def generation_runtime(device: torch.device, weight_dtype: ComputeDtype | None) -> Runtime:
    """The kernels of a device: flash attention where it has bf16 and is not told otherwise."""
    if device.type == "cpu":
        return Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())
    capability = torch.cuda.get_device_capability(device)
    flash = capability >= FIRST_BF16 and weight_dtype in (None, "bf16")
    return Runtime(
        device="cuda", attention="flash" if flash else "efficient", capability=capability
    )


def token_stream(
    trained: TrainedModel,
    prompt: list[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int = 1,
) -> Iterator[Tensor]:
    """Yield (num_samples, 1) token ids, one step at a time, until all have ended or the end.

    Raises:
        BadQuestionError: the prompt is empty or leaves no room in the model's context, or a
            number is below 1.
    """
    model = trained.model
    context_len = model.shape.context_len
    if not prompt:
        raise bad_value("prompt", prompt, "at least one token")
    if len(prompt) >= context_len:
        raise BadQuestionError(
            f"prompt has {len(prompt)} tokens, the model's context is {context_len}",
            hint="snugpt generate NAME --prompt 'a shorter text'",
        )
    if max_new_tokens < 1:
        raise bad_value("max_new_tokens", max_new_tokens, "at least 1")
    if num_samples < 1:
        raise bad_value("num_samples", num_samples, "at least 1")
    steps = min(max_new_tokens, context_len - len(prompt))
    generator = torch.Generator(trained.device).manual_seed(sampling.seed)
    cache = KVCache(model.shape, num_samples, len(prompt) + steps, model.dtype, trained.device)
    tokens = torch.tensor([prompt] * num_samples, device=trained.device)
    return _steps(trained, tokens, cache, steps, sampling, generator)


@torch.no_grad()
def _steps(
    trained: TrainedModel,
    tokens: Tensor,
    cache: KVCache,
    steps: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    end = trained.tokenizer.end_of_text_id
    ended = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=trained.device)
    for _ in range(steps):
        logits = trained.model.next_logits(tokens, cache)
        logits[:, trained.tokenizer.vocab_size :] = -torch.inf  # rows nobody was trained on
        tokens = choose(logits, sampling, generator)
        del logits
        if end is not None:
            ended |= tokens == end
            if bool(ended.all()):
                return
        yield tokens


def text_stream(
    trained: TrainedModel, prompt: str, *, max_new_tokens: int, sampling: Sampling
) -> Iterator[str]:
    """Yield the continuation of a prompt as it comes, in whole characters."""
    decoder = trained.tokenizer.stream_decoder()
    for tokens in token_stream(
        trained, trained.encode(prompt), max_new_tokens=max_new_tokens, sampling=sampling
    ):
        text = decoder.feed(int(tokens[0, 0]))
        if text:
            yield text
    rest = decoder.finish()
    if rest:
        yield rest


def sample_texts(
    trained: TrainedModel, prompt: str, *, max_new_tokens: int, sampling: Sampling, count: int
) -> list[str]:
    """Return `count` continuations of one prompt, drawn together as one batch."""
    ids: list[list[int]] = [[] for _ in range(count)]
    ended = [False] * count
    end = trained.tokenizer.end_of_text_id
    for tokens in token_stream(
        trained, trained.encode(prompt), max_new_tokens=max_new_tokens, sampling=sampling,
        num_samples=count,
    ):  # fmt: skip
        for row, token in enumerate(tokens[:, 0].tolist()):
            ended[row] = ended[row] or token == end
            if not ended[row]:
                ids[row].append(token)
    return [trained.tokenizer.decode(row) for row in ids]
