#compdef xtuner
# xtuner: completion for zsh. source <(xtuner completion zsh), after compinit
_xtuner() {
    local verb="$words[2]" current="$words[CURRENT]" previous="$words[CURRENT-1]"
    local -i at=3
    local -a first
    if (( CURRENT == 2 )); then compadd -- @{heads} --help --version; return; fi
    case "$verb" in
@{groups}
    esac
    case "$verb $previous" in
@{values}
    esac
    case "$verb" in
@{verbs}
    esac
    if (( CURRENT == at && $#first )); then
        compadd -a first
        [[ "$verb" == (@{with_files}) ]] || return 0
    fi
    _files
}
compdef _xtuner xtuner
