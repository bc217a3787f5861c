#!/usr/bin/env bash
# Copies all disks as sparse raw images with rsync. Everything that holds data is read each time;
# over a network, only what differs from the last copy is sent.
#
#   examples/rsync-image.sh MOUNT DESTINATION
#
# DESTINATION is whatever rsync takes: a directory, host:directory. The images can be used as they are.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 destination=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT

rsync --archive --sparse "$backup/raw/" "$destination/"
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: the images are in $destination, $pulled bytes were read"
