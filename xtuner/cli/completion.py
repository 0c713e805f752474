"""xtuner completion SHELL: print a script that completes verbs, their options and the names of shipped configs.

    source <(xtuner completion bash)           # in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit
    xtuner completion fish | source            # in ~/.config/fish/config.fish

The script contains all words, read from the parsers of the verbs, so that the Tab key starts no Python, as it
would with argcomplete and typer.
"""

import argparse
from dataclasses import dataclass, field

from xtuner.tools import job_scripts

SHELLS = ("bash", "zsh", "fish")


@dataclass
class Words:
    """What may follow a verb. Otherwise file names are completed."""

    options: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)  # option → its choices
    first: list[str] = field(default_factory=list)  # choices of the first argument
    files: bool = False  # the first argument may also be a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](verbs()), end="")
    return 0


def verbs() -> dict[str, Words]:
    """Every verb of `xtuner`, with the options and choices of its parser."""
    import importlib

    from xtuner.cli.main import VERBS
    from xtuner.config.load import shipped_names

    found = {}
    for name, (module, _) in VERBS.items():
        parser = argparse.ArgumentParser(add_help=True)
        importlib.import_module(module).add_arguments(parser)
        found[name] = words = Words()
        positionals = [a for a in parser._actions if not a.option_strings]
        for action in parser._actions:
            if action.option_strings and action.help != argparse.SUPPRESS:
                words.options += action.option_strings
                if action.choices:
                    words.values |= {o: list(map(str, action.choices)) for o in action.option_strings}
        if positionals and positionals[0].dest in ("config", "config_name"):
            words.first, words.files = shipped_names(), positionals[0].dest == "config"
        elif positionals and positionals[0].choices:
            words.first = list(positionals[0].choices)
    return found


def _groups(table: dict[str, Words]) -> dict[str, list[str]]:
    """First word of two-word verbs → the second words."""
    groups: dict[str, list[str]] = {}
    for name in table:
        head, _, rest = name.partition(" ")
        if rest:
            groups.setdefault(head, []).append(rest)
    return groups


def _values(table: dict[str, Words], choose: str) -> str:
    """A shell case for each option with choices; `choose` is the command that offers them."""
    found = ((name, *pair) for name, words in table.items() for pair in words.values.items())
    return "\n".join(
        f'        "{name} {o}") {choose.format(" ".join(choices))}; return ;;' for name, o, choices in found
    )


def bash(table: dict[str, Words]) -> str:
    groups = (
        f'        {head}) words="{" ".join(rest)}"; verb="$verb ${{COMP_WORDS[2]}}"; at=3 ;;'
        for head, rest in _groups(table).items()
    )
    verbs = (
        f'        "{name}") options="{" ".join(words.options)}"; first="{" ".join(words.first)}"'
        f"{'; files=1' if words.files else ''} ;;"
        for name, words in table.items()
    )
    values = _values(table, 'COMPREPLY=( $(compgen -W "{}" -- "$current") )')
    return _filled("bash", table, groups="\n".join(groups), values=values, verbs="\n".join(verbs))


def zsh(table: dict[str, Words]) -> str:
    groups = (
        f"        {head}) at=4\n"
        f"            if (( CURRENT == 3 )); then compadd -- {' '.join(rest)}; return; fi\n"
        f'            verb="$verb $words[3]" ;;'
        for head, rest in _groups(table).items()
    )
    verbs = (
        f'        "{name}") if [[ "$current" == -* ]]; then compadd -- {" ".join(words.options)}; return; fi\n'
        f"            first=({' '.join(words.first)}) ;;"
        for name, words in table.items()
    )
    with_files = "|".join(name.replace(" ", "\\ ") for name, words in table.items() if words.files)
    values = _values(table, "compadd -- {}")
    return _filled("zsh", table, groups="\n".join(groups), values=values, verbs="\n".join(verbs), with_files=with_files)


def fish(table: dict[str, Words]) -> str:
    at = "complete -c xtuner -n '__xtuner_at"
    lines = [f"{at}_first {head}' -f -a '{' '.join(rest)}'" for head, rest in _groups(table).items()]
    for name, words in table.items():
        if words.first:
            files = "" if words.files else " -f"
            lines.append(f"{at}_first {name}'{files} -a '{' '.join(words.first)}'")
        for option in words.options:
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            choices = f" -x -a '{' '.join(words.values[option])}'" if option in words.values else ""
            lines.append(f"{at} {name}' {flag}{choices}")
    return _filled("fish", table, verbs="\n".join(lines))


def _filled(shell: str, table: dict[str, Words], **parts: str) -> str:
    """`templates/completion.SHELL` with the first words of all verbs and other parts filled in."""
    heads = " ".join(dict.fromkeys(name.split()[0] for name in table))
    return job_scripts.fill_template(f"completion.{shell}", heads=heads, **parts)
