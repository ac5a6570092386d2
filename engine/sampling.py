"""Generation with a KV cache: prompts laid end to end, then one token a row and pass until every row has ended."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CACHE_BYTES = 2 << 30  # of the keys and values of rows that are answered side by side


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token; `top_p` draws from the fewest tokens that hold that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def rows_at_once(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, most: int) -> int:
    """How many of the prompts are answered side by side: as many as have room in CACHE_BYTES, 1 to `most`."""
    config = model.config
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.arithmetic.itemsize
    return max(1, min(most, CACHE_BYTES // (of_token * _capacity(model, prompts, max_new_tokens))))


def _capacity(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Tokens that a row can reach."""
    return min(max(map(len, prompts), default=0) + max_new_tokens, model.config.max_position_embeddings)


@torch.no_grad()
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], stops: Collection[int], max_new_tokens: int, sampling: Sampling = Sampling(),
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """The answer of each prompt, as ids without the token it ended with.

    Args:
        model: in evaluation mode; prompt and answer together must fit its positions, so long answers stop there.
        stops: tokens that end an answer.
        max_new_tokens: at most this many for each prompt.
        on_token: called with (row, id) for each token as it comes.
    """
    device = model.lm_head.weight.device
    limit = model.config.max_position_embeddings
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.cache(len(prompts), _capacity(model, prompts, max_new_tokens))
    positions = cache.begin([len(prompt) for prompt in prompts])
    ids = torch.tensor([number for prompt in prompts for number in prompt], device=device)
    last = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0) - 1
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    hidden = model(ids, positions, cache)[last]
    for count in range(max_new_tokens):
        chosen = _choose(model.lm_head(hidden), sampling, generator)
        going = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token in stops:
                continue
            answers[row].append(token)
            if on_token:
                on_token(row, token)
            if len(prompts[row]) + len(answers[row]) < limit:
                going.append(place)
        if not going or count == max_new_tokens - 1:
            break
        if len(going) < len(alive):
            kept = torch.tensor(going, device=device)
            cache.keep(kept)
            chosen, alive = chosen[kept], [alive[place] for place in going]
        hidden = model(chosen, cache.advance(), cache)
    return answers


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits (rows, V) -> (rows,)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits.float() / sampling.temperature, -1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[:, 1:][before[:, 1:] >= sampling.top_p] = 0  # the likeliest token always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
