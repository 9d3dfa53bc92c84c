# bash completion for nbd-reactorctl; written by tools/documents

_nbd_reactorctl_disks() {
    local index socket=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${COMP_WORDS[index]} == --socket ]]; then
            [[ ${COMP_WORDS[index + 1]} == = ]] && ((index++))
            eval "socket=(--socket ${COMP_WORDS[index + 1]})" 2>/dev/null
        fi
    done
    "$1" "${socket[@]}" --timeout 1 list 2>/dev/null </dev/null | sed -n '2,$s/ .*//p'
}

_nbd_reactorctl() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    if [[ $word == = ]]; then # --option=value is three words
        word=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $before in
        --socket) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
        --timeout) return ;;
    esac
    local index command='' places=0
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${COMP_WORDS[index]} in
            --socket | --timeout)
                [[ ${COMP_WORDS[index + 1]} == = ]] && ((index++))
                ((index++))
                ;;
            -*) ;;
            *) [[ $command ]] && ((++places)) || command=${COMP_WORDS[index]} ;;
        esac
    done
    [[ $before == = && $before != "${COMP_WORDS[COMP_CWORD - 1]}" ]] && return
    if [[ $word != -* ]]; then
        case $command:$places in
            :0) mapfile -t COMPREPLY < <(compgen -W 'status list show start stop remove resize reload rpc' -- "$word") ;;
            show:0) mapfile -t COMPREPLY < <(compgen -W "$(_nbd_reactorctl_disks "$1")" -- "$word") ;;
            start:0) mapfile -t COMPREPLY < <(compgen -W "$(_nbd_reactorctl_disks "$1")" -- "$word") ;;
            start:*) compopt -o nospace; mapfile -t COMPREPLY < <(compgen -W 'backend= device= listen= core= readonly= block_size= connections= timeout= dead_timeout= attach= direct= path= size=' -- "$word") ;;
            stop:0) mapfile -t COMPREPLY < <(compgen -W "$(_nbd_reactorctl_disks "$1")" -- "$word") ;;
            remove:0) mapfile -t COMPREPLY < <(compgen -W "$(_nbd_reactorctl_disks "$1")" -- "$word") ;;
            resize:0) mapfile -t COMPREPLY < <(compgen -W "$(_nbd_reactorctl_disks "$1")" -- "$word") ;;
        esac
        return
    fi
    mapfile -t COMPREPLY < <(compgen -W '-h --help --version --socket --json --timeout' -- "$word")
}

complete -F _nbd_reactorctl nbd-reactorctl
