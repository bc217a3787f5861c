#!/usr/bin/env bash
# Backs up all disks with borg, which reads the slices that changed, and no others.
#
#   borg init --encryption=repokey REPOSITORY      once
#   examples/borg.sh MOUNT REPOSITORY
#
# REPOSITORY is an absolute path, or host:path. To restore the disk vda:
#
#   borg extract REPOSITORY::ARCHIVE && cat vda/*/* >vda.raw
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 repository=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT
# borg knows a file by its path and number, which are the same every night in current/ only.
grep -q '^current: yes' "$backup/status" || { echo "another backup holds current/" >&2; exit 1; }

(cd "$mount/current" && borg create "$repository::$name" .)
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: is in $repository, $pulled bytes were read"
