"""xtuner eval loss MODEL DATA: mean loss and perplexity on tokenized data."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder, checkpoint, or config (its starting weights)")
    parser.add_argument("data_folder", help="folder of .bin and .bin.meta files")
    parser.add_argument("--max-length", type=int, default=32768, help="longer documents are cut into such parts")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE")


def run(args: argparse.Namespace) -> int:
    from xtuner.core import log
    from xtuner.engine.launch import setup
    from xtuner.train.evaluate import evaluate, open_model

    log.setup()
    device = setup("none", None)
    model = open_model(args.model, args.cfg_options, device)
    results = evaluate(model, args.data_folder, args.max_length)
    width = max(len(r.name) for r in results)
    print(f"{'':<{width}}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}")
    for r in results:
        print(f"{r.name:<{width}}  {r.tokens:>12,}  {r.loss:>8.4f}  {r.perplexity:>10.2f}")
    return 0
