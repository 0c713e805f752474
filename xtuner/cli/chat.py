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
from xtuner.data.tokenizer_template import FROM_TOKENIZER, TOKENIZER, resolve_template
from xtuner.families import FAMILIES
from xtuner.families.chat import PLAIN, ChatFormat, Message

HELP = "empty lines are ignored; /reset starts a new conversation, /exit or Ctrl-D ends"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, or checkpoint")
    parser.add_argument("--prompt", type=as_text, help="answer this text and exit (default: a conversation)")
    parser.add_argument(
        "--template",
        help="chat template, e.g. internlm2_chat, or plain to continue texts (default: the one in the tokenizer's "
        "folder, else that of the model's family)",
    )
    parser.add_argument(
        "--tokenizer", help="folder or hub id of the tokenizer, if the model has none (a checkpoint has none)"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="an adapter on MODEL: a checkpoint of a run with LoRA, or a folder of PEFT"
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
    from xtuner.model.generate import Session, require_special_tokens, sample
    from xtuner.train.evaluate import open_model

    log.setup("WARNING")
    template: ChatFormat | None = FROM_TOKENIZER
    if args.template not in (None, TOKENIZER):
        template = find_template(args.template, others=(TOKENIZER,))
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
    model, _ = open_model(args.model, [], select_device(), args.adapter)
    require_special_tokens(model.config, f"{args.model}/config.json: ")
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    family = FAMILIES.find(model.config.family, args.model, "give its chat template with --template")
    template = resolve_template(template, tokenizer, family.chat_for(tokenizer.special)) or PLAIN
    if missing := [mark for mark in template.turn_marks if mark not in tokenizer.special]:
        logger.warning(
            f"the tokenizer has no special token {', '.join(missing)}, which the template {template.name} uses. "
            "Encoded as ordinary text they are not what a chat model has learned: answers may be empty or meaningless. "
            "Give the chat model's tokenizer with --tokenizer, or continue a text with --template plain"
        )
    stop_words = [*template.stop_words, *args.stop_words]
    stop_ids = [*model.config.stop_ids, *single_tokens(tokenizer, stop_words)]
    begin = [] if template.writes_begin else begin_tokens(tokenizer, model.config.bos_token_id)
    generator = torch.Generator().manual_seed(args.seed)

    opening = [Message("system", args.system)] if args.system else []
    session, messages, said = Session(model), [*opening], ""
    for text in [args.prompt] if args.prompt is not None else read_inputs():
        if text is None or not template.has_turns:  # /reset; a continued text is not part of a conversation
            messages, said = [*opening], ""
        if text is None:
            continue
        messages.append(Message("user", text))
        prompt = template.prompt_of(messages)
        if said and prompt.startswith(said):  # only what is new
            logits = session.feed(tokenizer.encode(prompt[len(said) :]))
        else:  # a template may write earlier answers differently, such as without thoughts
            session = Session(model)
            logits = session.feed(begin + tokenizer.encode(prompt) or [model.config.eos_token_id])
        tokens = sample(session, logits, args.max_new_tokens, stop_ids, args.temperature, args.top_p, generator)
        answer, new = "", list[int]()
        for piece in decode_stream(_collect(tokens, new), tokenizer, stop_words):
            answer += piece
            print(piece, end="", flush=True)
        print()
        if not answer:
            logger.warning("the answer is empty: the model stopped immediately")
        messages.append(Message("assistant", answer))
        said = prompt + tokenizer.decode(new)
    return 0


def _collect(tokens: Iterator[int], into: list[int]) -> Iterator[int]:
    for token in tokens:
        into.append(token)
        yield token


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
