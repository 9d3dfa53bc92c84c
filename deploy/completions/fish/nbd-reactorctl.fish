# fish completion for nbd-reactorctl; written by tools/documents

function __nbd_reactorctl_disks
    set -l words (commandline -opc)
    set -l socket
    if set -l at (contains -i -- --socket $words)
        set socket --socket $words[(math $at + 1)]
    end
    $words[1] $socket --timeout 1 list 2>/dev/null </dev/null | sed -n '2,$s/ .*//p'
end

function __nbd_reactorctl_place -a command least most
    set -l words (commandline -opc)
    set -l at (contains -i -- $command $words); or return
    set -e words[1..$at]
    set -l count (count (string match -v -- '-*' $words))
    test $count -ge $least -a $count -le $most
end

complete -c nbd-reactorctl -f
complete -c nbd-reactorctl -s h -l help -d 'show this help message and exit'
complete -c nbd-reactorctl -l version -d 'show program\'s version number and exit'
complete -c nbd-reactorctl -l socket -r -F -d 'the service\'s RPC socket'
complete -c nbd-reactorctl -l json -d 'print JSON'
complete -c nbd-reactorctl -l timeout -x -a '' -d 'how long to wait for the service'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a status -d 'show the service, its workers, and disks that are not online'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a list -d 'list the disks'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a show -d 'show a disk'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place show 0 0' -a '(__nbd_reactorctl_disks)'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a start -d 'start a disk that is down'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place start 0 0' -a '(__nbd_reactorctl_disks)'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place start 1 99' -a 'backend= device= listen= core= readonly= block_size= connections= timeout= dead_timeout= attach= direct= path= size='
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a stop -d 'drain and stop a disk'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place stop 0 0' -a '(__nbd_reactorctl_disks)'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a remove -d 'hot-remove a disk'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place remove 0 0' -a '(__nbd_reactorctl_disks)'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a resize -d 'change a disk\'s size'
complete -c nbd-reactorctl -n '__nbd_reactorctl_place resize 0 0' -a '(__nbd_reactorctl_disks)'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a reload -d 'read the config file again, and wait for the disks'
complete -c nbd-reactorctl -n 'not __fish_seen_subcommand_from status list show start stop remove resize reload rpc' -a rpc -d 'call an RPC method and print its result'
