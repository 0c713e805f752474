# xtuner: completion for fish. xtuner completion fish | source
function __xtuner_at  # whether the words before the cursor begin with these
    set -l given (commandline -opc)
    string match -q -- "$argv *" "$given[2..] "
end
function __xtuner_at_first  # whether the words before the cursor are exactly these
    set -l given (commandline -opc)
    test "$given[2..]" = "$argv"
end
complete -c xtuner -n '__xtuner_at_first' -f -a '@{heads}'
@{verbs}
