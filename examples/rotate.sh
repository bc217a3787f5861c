#!/usr/bin/env bash
# Keeps the last copies, each whole, as rsnapshot does: slices that did not change are hard links to
# those of the copy before, and neither read nor stored again.
#
#   examples/rotate.sh MOUNT DIRECTORY [KEEP]      7 copies unless KEEP says otherwise
#
# To restore the disk vda:
#
#   cat DIRECTORY/NAME/vda/*/* >vda.raw
set -euo pipefail
case $# in 2 | 3) ;; *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
mount=$1 directory=$2 keep=${3-7}

# Copies, the oldest first: their names are dates.
copies() { find "$directory" -mindepth 1 -maxdepth 1 -type d -name '2*' -printf '%f\n' | sort; }

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT

rm -rf "$directory/unfinished"
last=$(copies | tail -n 1)
if [ -n "$last" ]; then cp -al "$directory/$last" "$directory/unfinished"; fi
# rsync writes a new file beside the old one, so older copies keep theirs.
rsync --archive --delete "$backup/slices/" "$directory/unfinished/"
mv "$directory/unfinished" "$directory/$name"
copies | head -n "-$keep" | while read -r old; do rm -rf "${directory:?}/$old"; done
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: one of $(copies | wc -l) copies in $directory, $pulled bytes were read"
