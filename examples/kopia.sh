#!/usr/bin/env bash
# Backs up all disks with kopia, which should read the slices that changed, and no others. Not tested:
# kopia is in no Debian archive. What it compares (path, size, time, mode, owner) is.
#
#   kopia repository create filesystem --path REPOSITORY      once, and stays connected
#   examples/kopia.sh MOUNT
#
# To restore the disk vda:
#
#   kopia restore SNAPSHOT DIR && cat DIR/vda/*/* >vda.raw
set -euo pipefail
[ $# = 1 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT
# kopia knows a source by its path, which is the same every night in current/ only.
grep -q '^current: yes' "$backup/status" || { echo "another backup holds current/" >&2; exit 1; }

kopia snapshot create --description "$name" "$mount/current"
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: is in the repository, $pulled bytes were read"
