#!/usr/bin/env bash
# Puts what changed since the last time into an archive of its own; the first one holds everything.
#
#   examples/tar.sh MOUNT DIRECTORY
#
# To restore the disk vda, unpack the archives in the order of their names:
#
#   for archive in DIRECTORY/*.tar; do tar -xf "$archive"; done; cat vda/*/* >vda.raw
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 directory=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT

# A slice that changed since an instant bears a later time. tar's own list of files would not do:
# it takes a directory with another number for a new one, and reads all in it.
last=-1
if [ -e "$directory/manifest" ]; then
    last=$(sed -n 's/^begun-unix: //p' "$directory/manifest")
fi
tar -C "$backup/slices" --newer-mtime="@$((last + 1))" -cf "$directory/$name.part" .
mv "$directory/$name.part" "$directory/$name.tar"
cp "$backup/slices/manifest" "$directory/manifest.part"
mv -f "$directory/manifest.part" "$directory/manifest"
pulled=$(sed -n 's/^bytes-pulled: //p' "$backup/status")
echo "$name: $directory/$name.tar holds what changed, $pulled bytes were read"
