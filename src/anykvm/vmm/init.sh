#!/bin/sh
# Process 1 of the guest. One command, whose status leaves through the exit port; or a shell under
# busybox's init, which knows of poweroff and reboot and starts programs with all signals as usual.

leave() {
    /anykvm/exit "$1"
    poweroff -f
}

set_up() {
    [ -e /anykvm/command ] || echo "$marker"
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t devtmpfs devtmpfs /dev
    echo anykvm >/proc/sys/kernel/hostname
}

run_command() {
    [ "$translate_newlines" = yes ] || stty -onlcr
    sh /anykvm/command </dev/null
    leave $?
}

run_shell() {
    [ "$rows" = 0 ] || stty rows "$rows" cols "$columns"
    setsid cttyhack sh
    leave $?
}

. /anykvm/settings
if [ "$1" = shell ]; then
    run_shell
fi
set_up
if [ -e /anykvm/command ]; then
    run_command
fi
exec init
