#!/bin/sh
# The first process of a guest, on the host's own files: sets the machine up, runs $BED/command,
# and sends its exit status. See tools/kernel.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mkdir -p /run/tmp /run/lock /dev/shm /dev/pts
chmod 1777 /run/tmp
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts 2>/dev/null
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
ip link set lo up
# shellcheck disable=SC1091  # tools/kernel writes it
. "$BED/settings"

if [ -n "$NBD_MODULE" ]; then
    insmod "$NBD_MODULE" nbds_max="$NBDS_MAX"
fi

# In QEMU the streams are virtio ports, known by name; they appear some time after the boot.
port() {
    for _ in $(seq 100); do
        name=$(grep -lx "$1" /sys/class/virtio-ports/*/name 2>/dev/null) && break
        sleep 0.1
    done
    name=${name%/name}
    echo "/dev/${name##*/}"
}
if [ "$STDOUT" = stdout ]; then
    STDOUT=$(port stdout)
    STDERR=$(port stderr)
    STATUS=$(port status)
fi

# A terminal would add carriage returns. Setting it also waits until its output has left.
settle() {
    case $STDOUT in
    *tty*) stty -F "$1" raw -echo ;;
    esac
}
for stream in "$STDOUT" "$STDERR" "$STATUS"; do settle "$stream"; done

# Through pipes, so that the command sees no terminal.
mkfifo /run/stdout /run/stderr
cat /run/stdout >"$STDOUT" &
out=$!
cat /run/stderr >"$STDERR" &
err=$!
setsid sh "$BED/command" </dev/null >/run/stdout 2>/run/stderr
status=$?
rm /run/stdout /run/stderr

# What the command left running must not hold its output open.
for directory in /proc/[0-9]*; do
    pid=${directory#/proc/}
    [ "$pid" = 1 ] || [ "$pid" = $out ] || [ "$pid" = $err ] || kill -9 "$pid" 2>/dev/null
done
wait $out $err
settle "$STDOUT"
settle "$STDERR"
sync -f "$BED"
for disk in $DISKS; do sync "$disk"; done
echo $status >"$STATUS"
settle "$STATUS"
while :; do sleep 1000; done
