"""`python -m xtuner` is `xtuner`; `torchrun -m xtuner train …` needs it."""

from xtuner.cli.main import console

if __name__ == "__main__":
    console()
