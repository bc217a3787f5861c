#!/usr/bin/env bash
# Backs up all disks with restic, which reads the slices that changed, and no others.
#
#   restic --repo REPOSITORY init      once
#   examples/restic.sh MOUNT REPOSITORY
#
# REPOSITORY is an absolute path, or sftp:host:path and the like. The password is in
# RESTIC_PASSWORD_FILE, say. To restore the disk vda:
#
#   restic --repo REPOSITORY restore latest --target DIR && cat DIR/vda/*/* >vda.raw
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 repository=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT
# restic knows a file by its path and number, which are the same every night in current/ only.
grep -q '^current: yes' "$backup/status" || { echo "another backup holds current/" >&2; exit 1; }

(cd "$mount/current" && restic --quiet --repo "$repository" backup --tag "$name" .)
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: is in $repository, $pulled bytes were read"
