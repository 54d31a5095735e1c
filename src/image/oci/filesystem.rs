//! Writes a file system. [`Filesystem`] is the seam at which the crate `mkext4` can be replaced.
//!
//! The output depends only on the options and on the sequence of calls, so an image always produces
//! the same bytes.

use super::acl;
use super::copying::{Copying, DOING, Placeholder, Sink, Source};
use super::entry::{Attributes, Time, Xattr};
use super::errors::{bad, shown};
use crate::error::{Error, Kind, Result};
use mkext4::sink::RegionSink;
use rustix::fs::FallocateFlags;
use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;

/// The time of everything that has none of its own: directories that no layer names, and the file
/// system itself. It is 2023-11-14, because some programs fail with times before 1980.
pub(super) const FIXED_TIME_S: i64 = 1_700_000_000;
/// The times that ext4 can store with inodes of 256 bytes; the kernel also clamps to them.
const TIME_MIN_S: i64 = -(1 << 31);
const TIME_MAX_S: i64 = (1 << 34) - (1 << 31) - 1;
const BLOCK_BYTES: u64 = 4096;
/// mke2fs makes one inode for this number of bytes by default.
const BYTES_PER_INODE: u64 = 16384;
const LABEL: &str = "fcd-root";

/// A file or directory that was added.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode(mkext4::InodeHandle);

#[derive(Clone, Copy, Debug)]
pub(super) enum Device {
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// The size and the identity of a file system.
pub(super) struct Options {
    pub(super) disk_bytes: u64,
    pub(super) uuid: [u8; 16],
    /// The number of files and directories.
    pub(super) inodes: u64,
}

/// The content of a file that was added with a size.
pub(super) struct Fill<'a> {
    pub(super) inode: Inode,
    pub(super) source: Source<'a>,
}

/// A file system that is being made: all names are added first, then all contents.
pub(super) trait Filesystem: Sized {
    fn new(options: &Options) -> Result<Self>;
    fn root(&self) -> Inode;
    fn set_root(&mut self, attributes: &Attributes) -> Result<()>;
    fn add_directory(&mut self, at: Inode, name: &str, attributes: &Attributes) -> Result<Inode>;
    fn add_file(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        bytes: u64,
    ) -> Result<Inode>;
    fn add_symlink(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        target: &str,
    ) -> Result<Inode>;
    fn add_device(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        device: Device,
    ) -> Result<Inode>;
    fn add_link(&mut self, at: Inode, name: &str, inode: Inode) -> Result<()>;
    /// Writes everything. Every file that has a size above zero must be filled once.
    fn write<'a>(
        self,
        copying: &Copying<'a>,
        fills: impl Iterator<Item = Fill<'a>> + Clone,
    ) -> Result<()>;
}

/// Returns the attributes of a directory that no layer names.
pub(super) fn unnamed_directory() -> Attributes {
    Attributes {
        mode: 0o755,
        mtime: Time {
            seconds: FIXED_TIME_S,
            nanoseconds: 0,
        },
        ..Attributes::default()
    }
}

pub(super) struct Ext4 {
    builder: mkext4::FsBuilder,
    options: mkext4::Options,
}

/// Converts an error of the crate. An I/O error comes from one of fcd's readers or from the output.
fn failed(doing: &str, error: mkext4::Error) -> Error {
    match error {
        mkext4::Error::Io(e) => super::errors::read_error(doing, e),
        other => bad(doing).with_source(other),
    }
}

fn in_name(name: &str) -> impl Fn(mkext4::Error) -> Error {
    move |e| {
        failed(
            &format!("add {} to the file system", shown(name.as_bytes())),
            e,
        )
    }
}

fn meta(attributes: &Attributes) -> mkext4::Meta {
    let seconds = attributes.mtime.seconds.clamp(TIME_MIN_S, TIME_MAX_S);
    let time = (seconds, attributes.mtime.nanoseconds);
    mkext4::Meta::new(attributes.mode, attributes.uid, attributes.gid, time)
}

impl Ext4 {
    /// Sets the attributes that ext4 has a place for. Docker also ignores the others, because
    /// setxattr(2) refuses them.
    fn set_xattrs(&mut self, inode: mkext4::InodeHandle, xattrs: &[Xattr]) -> Result<()> {
        for xattr in xattrs {
            let name = &*xattr.name;
            let set = |builder: &mut mkext4::FsBuilder, value: &[u8]| {
                builder.set_xattr(inode, name, value).map_err(in_name(name))
            };
            match name.split_once('.') {
                Some(("user" | "trusted" | "security", rest)) if !rest.is_empty() => {
                    set(&mut self.builder, &xattr.value)?;
                }
                Some(("system", "posix_acl_access" | "posix_acl_default")) => {
                    let acl = acl::to_ext4(&xattr.value);
                    let acl = acl.ok_or_else(|| bad(format!("the attribute {name} is damaged")))?;
                    set(&mut self.builder, &acl)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn finish(
        &mut self,
        inode: Result<mkext4::InodeHandle, mkext4::Error>,
        name: &str,
        attributes: &Attributes,
    ) -> Result<Inode> {
        let inode = inode.map_err(in_name(name))?;
        self.set_xattrs(inode, &attributes.xattrs)?;
        Ok(Inode(inode))
    }
}

impl Filesystem for Ext4 {
    fn new(options: &Options) -> Result<Self> {
        let size = options.disk_bytes / BLOCK_BYTES * BLOCK_BYTES;
        let mut all = mkext4::Options::new(size, options.uuid, FIXED_TIME_S);
        all.label = Some(LABEL.to_owned());
        all.reserved_percent = 0;
        let inodes = (options.inodes + options.inodes / 2).max(size / BYTES_PER_INODE);
        let inodes = u32::try_from(inodes).unwrap_or(u32::MAX);
        all.inodes = mkext4::InodeCount::Exact(inodes);
        let builder = mkext4::FsBuilder::new(all.clone());
        Ok(Self {
            builder: builder.map_err(|e| failed("begin the file system", e))?,
            options: all,
        })
    }

    fn root(&self) -> Inode {
        Inode(mkext4::ROOT)
    }

    fn set_root(&mut self, attributes: &Attributes) -> Result<()> {
        let set = self.builder.set_meta(mkext4::ROOT, meta(attributes));
        set.map_err(in_name("/"))?;
        self.set_xattrs(mkext4::ROOT, &attributes.xattrs)
    }

    fn add_directory(&mut self, at: Inode, name: &str, attributes: &Attributes) -> Result<Inode> {
        let inode = self.builder.mkdir(at.0, name, meta(attributes));
        self.finish(inode, name, attributes)
    }

    fn add_file(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        bytes: u64,
    ) -> Result<Inode> {
        let inode = self.builder.file(at.0, name, meta(attributes), bytes);
        self.finish(inode, name, attributes)
    }

    fn add_symlink(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        target: &str,
    ) -> Result<Inode> {
        let mut meta = meta(attributes);
        // Linux ignores the mode of a link and shows this one.
        meta.mode = 0o777;
        let inode = self.builder.symlink(at.0, name, target, meta);
        self.finish(inode, name, attributes)
    }

    fn add_device(
        &mut self,
        at: Inode,
        name: &str,
        attributes: &Attributes,
        device: Device,
    ) -> Result<Inode> {
        let kind = match device {
            Device::Character { major, minor } => mkext4::SpecialKind::Char { major, minor },
            Device::Block { major, minor } => mkext4::SpecialKind::Block { major, minor },
            Device::Fifo => mkext4::SpecialKind::Fifo,
        };
        let inode = self.builder.mknod(at.0, name, meta(attributes), kind);
        self.finish(inode, name, attributes)
    }

    fn add_link(&mut self, at: Inode, name: &str, inode: Inode) -> Result<()> {
        let added = self.builder.hardlink(at.0, name, inode.0);
        added.map_err(in_name(name))
    }

    fn write<'a>(
        self,
        copying: &Copying<'a>,
        fills: impl Iterator<Item = Fill<'a>> + Clone,
    ) -> Result<()> {
        crate::locks::may_block("file access");
        let size = self.options.size_bytes;
        let layout = self.builder.seal().map_err(|e| match e {
            // All names were checked when they were added, so only the space can be the reason.
            mkext4::Error::Invalid(_) | mkext4::Error::Unsupported(_) => {
                failed("the image does not fit on its disk", e)
                    .with_kind(Kind::Exhausted)
                    .hint("give the image a larger disk")
            }
            other => failed(DOING, other),
        })?;
        // The file may have other content, and everything that is not written must be zero.
        set_size(copying.out, size).map_err(|e| Error::io(DOING, e))?;
        let ranges = fills.clone().flat_map(|fill| layout.extents(fill.inode.0));
        reserve(copying.out, ranges);
        copying.run(|sink| {
            let shared = RefCell::new(sink);
            let mut writer = layout
                .writer(Shared(&shared))
                .map_err(|e| failed(DOING, e))?;
            for fill in fills {
                shared.borrow_mut().begin(fill.source);
                let filled = writer.fill(fill.inode.0, &mut Placeholder);
                filled.map_err(|e| failed(DOING, e))?;
            }
            writer.finish().map_err(|e| failed(DOING, e))?;
            Ok(())
        })
    }
}

/// Gives a file this size and makes all of its bytes zero. An empty file is not truncated, because
/// ext4 would then begin to write the file to the disk when it is closed (see `auto_da_alloc` in
/// ext4(5)), and closing it would take as long as copying the files.
fn set_size(file: &File, size: u64) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    if file.metadata()?.len() > 0 {
        file.set_len(0)?;
    }
    file.set_len(size)
}

/// Reserves the space of files' contents, which are at these positions and have these sizes. Writes
/// to reserved space take a third less time, because the kernel would reserve it block by block.
/// If the space cannot be reserved, the writes fail with the reason or succeed without it.
fn reserve(out: &File, ranges: impl Iterator<Item = (u64, u64)>) {
    crate::locks::may_block("file access");
    let allocate = |run: Range<u64>| {
        if !run.is_empty() {
            let flags = FallocateFlags::KEEP_SIZE;
            let _ = rustix::fs::fallocate(out, flags, run.start, run.end - run.start);
        }
    };
    let mut run = 0..0;
    for (at, bytes) in ranges {
        if at != run.end {
            allocate(std::mem::replace(&mut run, at..at));
        }
        run.end = (at + bytes).next_multiple_of(BLOCK_BYTES);
    }
    allocate(run);
}

/// The sink, which the crate's writer and its caller use in turn.
struct Shared<'s, 'a, 'b>(&'s RefCell<&'s mut Sink<'a, 'b>>);

impl RegionSink for Shared<'_, '_, '_> {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.borrow_mut().data(offset, bytes)
    }

    fn zeros(&mut self, offset: u64, len: u64) -> std::io::Result<()> {
        self.0.borrow_mut().zeros(offset, len)
    }
}
