//! The vfs' own types as fuser's.

use std::time::Duration;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate,
    ReplyEmpty, ReplyEntry,
};

use super::errno::errno;
use crate::model::{Error, Result};
use crate::vfs::{Attr, Caching, Created, FileKind, Found, Opened};

/// The largest read: also what the kernel allows.
pub(super) const LARGEST: u32 = 1024 * 1024;

pub(super) fn no(error: &Error) -> Errno {
    errno(error.kind())
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::File => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.0),
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.mtime,
        mtime: attr.mtime,
        ctime: attr.mtime,
        crtime: attr.mtime,
        kind: file_type(attr.kind),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        // What cp and others take as the size of their reads.
        blksize: LARGEST,
        flags: 0,
    }
}

pub(super) fn reply_entry(reply: ReplyEntry, found: Result<Found>) {
    match found {
        Ok(found) => reply.entry_with_ttls(
            &found.attr_ttl,
            &found.name_ttl,
            &file_attr(&found.attr),
            Generation(found.generation),
        ),
        Err(e) => reply.error(no(&e)),
    }
}

pub(super) fn caching(opened: &Opened) -> FopenFlags {
    match opened.caching {
        Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
        Caching::Bypass => FopenFlags::FOPEN_DIRECT_IO,
    }
}

pub(super) fn reply_create(reply: ReplyCreate, created: Result<Created>) {
    match created {
        // There is one time for both the name and the attributes, and neither holds for any.
        Ok(Created { found, opened }) => reply.created(
            &found.attr_ttl.min(found.name_ttl),
            &file_attr(&found.attr),
            Generation(0),
            FileHandle(opened.handle.0),
            caching(&opened),
        ),
        Err(e) => reply.error(no(&e)),
    }
}

pub(super) fn reply_attr(reply: ReplyAttr, attr: Result<(Attr, Duration)>) {
    match attr {
        Ok((attr, ttl)) => reply.attr(&ttl, &file_attr(&attr)),
        Err(e) => reply.error(no(&e)),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(no(&e)),
    }
}
