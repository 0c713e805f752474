"""xtuner chat MODEL --prompt TEXT: let a model continue or answer a text."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="what to answer, or to continue with --template plain")
    parser.add_argument("--template", default="internlm2_chat", help="internlm2_chat (default) or plain")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely token each time")
    parser.add_argument("--top-p", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    import torch

    from xtuner.core.errors import ConfigError, did_you_mean
    from xtuner.data.chat_template import PROMPT_TEMPLATE
    from xtuner.data.tokenizer import load_tokenizer
    from xtuner.engine.launch import setup
    from xtuner.model.generate import generate
    from xtuner.train.evaluate import open_model

    templates = vars(PROMPT_TEMPLATE)
    if args.template not in templates:
        hint = did_you_mean(args.template, list(templates))
        raise ConfigError(
            f"no template {args.template!r}.{hint}", where="--template", do=f"one of {', '.join(templates)}"
        )
    template = templates[args.template]
    model = open_model(args.model, [], setup("none", None))
    tokenizer = load_tokenizer(args.model)
    stops = [model.config.eos_token_id]
    for word in template.stop_words:
        ids = tokenizer.encode(word)
        stops += ids if len(ids) == 1 else []
    prompt = [model.config.bos_token_id, *tokenizer.encode(template.prompt(args.prompt, args.system))]
    generator = torch.Generator().manual_seed(args.seed)
    tokens: list[int] = []
    shown = ""
    for token in generate(model, prompt, args.max_new_tokens, stops, args.temperature, args.top_p, generator):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # half a character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0
