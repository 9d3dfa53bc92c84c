# bash completion for nbd-reactor; written by tools/documents

_nbd_reactor() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    if [[ $word == = ]]; then # --option=value is three words
        word=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $before in
        --config) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --cores) return ;;
        --mode) mapfile -t COMPREPLY < <(compgen -W 'adaptive poll interrupt' -- "$word"); return ;;
        --on-exit) mapfile -t COMPREPLY < <(compgen -W 'disconnect keep' -- "$word"); return ;;
        --log-format) mapfile -t COMPREPLY < <(compgen -W 'text json' -- "$word"); return ;;
        --log-level) mapfile -t COMPREPLY < <(compgen -W 'debug info warning error critical' -- "$word"); return ;;
        --runtime-dir) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$word"); return ;;
        --rpc-socket) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --metrics) return ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W '--config --demo --check --strict --cores --mode --on-exit --lock-memory --log-format --log-level --runtime-dir --rpc-socket --metrics --version -h --help' -- "$word")
}

complete -F _nbd_reactor nbd-reactor
