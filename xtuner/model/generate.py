"""Generation of one continuation with a key/value cache."""

from collections.abc import Callable, Iterator, Sequence

import torch

from xtuner.core.errors import ConfigError
from xtuner.model.decoder import CausalLM, DecoderConfig, LayerCache


class Session:
    """A growing document. `feed` appends tokens and returns the logits after the last; keys and values are cached."""

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
        # dynamic NTK depends on the document's length so far
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
    """Yield new token ids, one at a time, up to `max_new_tokens` or a stop id (not yielded).

    Args:
        prompt: at least one token id.
        temperature: 0 for the most likely token each time.
        top_p: sample from the smallest set of tokens whose total probability reaches this.
        agree: where ranks compute together, returns the choice of rank 0 on every rank: logits may differ in their last
            bits, and a rank that stops early would leave the others waiting.
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
    """Continue from `logits` after the session's last token; see `generate`. Yielded tokens have been fed."""
    for _ in range(max_new_tokens):
        token = agree(pick_token(logits, temperature, top_p, generator))
        if token in stop_ids:
            return
        logits = session.feed([token])
        yield token


def pick_token(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probability, ids = (logits_V / temperature).softmax(-1).cpu().sort(descending=True)
    keep = probability.cumsum(-1) - probability < top_p
    return int(ids[torch.multinomial(probability * keep, 1, generator=generator)])


def require_special_tokens(config: DecoderConfig, where: str) -> None:
    """Raise ConfigError unless the ids that begin and end a text are in the vocabulary: generation needs them.

    A model may have no begin token.

    Args:
        where: prefix of the key in the message.
    """
    for name in ("bos_token_id", "eos_token_id"):
        number = getattr(config, name)
        if number is None and name == "bos_token_id":
            continue  # texts begin without a token
        if number is None or not 0 <= number < config.vocab_size:
            what = f"{name} = {number} is not an id of the vocabulary, 0 … {config.vocab_size - 1}"
            raise ConfigError(
                what,
                where=f"{where}{name}",
                why="generated texts begin or end with it",
                do="set it to the id of the tokenizer's token, as the model's own config.json does",
            )
