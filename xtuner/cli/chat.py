"""xtuner chat MODEL: chat with a model on the terminal, or let it continue a text."""

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
from xtuner.data.tokenizer import Tokenizer, begin_tokens, load_tokenizer, single_tokens
from xtuner.families import FAMILIES
from xtuner.families.chat import PLAIN

HELP = "empty lines are ignored; /reset starts a new conversation, /exit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, or checkpoint")
    parser.add_argument("--prompt", type=as_text, help="answer this text and exit (default: a conversation)")
    parser.add_argument(
        "--template",
        help="chat template, e.g. internlm2_chat, or plain to continue texts (default: that of the model's family)",
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub id of the tokenizer, if the model has none (a checkpoint has none)"
    )
    parser.add_argument("--system", type=as_text, default="", help="system prompt")
    parser.add_argument("--stop-words", type=as_text, nargs="+", default=[], help="additional stop words")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="maximum tokens of a reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always take the most likely token")
    parser.add_argument(
        "--top-p", type=float, default=0.8, help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def run(args: argparse.Namespace) -> int:
    import torch

    from xtuner.dist.process_group import select_device
    from xtuner.model.generate import Session, sample
    from xtuner.model.source import require_special_tokens
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
            raise ConfigError(f"--{option} {value} is not valid", where=f"--{option}", do=f"give {range_}")
    if not args.tokenizer:
        reject_checkpoint(args.model)
    model, _ = open_model(args.model, [], select_device())
    require_special_tokens(model.config, f"{args.model}/config.json: ")
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if template is None:
        family = FAMILIES.find(model.config.family, args.model, "give its chat template with --template")
        template = family.chat_for(tokenizer.special) or PLAIN
    if missing := [mark for mark in template.turn_marks if mark not in tokenizer.special]:
        logger.warning(
            f"the tokenizer has no special token {', '.join(missing)}, which the template {template.name} uses. "
            "Encoded as ordinary text they are not what a chat model has learned: answers may be empty or meaningless. "
            "Give the chat model's tokenizer with --tokenizer, or continue a text with --template plain"
        )
    stop_words = [*template.stop_words, *args.stop_words]
    stop_ids = [*model.config.stop_ids, *single_tokens(tokenizer, stop_words)]
    begin = begin_tokens(tokenizer, model.config.bos_token_id)
    generator = torch.Generator().manual_seed(args.seed)

    session = Session(model)
    fresh = True
    for text in [args.prompt] if args.prompt is not None else read_inputs():
        if text is None:  # /reset
            session, fresh = Session(model), True
            continue
        prompt = template.prompt(text, args.system if fresh else "")
        ids = tokenizer.encode(prompt)
        logits = session.feed((begin + ids or [model.config.eos_token_id]) if fresh else ids)
        tokens = sample(session, logits, args.max_new_tokens, stop_ids, args.temperature, args.top_p, generator)
        pieces = 0
        for piece in decode_stream(tokens, tokenizer, stop_words):
            pieces += bool(piece)
            print(piece, end="", flush=True)
        print()
        if not pieces:
            logger.warning("the answer is empty: the model stopped immediately")
        if template.assistant_begin:
            session.feed(tokenizer.encode(template.assistant_end))
            fresh = False
        else:  # a continued text is not part of a conversation
            session, fresh = Session(model), True
    return 0


def reject_checkpoint(model: str) -> None:
    """Raises: ConfigError with the tokenizer of the run, if `model` is a checkpoint: it has none."""
    facts = Path(model).expanduser() / "trainer.json"
    if not facts.is_file():
        return
    trainer = read_json(facts)
    config = trainer.get("config") if isinstance(trainer, dict) else None
    named = config.get("tokenizer") if isinstance(config, dict) else None
    name = next((v for k, v in named.items() if k.endswith("name_or_path")), None) if isinstance(named, dict) else None
    raise ConfigError(
        "a checkpoint has no tokenizer",
        where=model,
        do=f"xtuner chat {model} --tokenizer {name or 'FOLDER'}"
        + (", the one in the run's config" if name else ", the one that the data were tokenized with"),
    )


def read_inputs() -> Iterator[str | None]:
    """The lines that the user types; None for a new conversation."""
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


def decode_stream(tokens: Iterator[int], tokenizer: Tokenizer, stop_words: list[str]) -> Iterator[str]:
    """Decode tokens to pieces of text: complete characters only, up to a stop word, and never a part of one."""
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
