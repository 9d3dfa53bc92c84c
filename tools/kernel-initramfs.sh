#!/bin/busybox sh
# shellcheck shell=dash
# The first process inside QEMU: mounts the host's root over 9p and goes on there.
# $TOOLS and $BED come from the kernel's command line.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do
    $b insmod "/modules/$module.ko" || echo "cannot load $module"
done
# cache=loose: without it every import of a Python module is a hundred round trips, and there is
# no shared mmap. The host's files must not change while the guest runs.
options=trans=virtio,version=9p2000.L,msize=512000,cache=loose
$b mount -t 9p -o $options rootfs /host || exec $b poweroff -f
$b mount --move /dev /host/dev
$b umount /proc
exec $b switch_root /host "$TOOLS/kernel-init.sh"
