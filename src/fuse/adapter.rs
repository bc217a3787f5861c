//! One small function an operation: decode, call the vfs, reply. What decides anything is in the
//! vfs.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};

use super::convert::{
    LARGEST, caching, file_type, no, reply_attr, reply_create, reply_empty, reply_entry,
};
use super::errno::errno;
use super::workers::{Workers, guarded};
use crate::model::Result;
use crate::vfs::{self, Ask, Change, Handle, Ino, Opened, Seek, Vfs};

/// Threads that read disks: as many reads of 1 MiB are under way at once.
const READERS: usize = 8;
/// Threads for what else asks the domain.
const ASKERS: usize = 8;
/// Requests that may wait for either. The kernel limits what it reads ahead; beyond that each
/// waiting request is a waiting thread of some process.
const QUEUE: usize = 16 * 1024;
/// Reads that the kernel may have under way without a process waiting for each.
const BACKGROUND: u16 = 64;

/// What a hole reads as. Nobody writes to it, so it takes one page of memory.
static ZEROS: [u8; LARGEST as usize] = [0; LARGEST as usize];

pub(super) struct Adapter {
    vfs: Arc<Vfs>,
    readers: Workers,
    askers: Workers,
}

impl Adapter {
    pub(super) fn start(vfs: Arc<Vfs>) -> io::Result<Self> {
        Ok(Self {
            vfs,
            readers: Workers::start("reader", READERS, QUEUE)?,
            askers: Workers::start("asker", ASKERS, QUEUE)?,
        })
    }

    /// Answers at once, or leaves it to an asker if the domain may have to be asked.
    fn answer(
        &self,
        what: &'static str,
        ino: INodeNo,
        ask: Ask,
        job: impl FnOnce(&Vfs) + Send + 'static,
    ) {
        guarded(what, || {
            if self.vfs.asks(Ino(ino.0), ask) {
                self.ask(what, job);
            } else {
                job(&self.vfs);
            }
        });
    }

    fn ask(&self, what: &'static str, job: impl FnOnce(&Vfs) + Send + 'static) {
        let vfs = Arc::clone(&self.vfs);
        self.askers.submit(what, move |_| job(&vfs));
    }

    fn refuse(&self, ino: INodeNo, name: Option<&OsStr>, change: Change) -> Errno {
        errno(self.vfs.refuse(Ino(ino.0), name, change).kind())
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // AUTO_INVAL_DATA: pages of a slice go when its time changes.
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ] {
            if config.add_capabilities(wanted).is_err() {
                log::debug!("the kernel does not offer {wanted:?}");
            }
        }
        if let Err(most) = config.set_max_readahead(u32::MAX) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_max_write(LARGEST);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", || {
            reply_entry(reply, self.vfs.lookup(Ino(parent.0), name));
        });
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer("getattr", ino, Ask::Attributes, move |vfs| {
            reply_attr(reply, vfs.getattr(Ino(ino.0)));
        });
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        guarded("readlink", || match self.vfs.readlink(Ino(ino.0)) {
            Ok(target) => reply.data(target.as_bytes()),
            Err(e) => reply.error(no(&e)),
        });
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = name.to_owned();
        self.ask("mkdir", move |vfs| {
            reply_entry(reply, vfs.mkdir(Ino(parent.0), &name));
        });
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        self.ask("rmdir", move |vfs| {
            reply_empty(reply, vfs.rmdir(Ino(parent.0), &name));
        });
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let answer = move |opened: Result<Opened>| match opened {
            Ok(opened) => {
                // Close has nothing to say of what is not a document: with this flag (Linux 5.16) the
                // kernel does not even ask, once a file.
                let flags = caching(&opened) | FopenFlags::FOPEN_NOFLUSH;
                reply.opened(FileHandle(opened.handle.0), flags);
            }
            Err(e) => reply.error(no(&e)),
        };
        if flags.acc_mode() == OpenAccMode::O_RDONLY {
            self.answer("open", ino, Ask::Open, move |vfs| {
                answer(vfs.open(Ino(ino.0)));
            });
        } else {
            guarded("open", || answer(self.vfs.open_to_write(Ino(ino.0))));
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        guarded("create", || {
            reply_create(reply, self.vfs.create(Ino(parent.0), name));
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.answer("write", ino, Ask::Write, move |vfs| {
            match vfs.write(Handle(fh.0), offset, &data) {
                Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
                Err(e) => reply.error(no(&e)),
            }
        });
    }

    fn flush(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.answer("flush", ino, Ask::Flush, move |vfs| {
            reply_empty(reply, vfs.flush(Handle(fh.0)));
        });
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let handle = Handle(fh.0);
        let size = size as usize;
        guarded("read", || {
            if let Some(text) = self.vfs.opened_text(handle) {
                reply.data(vfs::window(text.as_bytes(), offset, size));
                return;
            }
            // No thread need wake up for a hole, nor memory be cleared for it.
            if let Some(zeros) = self.vfs.zeros(handle, offset, size)
                && let Some(zeros) = ZEROS.get(..zeros)
            {
                reply.data(zeros);
                return;
            }
            let vfs = Arc::clone(&self.vfs);
            self.readers.submit("read", move |buffer| {
                if buffer.len() < size {
                    buffer.resize(size, 0);
                }
                match vfs.read(handle, offset, &mut buffer[..size]) {
                    Ok(read) => reply.data(&buffer[..read]),
                    Err(e) => reply.error(no(&e)),
                }
            });
        });
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let to = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        self.answer("lseek", ino, Ask::Seek, move |vfs| {
            match vfs.lseek(Handle(fh.0), offset, to) {
                Ok(offset) => reply.offset(offset),
                Err(e) => reply.error(no(&e)),
            }
        });
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded("release", || {
            self.vfs.release(Handle(fh.0));
            reply.ok();
        });
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", || match self.vfs.opendir(Ino(ino.0)) {
            Ok(handle) => reply.opened(FileHandle(handle.0), FopenFlags::empty()),
            Err(e) => reply.error(no(&e)),
        });
    }

    fn readdir(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded("readdir", || match self.vfs.readdir(Handle(fh.0), offset) {
            Ok(entries) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                for (entry, next) in entries.iter().zip(1u64..).skip(from) {
                    let ino = INodeNo(entry.ino.0);
                    if reply.add(ino, next, file_type(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(e) => reply.error(no(&e)),
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guarded("releasedir", || {
            self.vfs.release(Handle(fh.0));
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // Like /proc: nothing can be stored here, and df leaves it out.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn access(&self, _: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions the kernel decides by itself.
        reply.ok();
    }

    // Nothing is stored, so there is nothing to sync.

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    // No extended attributes: tools ask for them of every file, and take these answers for it.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, size: u32, reply: ReplyXattr) {
        match size {
            0 => reply.size(0),
            _ => reply.data(&[]),
        }
    }

    fn ioctl(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: fuser::PollFlags,
        reply: ReplyPoll,
    ) {
        // Always ready; the kernel takes it for that and never asks again.
        reply.error(Errno::ENOSYS);
    }

    // What would change something.

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.answer("setattr", ino, Ask::Write, move |vfs| {
            reply_attr(reply, vfs.setattr(Ino(ino.0), size));
        });
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        guarded("mknod", || {
            reply.error(self.refuse(parent, Some(name), Change::Create));
        });
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, _: &Path, reply: ReplyEntry) {
        guarded("symlink", || {
            reply.error(self.refuse(parent, Some(name), Change::Symlink));
        });
    }

    fn link(&self, _: &Request, _: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("link", || {
            reply.error(self.refuse(parent, Some(name), Change::Link));
        });
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guarded("unlink", || {
            reply.error(self.refuse(parent, Some(name), Change::Unlink));
        });
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            guarded("rename", || {
                reply.error(self.refuse(parent, Some(name), Change::Exchange));
            });
            return;
        }
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        self.ask("rename", move |vfs| {
            let (from, to) = ((Ino(parent.0), &*name), (Ino(new_parent.0), &*new_name));
            reply_empty(reply, vfs.rename(from, to));
        });
    }

    fn setxattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        guarded("setxattr", || {
            reply.error(self.refuse(ino, None, Change::ExtendedAttributes));
        });
    }

    fn removexattr(&self, _: &Request, ino: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        guarded("removexattr", || {
            reply.error(self.refuse(ino, None, Change::ExtendedAttributes));
        });
    }
}
