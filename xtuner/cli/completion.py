"""xtuner completion SHELL: a script that completes verbs, their options and the names of shipped configs.

    source <(xtuner completion bash)           # in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit
    xtuner completion fish | source            # in ~/.config/fish/config.fish

The script holds all words itself, so a key press starts no Python. What a verb takes is read from its own parser.
"""

import argparse
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")


@dataclass
class Words:
    """What may follow a verb. Where nothing is known, files are completed."""

    options: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)  # option → its choices
    first: list[str] = field(default_factory=list)  # for the word behind the verb
    files: bool = False  # it may be a file, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](verbs()), end="")
    return 0


def verbs() -> dict[str, Words]:
    """Every verb of `xtuner`, with what its parser takes."""
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


def _heads(table: dict[str, Words]) -> list[str]:
    """First words of all verbs."""
    return list(dict.fromkeys(name.split()[0] for name in table))


def _groups(table: dict[str, Words]) -> dict[str, list[str]]:
    """First words of verbs of two words → the second ones."""
    groups: dict[str, list[str]] = {}
    for name in table:
        head, _, rest = name.partition(" ")
        if rest:
            groups.setdefault(head, []).append(rest)
    return groups


def bash(table: dict[str, Words]) -> str:
    lines = [
        "# xtuner: words for bash. source <(xtuner completion bash)",
        "_xtuner() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local verb="${COMP_WORDS[1]}" at=2 words="" options="" first="" files=',
        f'    if (( COMP_CWORD == 1 )); then COMPREPLY=( $(compgen -W "{" ".join(_heads(table))} --help --version" '
        '-- "$current") ); return; fi',
        '    case "$verb" in',
    ]
    for head, rest in _groups(table).items():
        lines.append(f'        {head}) words="{" ".join(rest)}"; verb="$verb ${{COMP_WORDS[2]}}"; at=3 ;;')
    lines += [
        "    esac",
        '    if (( COMP_CWORD < at )); then COMPREPLY=( $(compgen -W "$words" -- "$current") ); return; fi',
        '    case "$verb $previous" in',
        *_bash_values(table),
        "    esac",
        '    case "$verb" in',
    ]
    for name, words in table.items():
        more = "; files=1" if words.files else ""
        lines.append(f'        "{name}") options="{" ".join(words.options)}"; first="{" ".join(words.first)}"{more} ;;')
    lines += [
        "    esac",
        '    if [[ "$current" == -* ]]; then COMPREPLY=( $(compgen -W "$options" -- "$current") ); return; fi',
        "    (( COMP_CWORD == at )) || return 0  # no words: files, by -o default",
        '    COMPREPLY=( $(compgen -W "$first" -- "$current") )',
        '    if [[ "$files" ]]; then',
        "        local IFS=$'\\n'",
        '        COMPREPLY+=( $(compgen -f -- "$current") )',
        "        compopt -o filenames 2> /dev/null",
        "    fi",
        "    return 0",
        "}",
        "complete -o default -F _xtuner xtuner",
    ]
    return "\n".join(lines) + "\n"


def _bash_values(table: dict[str, Words]) -> list[str]:
    return [
        f'        "{name} {option}") COMPREPLY=( $(compgen -W "{" ".join(choices)}" -- "$current") ); return ;;'
        for name, words in table.items()
        for option, choices in words.values.items()
    ]


def zsh(table: dict[str, Words]) -> str:
    with_files = "|".join(name.replace(" ", "\\ ") for name, words in table.items() if words.files)
    lines = [
        "#compdef xtuner",
        "# xtuner: words for zsh. source <(xtuner completion zsh), after compinit",
        "_xtuner() {",
        '    local verb="$words[2]" current="$words[CURRENT]" previous="$words[CURRENT-1]"',
        "    local -i at=3",
        "    local -a first",
        f"    if (( CURRENT == 2 )); then compadd -- {' '.join(_heads(table))} --help --version; return; fi",
        '    case "$verb" in',
    ]
    for head, rest in _groups(table).items():
        lines.append(f"        {head}) at=4")
        lines.append(f"            if (( CURRENT == 3 )); then compadd -- {' '.join(rest)}; return; fi")
        lines.append('            verb="$verb $words[3]" ;;')
    lines += ["    esac", '    case "$verb $previous" in']
    for name, words in table.items():
        for option, choices in words.values.items():
            lines.append(f'        "{name} {option}") compadd -- {" ".join(choices)}; return ;;')
    lines += ["    esac", '    case "$verb" in']
    for name, words in table.items():
        options = f'if [[ "$current" == -* ]]; then compadd -- {" ".join(words.options)}; return; fi'
        lines.append(f'        "{name}") {options}')
        lines.append(f"            first=({' '.join(words.first)}) ;;")
    lines += [
        "    esac",
        "    if (( CURRENT == at && $#first )); then",
        "        compadd -a first",
        f'        [[ "$verb" == ({with_files}) ]] || return 0',
        "    fi",
        "    _files",
        "}",
        "compdef _xtuner xtuner",
    ]
    return "\n".join(lines) + "\n"


def fish(table: dict[str, Words]) -> str:
    at = "__xtuner_at"
    lines = [
        "# xtuner: words for fish. xtuner completion fish | source",
        f"function {at}  # the words before the cursor begin with these",
        "    set -l given (commandline -opc)",
        '    string match -q -- "$argv *" "$given[2..] "',
        "end",
        f"function {at}_first  # and nothing but options follows them",
        "    set -l given (commandline -opc)",
        '    test "$given[2..]" = "$argv"',
        "end",
        f"complete -c xtuner -n '{at}_first' -f -a '{' '.join(_heads(table))}'",
    ]
    for head, rest in _groups(table).items():
        lines.append(f"complete -c xtuner -n '{at}_first {head}' -f -a '{' '.join(rest)}'")
    for name, words in table.items():
        if words.first:
            files = "" if words.files else " -f"
            lines.append(f"complete -c xtuner -n '{at}_first {name}'{files} -a '{' '.join(words.first)}'")
        for option in words.options:
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            choices = f" -x -a '{' '.join(words.values[option])}'" if option in words.values else ""
            lines.append(f"complete -c xtuner -n '{at} {name}' {flag}{choices}")
    return "\n".join(lines) + "\n"
