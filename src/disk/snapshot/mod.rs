//! Root disks on device-mapper: a snapshot device whose origin is the image and whose changes go to
//! a sparse file, the store (Documentation/admin-guide/device-mapper/snapshot.rst in Linux).
//!
//! The device exists while the VM runs; between two starts only the store exists. The device is
//! named after the VM's tag, so that fcd finds it after a restart. Its loop devices are detached
//! when it is removed. The VMM opens a device node in the VM's directory, so that nothing depends
//! on udev. udev is configured to ignore the device, because a guest controls its content.
//!
//! The kernel invalidates a snapshot whose store is full. The store is therefore large enough for
//! every block of the disk, and space for the guest's next writes is allocated ahead ([`reserve`]),
//! so that a full host is noticed before the guest loses anything.

mod loop_device;
pub(super) mod store;

use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::{Command, Commands, Complaint, strerror};
use crate::locks::Cancel;
use crate::sched::Instant;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

/// The size of a chunk, in sectors and in bytes. A chunk has the guest's block size.
const CHUNK_SECTORS: u64 = 8;
const CHUNK_BYTES: u64 = CHUNK_SECTORS * SECTOR_BYTES;
const SECTOR_BYTES: u64 = 512;
/// The number of exceptions in an area. A persistent store consists of areas. Each begins with one
/// chunk of exceptions of 16 bytes, followed by the chunks that the exceptions describe
/// (dm-snap-persistent.c).
const EXCEPTIONS_PER_AREA: u64 = CHUNK_BYTES / 16;
/// The space that is allocated beyond the data that the guest has written.
pub const AHEAD_BYTES: u64 = 256 << 20;
/// The suffix of the device that extends an image to the disk's size.
const BASE_SUFFIX: &str = "-base";
const DMSETUP_DEADLINE: Duration = Duration::from_secs(30);
/// How long to retry while udev or another program has the device open.
const BUSY_DEADLINE: Duration = Duration::from_secs(10);
const BUSY_PERIOD: Duration = Duration::from_millis(50);
const CONTROL: &str = "/dev/mapper/control";
const SYS_BLOCK: &str = "/sys/block";

/// The device to create.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec<'a> {
    /// The VM's tag. No device of this name may exist.
    pub name: &'a str,
    /// The image's raw file system.
    pub origin: &'a Path,
    /// The store, which receives the changes; see [`size_store`].
    pub store: &'a Path,
    /// The size of the disk.
    pub size_bytes: u64,
    /// The path of the node for the VMM. An existing one is replaced.
    pub node: &'a Path,
    /// The uid and gid of the VMM.
    pub owner: Option<Credentials>,
}

/// The fill level of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The used part of the store.
    Used { bytes: u64 },
    /// The snapshot is invalid, so the guest sees errors and the disk is lost. The text comes from
    /// the kernel.
    Lost(String),
}

/// Returns the size of a store that can hold every block of a disk of `size_bytes`, including its
/// metadata.
pub fn store_bytes(size_bytes: u64) -> u64 {
    let chunks = size_bytes.div_ceil(CHUNK_BYTES);
    let areas = chunks.div_ceil(EXCEPTIONS_PER_AREA) + 1;
    // The header is one chunk. Each area is one chunk and the chunks that it describes.
    (1 + areas * (1 + EXCEPTIONS_PER_AREA)) * CHUNK_BYTES
}

/// Sets the size of a new store, or grows an existing store with its disk.
pub fn size_store(file: &File, size_bytes: u64) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    let wanted = store_bytes(size_bytes);
    if file.metadata()?.len() < wanted {
        file.set_len(wanted)?;
        file.sync_all()?;
    }
    Ok(())
}

/// Allocates space for the guest's next writes. Space that is already allocated is kept.
///
/// # Errors
/// `disk_full` if the host has no space left. The guest has not lost anything at that point.
pub fn reserve(store: &Path, used_bytes: u64) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = |e: std::io::Error| {
        Error::io(
            format!(
                "allocate space for a guest's changes in {}",
                store.display()
            ),
            e,
        )
    };
    let file = OpenOptions::new().write(true).open(store).map_err(doing)?;
    let wanted = used_bytes
        .saturating_add(AHEAD_BYTES)
        .min(file.metadata().map_err(doing)?.len());
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, wanted) {
        Ok(()) => Ok(()),
        // The file system cannot allocate space, so only check that enough is free.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            has_room(&file).map_err(doing)
        }
        Err(e) => Err(doing(e.into())),
    }
}

fn has_room(file: &File) -> std::io::Result<()> {
    let space = rustix::fs::fstatvfs(file)?;
    if space.f_bavail.saturating_mul(space.f_frsize) < AHEAD_BYTES {
        return Err(std::io::Error::from_raw_os_error(libc::ENOSPC));
    }
    Ok(())
}

/// Flushes all data that a guest has written to the device to the store.
pub fn flush(node: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let device = crate::host::fs::open_nofollow(node)?;
    device
        .sync_all()
        .map_err(|e| Error::io(format!("write back {}", node.display()), e))
}

/// Creates the device and its node. Leaves nothing behind after an error.
///
/// # Errors
/// `disk_full` if the host has no space for the guest's first writes, `command_missing` (dmsetup).
pub fn activate(commands: &dyn Commands, spec: &DeviceSpec<'_>, cancel: &Cancel) -> Result<()> {
    let doing = |e: Error| e.context(format!("create snapshot device {}", spec.name));
    reserve(spec.store, 0).map_err(doing)?;
    let made = make_devices(commands, spec, cancel).and_then(|()| make_node(spec));
    made.map_err(|e| {
        let undone = Cancel::try_new().map_err(|e| Error::io("create an eventfd", e));
        if let Err(left) = undone.and_then(|cancel| deactivate(commands, spec.name, None, &cancel))
        {
            log::warn!("{left}");
        }
        doing(e)
    })
}

fn make_devices(commands: &dyn Commands, spec: &DeviceSpec<'_>, cancel: &Cancel) -> Result<()> {
    // When this function returns, the kernel detaches both loop devices unless a device uses them.
    let origin = loop_device::attach(spec.origin, true)?;
    let store = loop_device::attach(spec.store, false)?;
    let (size, origin_size) = (spec.size_bytes / SECTOR_BYTES, origin.sectors()?);
    let run = |command| {
        commands
            .run(&command, cancel, &mut |_| {})
            .map(drop)
            .map_err(with_install_hint)
    };
    if size <= origin_size {
        return run(create(
            spec.name,
            &snapshot_table(size, &origin.number, &store.number),
            false,
        ));
    }
    let base = format!("{}{BASE_SUFFIX}", spec.name);
    run(create(
        &base,
        &base_table(size, origin_size, &origin.number),
        true,
    ))?;
    run(create(
        spec.name,
        &snapshot_table(size, &number(&base)?, &store.number),
        false,
    ))
}

fn snapshot_table(size: u64, origin: &str, store: &str) -> String {
    format!("0 {size} snapshot {origin} {store} P {CHUNK_SECTORS}\n")
}

fn base_table(size: u64, origin_size: u64, origin: &str) -> String {
    format!(
        "0 {origin_size} linear {origin} 0\n{origin_size} {} zero\n",
        size - origin_size
    )
}

/// Creates the device node, which only the VMM's uid can open.
fn make_node(spec: &DeviceSpec<'_>) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("create node {}", spec.node.display()), e);
    let (major, minor) = numbers(spec.name)?;
    remove_file(spec.node).map_err(io)?;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::BlockDevice;
    rustix::fs::mknodat(
        rustix::fs::CWD,
        spec.node,
        kind,
        mode,
        rustix::fs::makedev(major, minor),
    )
    .map_err(|e| io(e.into()))?;
    if let Some(Credentials { uid, gid }) = spec.owner {
        std::os::unix::fs::lchown(spec.node, Some(uid), Some(gid)).map_err(io)?;
    }
    Ok(())
}

/// Removes the device, and `node` if it belongs to the device. Succeeds if neither exists.
pub fn deactivate(
    commands: &dyn Commands,
    name: &str,
    node: Option<&Path>,
    cancel: &Cancel,
) -> Result<()> {
    if let (Some(node), Ok((major, minor))) = (node, numbers(name))
        && is_node_of(node, rustix::fs::makedev(major, minor))
    {
        remove_file(node).map_err(|e| Error::io(format!("remove {}", node.display()), e))?;
    }
    remove(commands, name, cancel)?;
    remove(commands, &format!("{name}{BASE_SUFFIX}"), cancel)
}

fn is_node_of(node: &Path, rdev: u64) -> bool {
    crate::locks::may_block("file access");
    std::fs::symlink_metadata(node)
        .is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == rdev)
}

/// Removes the device. Retries for a while if it is busy.
fn remove(commands: &dyn Commands, name: &str, cancel: &Cancel) -> Result<()> {
    let deadline = Instant::now() + BUSY_DEADLINE;
    while find(name).is_some() {
        let command = dmsetup(["remove", "--noudevsync", name]);
        match commands
            .run(&command, cancel, &mut |_| {})
            .map_err(with_install_hint)
        {
            Ok(_) => {}
            Err(e) if is_busy(&e) && Instant::now() < deadline && !cancel.is_cancelled() => {
                crate::host::wait::sleep(BUSY_PERIOD, cancel)
                    .map_err(|e| Error::io(format!("remove {name}"), e))?;
            }
            Err(_) if find(name).is_none() => {}
            Err(e) => return Err(e.context(format!("remove snapshot device {name}"))),
        }
    }
    Ok(())
}

/// True if dmsetup failed because the device is busy. dmsetup (lvm2 2.03,
/// libdm/ioctl/libdm-iface.c) exits with status 1 after every failure and prints the text of
/// `strerror` for the ioctl.
fn is_busy(e: &Error) -> bool {
    strerror::says_busy(Complaint::of(e))
}

/// Returns the names of the snapshots that begin with `prefix`. A snapshot that consists of two
/// devices is listed once.
pub fn list(prefix: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = devices()?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|n| n.starts_with(prefix))
        .collect();
    for name in &mut names {
        name.truncate(name.strip_suffix(BASE_SUFFIX).map_or(name.len(), str::len));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// Returns the fill levels of the snapshots whose names begin with `prefix`.
pub fn fill(commands: &dyn Commands, prefix: &str, cancel: &Cancel) -> Result<Vec<(String, Fill)>> {
    let out = commands
        .run(
            &dmsetup(["status", "--target", "snapshot"]),
            cancel,
            &mut |_| {},
        )
        .map_err(with_install_hint)?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(parse_status)
        .filter(|(name, _)| name.starts_with(prefix))
        .collect())
}

/// Parses a line such as `NAME: 0 131072 snapshot 8392/65536 48`. An invalid snapshot has a word
/// instead of the numbers.
fn parse_status(line: &str) -> Option<(String, Fill)> {
    let (name, rest) = line.split_once(": ")?;
    let state = rest
        .split_whitespace()
        .skip_while(|w| *w != "snapshot")
        .nth(1)?;
    let fill = match state
        .split_once('/')
        .and_then(|(used, _)| used.parse::<u64>().ok())
    {
        Some(sectors) => Fill::Used {
            bytes: sectors * SECTOR_BYTES,
        },
        None => Fill::Lost(state.to_owned()),
    };
    Some((name.to_owned(), fill))
}

/// Checks that this host supports device-mapper snapshots. The error is the reason why it does not.
pub fn probe(dir: &Path) -> std::result::Result<(), String> {
    crate::locks::may_block("file access");
    if !nix::unistd::geteuid().is_root() {
        return Err("device-mapper needs root".to_owned());
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL)
        .map_err(|e| format!("{CONTROL}: {e}"))?;
    let loops = "/dev/loop-control";
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(loops)
        .map_err(|e| format!("{loops}: {e}"))?;
    let space = rustix::fs::statvfs(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    if space.f_flag.contains(rustix::fs::StatVfsMountFlags::NODEV) {
        return Err(format!("{} is mounted nodev", dir.display()));
    }
    Ok(())
}

fn find(name: &str) -> Option<String> {
    devices()
        .ok()?
        .into_iter()
        .find(|(n, _)| n == name)
        .map(|(_, number)| number)
}

/// Returns the `major:minor` of a device. Fails if the device does not exist.
fn number(name: &str) -> Result<String> {
    find(name).ok_or_else(|| {
        Error::new(Kind::Host, format!("device {name} does not exist")).hint("dmsetup ls")
    })
}

fn numbers(name: &str) -> Result<(u32, u32)> {
    let number = number(name)?;
    let parsed = number
        .split_once(':')
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.ok_or_else(|| {
        Error::new(
            Kind::Host,
            format!("device {name} has the malformed number {number:?}"),
        )
    })
}

/// Returns the name and the `major:minor` of every device-mapper device.
fn devices() -> Result<Vec<(String, String)>> {
    crate::locks::may_block("file access");
    let io = |e| Error::io(format!("list {SYS_BLOCK}"), e);
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(SYS_BLOCK).map_err(io)? {
        let dir = entry.map_err(io)?.path();
        // A device may be removed while the list is read.
        let read =
            |file: &str| std::fs::read_to_string(dir.join(file)).map(|s| s.trim_end().to_owned());
        if let (Ok(name), Ok(number)) = (read("dm/name"), read("dev")) {
            devices.push((name, number));
        }
    }
    Ok(devices)
}

/// Returns the size of an open block device in sectors.
fn sectors(mut device: &File) -> std::io::Result<u64> {
    Ok(device.seek(SeekFrom::End(0))? / SECTOR_BYTES)
}

fn create(name: &str, table: &str, is_readonly: bool) -> Command {
    let command = dmsetup(["create", "--noudevsync", "--noudevrules"]);
    let command = if is_readonly {
        command.arg("--readonly")
    } else {
        command
    };
    // A table of several lines has to come from stdin; an argument can have only one line.
    command.arg(name).stdin(table)
}

fn dmsetup<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    Command::new("dmsetup")
        .args(args)
        .deadline(DMSETUP_DEADLINE)
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    crate::locks::may_block("file access");
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn with_install_hint(e: Error) -> Error {
    match e.kind() {
        Kind::CommandMissing => e.hint("sudo apt-get install dmsetup"),
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn store_has_room_for_every_block() {
        for size in [4096, 1 << 20, 8 << 30, (8 << 30) + 4096] {
            let chunks = size / CHUNK_BYTES;
            let areas = chunks.div_ceil(EXCEPTIONS_PER_AREA);
            let needed = (1 + areas + chunks) * CHUNK_BYTES;
            let has = store_bytes(size);
            assert!(
                has >= needed && has < needed + 3 * (EXCEPTIONS_PER_AREA + 1) * CHUNK_BYTES,
                "{size}: {has} {needed}"
            );
        }
    }

    #[test]
    fn device_tables_are_formatted() {
        let text = snapshot_table(16, "7:0", "7:1") + &base_table(24, 16, "7:0");
        expect![[r#"
            0 16 snapshot 7:0 7:1 P 8
            0 16 linear 7:0 0
            16 8 zero
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn snapshot_status_is_parsed() {
        let used = |bytes| Some(("fc-1-2-3".to_owned(), Fill::Used { bytes }));
        assert_eq!(
            parse_status("fc-1-2-3: 0 131072 snapshot 8392/65536 48"),
            used(8392 * 512)
        );
        for word in ["Invalid", "Overflow", "Unknown"] {
            let lost = Some(("a".to_owned(), Fill::Lost(word.to_owned())));
            assert_eq!(parse_status(&format!("a: 0 131072 snapshot {word}")), lost);
        }
        for bad in ["", "No devices found", "a: 0 8 linear", "a: 0 8 snapshot"] {
            assert_eq!(parse_status(bad), None, "{bad}");
        }
    }

    #[test]
    fn space_is_reserved_ahead_but_not_past_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let file = File::create(&path).unwrap();
        size_store(&file, 1 << 20).unwrap();
        let len = store_bytes(1 << 20);
        reserve(&path, 0).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), len);
        assert!(
            meta.blocks() * SECTOR_BYTES >= len,
            "{} blocks",
            meta.blocks()
        );
        // The store grows with its disk and never shrinks.
        size_store(&file, 4096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len);
        size_store(&file, 2 << 30).unwrap();
        reserve(&path, 100 << 20).unwrap();
        let allocated = file.metadata().unwrap().blocks() * SECTOR_BYTES;
        assert!((356 << 20..400 << 20).contains(&allocated), "{allocated}");
    }
}
