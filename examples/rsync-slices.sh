#!/usr/bin/env bash
# Keeps one copy of all disks up to date with rsync, which reads the slices that changed, and no
# others: their times tell.
#
#   examples/rsync-slices.sh MOUNT DESTINATION
#
# DESTINATION is whatever rsync takes: a directory, host:directory. To restore the disk vda:
#
#   cat DESTINATION/vda/*/* >vda.raw
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 destination=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT

rsync --archive --delete "$backup/slices/" "$destination/"
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: $destination is up to date, $pulled bytes were read"
