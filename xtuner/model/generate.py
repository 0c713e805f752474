"""Generation of one continuation with a key/value cache."""

from collections.abc import Callable, Iterator, Sequence

import torch

from xtuner.model.decoder import CausalLM, LayerCache


class Session:
    """One document that grows. `feed` adds tokens and gives the logits after the last; earlier keys stay."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.caches = [LayerCache() for _ in model.model.layers]
        self.length = 0

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after the last of `tokens`, fp32 [V]."""
        device = self.model.output.weight.device
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        position_ids = torch.arange(self.length, self.length + len(ids), device=device)
        self.length += len(ids)
        # dynamic NTK goes by the document's length so far, which only this sum knows
        cos_sin_length = torch.tensor([0, self.length], dtype=torch.int32, device=device)
        return self.model(ids, cos_sin_length, None, position_ids, self.length, self.caches)[0].float()


def generate(
    model: CausalLM,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    agree: Callable[[int], int] = int,
) -> Iterator[int]:
    """Yield new token ids, one at a time; ends after `max_new_tokens` or before a stop id.

    Args:
        prompt: at least one token id.
        temperature: 0 for the most likely token each time.
        top_p: sample among the fewest tokens whose probability reaches this.
        agree: where ranks compute together, what makes this rank's choice the one of all: logits may differ in their
            last bits, and a rank that stops alone leaves the others waiting.
    """
    session = Session(model)
    yield from sample(session, session.feed(prompt), max_new_tokens, stop_ids, temperature, top_p, generator, agree)


def sample(
    session: Session,
    logits: torch.Tensor,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    agree: Callable[[int], int] = int,
) -> Iterator[int]:
    """Continue from `logits`, those after the session's last token; see `generate`. Tokens that are yielded are fed."""
    for _ in range(max_new_tokens):
        token = agree(pick(logits, temperature, top_p, generator))
        if token in stop_ids:
            return
        logits = session.feed([token])
        yield token


def pick(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probability, ids = (logits_V / temperature).softmax(-1).cpu().sort(descending=True)
    keep = probability.cumsum(-1) - probability < top_p
    return int(ids[torch.multinomial(probability * keep, 1, generator=generator)])
