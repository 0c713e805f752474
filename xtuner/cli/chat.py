"""xtuner chat MODEL: talk with a model on the terminal, or let it continue a text."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from xtuner.core import log
from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.core.log import logger
from xtuner.core.system.stdio import as_text
from xtuner.data.chat_template import find_template
from xtuner.data.tokenizer import Tokenizer, load_tokenizer, single_tokens
from xtuner.families import FAMILIES
from xtuner.families.chat import PLAIN

HELP = "an empty line is ignored; /reset begins a new conversation, /exit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, checkpoint")
    parser.add_argument("--prompt", type=as_text, help="answer this one text and end; without it: a conversation")
    parser.add_argument(
        "--template", help="default: that of the model's family, such as internlm2_chat; plain continues texts"
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub id of the tokenizer, where the model has none: a checkpoint has not"
    )
    parser.add_argument("--system", type=as_text, default="", help="system prompt")
    parser.add_argument("--stop-words", type=as_text, nargs="+", default=[], help="further words to stop at")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="at most so many in a reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely token each time")
    parser.add_argument("--top-p", type=float, default=0.8, help="share of the probability that tokens are drawn from")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def run(args: argparse.Namespace) -> int:
    import torch

    from xtuner.dist.process_group import select_device
    from xtuner.model.generate import Session, sample
    from xtuner.model.source import require_marks
    from xtuner.train.evaluate import open_model

    log.setup("WARNING")
    template = find_template(args.template) if args.template else None
    for option, ok, range_ in (
        ("temperature", 0 <= args.temperature < float("inf"), "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("max-new-tokens", args.max_new_tokens >= 1, "1 or more"),
    ):
        if not ok:
            value = getattr(args, option.replace("-", "_"))
            raise ConfigError(f"--{option} {value} cannot be", where=f"--{option}", do=f"give {range_}")
    if not args.tokenizer:
        refuse_checkpoint(args.model)
    model, _ = open_model(args.model, [], select_device())
    require_marks(model.config, f"{args.model}/config.json: ")
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if template is None:
        family = FAMILIES.find(model.config.family, args.model, "say with --template how it speaks")
        template = family.chat or PLAIN
    if missing := [mark for mark in template.turn_marks if mark not in tokenizer.special]:
        logger.warning(
            f"the tokenizer has no special token {', '.join(missing)}, which the template {template.name} writes. "
            "Spelt in ordinary pieces, they are not what a chat model learned: the answer may be empty or nonsense. "
            "Give the chat model's tokenizer with --tokenizer, or continue a text with --template plain"
        )
    stop_words = [*template.stop_words, *args.stop_words]
    stop_ids = [model.config.eos_token_id, *single_tokens(tokenizer, stop_words)]
    generator = torch.Generator().manual_seed(args.seed)

    session = Session(model)
    fresh = True
    for text in [args.prompt] if args.prompt is not None else asked():
        if text is None:  # /reset
            session, fresh = Session(model), True
            continue
        prompt = template.prompt(text, args.system if fresh else "")
        ids = tokenizer.encode(prompt)
        logits = session.feed([model.config.bos_token_id, *ids] if fresh else ids)
        tokens = sample(session, logits, args.max_new_tokens, stop_ids, args.temperature, args.top_p, generator)
        pieces = 0
        for piece in spoken(tokens, tokenizer, stop_words):
            pieces += bool(piece)
            print(piece, end="", flush=True)
        print()
        if not pieces:
            logger.warning("an empty answer: the model stopped at once")
        if template.assistant_begin:
            session.feed(tokenizer.encode(template.assistant_end))
            fresh = False
        else:  # a continued text is no turn of a conversation
            session, fresh = Session(model), True
    return 0


def refuse_checkpoint(model: str) -> None:
    """A checkpoint holds no tokenizer, and no file may be added to it. Raises: ConfigError that names the run's."""
    facts = Path(model).expanduser() / "trainer.json"
    if not facts.is_file():
        return
    trainer = read_json(facts)
    config = trainer.get("config") if isinstance(trainer, dict) else None
    named = config.get("tokenizer") if isinstance(config, dict) else None
    name = next((v for k, v in named.items() if k.endswith("name_or_path")), None) if isinstance(named, dict) else None
    raise ConfigError(
        "a checkpoint holds no tokenizer",
        where=model,
        do=f"xtuner chat {model} --tokenizer {name or 'FOLDER'}"
        + (", the one that the run's config names" if name else ", the one that the data were tokenized with"),
    )


def asked() -> Iterator[str | None]:
    """What the user types, line by line; None for a new conversation."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            yield None
        elif line.strip():
            yield line


def spoken(tokens: Iterator[int], tokenizer: Tokenizer, stop_words: list[str]) -> Iterator[str]:
    """Text as it grows, whole characters only; ends before a stop word, of which no beginning is shown early."""
    held: list[int] = []
    shown = 0
    longest = max(map(len, stop_words), default=1)
    text = ""
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        cut = min((i for w in stop_words if (i := text.find(w)) >= 0), default=-1)
        if cut >= 0:
            yield text[shown:cut]
            return
        safe = len(text) - longest + 1 if stop_words else len(text)
        if not text.endswith("\ufffd") and safe > shown:
            yield text[shown:safe]
            shown = safe
    yield text[shown:]
