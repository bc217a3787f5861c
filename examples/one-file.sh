#!/usr/bin/env bash
# Fetches a file or directory out of the guest's first disk, as it is now.
#
#   examples/one-file.sh MOUNT PATH DESTINATION [PARTITION]
#
# PATH is the guest's, below the file system's top. PARTITION is a number, such as 1; without one the
# disk has to hold a file system and no partitions. Needs root, for the loop device.
set -euo pipefail
case $# in 3 | 4) ;; *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
mount=$1 path=$2 destination=$3 partition=${4-}

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
inside=""
finish() {
    if [ -n "$inside" ]; then
        if mountpoint -q "$inside"; then umount "$inside"; fi
        rmdir "$inside"
    fi
    rmdir "$backup"
    # Nobody will ask what changed since then.
    if [ -d "$mount/checkpoints/$name" ]; then rmdir "$mount/checkpoints/$name"; fi
}
mkdir "$backup"
trap finish EXIT
inside=$(mktemp -d)

options=ro,loop
if [ -n "$partition" ]; then
    read -r start sectors < <(partx -rgo START,SECTORS -n "$partition" "$backup/disk.raw")
    options=$options,offset=$((start * 512)),sizelimit=$((sectors * 512))
fi
# The file system is as after a power cut, and its journal cannot be replayed into a frozen disk.
# Those without one do not know the option.
mount -o "$options,norecovery" "$backup/disk.raw" "$inside" 2>/dev/null ||
    mount -o "$options" "$backup/disk.raw" "$inside"
cp -a "$inside/$path" "$destination"
echo "$name: $path was copied to $destination"
