# xtuner: completion for bash. source <(xtuner completion bash)
_xtuner() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"
    local verb="${COMP_WORDS[1]}" at=2 words="" options="" first="" files=
    if (( COMP_CWORD == 1 )); then COMPREPLY=( $(compgen -W "@{heads} --help --version" -- "$current") ); return; fi
    case "$verb" in
@{groups}
    esac
    if (( COMP_CWORD < at )); then COMPREPLY=( $(compgen -W "$words" -- "$current") ); return; fi
    case "$verb $previous" in
@{values}
    esac
    case "$verb" in
@{verbs}
    esac
    if [[ "$current" == -* ]]; then COMPREPLY=( $(compgen -W "$options" -- "$current") ); return; fi
    (( COMP_CWORD == at )) || return 0  # without matches bash completes files (-o default)
    COMPREPLY=( $(compgen -W "$first" -- "$current") )
    if [[ "$files" ]]; then
        local IFS=$'\n'
        COMPREPLY+=( $(compgen -f -- "$current") )
        compopt -o filenames 2> /dev/null
    fi
    return 0
}
complete -o default -F _xtuner xtuner
