#!/usr/bin/env bash
# Copies each disk as a qcow2 image: in full the first time, afterwards what changed, on top of the
# image before.
#
#   examples/qcow2-chain.sh MOUNT DIRECTORY
#
# DIRECTORY/vda/NAME.qcow2 is the disk vda as it was then, as long as the images before it are there:
# qemu-system and qemu-img take it as it is. To make one image of it:
#
#   qemu-img convert -O qcow2 DIRECTORY/vda/NAME.qcow2 vda.qcow2
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mount=$1 directory=$2

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
mkdir "$backup"
trap 'rmdir "$backup"' EXIT

for full in "$backup"/qcow2/*.qcow2; do
    disk=$(basename "$full" .qcow2)
    mkdir -p "$directory/$disk"
    from=$full what="in full"
    # The newest image here that the changes since are known of. Names are dates, so the last one is.
    for image in "$directory/$disk"/*.qcow2; do
        base=$(basename "$image" .qcow2)
        if [ -e "$backup/since/$base/$disk.qcow2" ]; then
            from=$backup/since/$base/$disk.qcow2 what="what changed since $base"
        fi
    done
    cp "$from" "$directory/$disk/$name.part"
    mv "$directory/$disk/$name.part" "$directory/$disk/$name.qcow2"
    echo "$name: $directory/$disk/$name.qcow2 holds $disk, $what"
done
