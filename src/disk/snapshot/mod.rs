//! Root disks by device-mapper: a snapshot device whose origin is the image and whose changes go into a sparse file (Linux,
//! Documentation/admin-guide/device-mapper/snapshot.rst).
//!
//! The device is there while the VM runs; between two starts a VM has the file alone. Devices carry the VM's tag as their
//! name, which finds them again; their loop devices end with them. The VMM opens a node of its own in the VM's directory, so that
//! nothing depends on what udev makes of the device, and udev is asked to leave it alone: what is on it is a guest's.
//!
//! A snapshot that runs out of room for its changes is lost as a whole. So its file is large enough for every block of the disk, and
//! the room for what the guest writes next is allocated ahead ([`reserve`]): a full host is seen before the guest loses anything.

mod loop_device;

use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// One chunk: the guest's block size. In sectors, as the table takes it, and in bytes.
const CHUNK_SECTORS: u64 = 8;
const CHUNK_BYTES: u64 = CHUNK_SECTORS * SECTOR_BYTES;
const SECTOR_BYTES: u64 = 512;
/// Of a persistent store: 16 bytes each, one chunk of them before the chunks that they describe (dm-snap-persistent.c).
const EXCEPTIONS_PER_AREA: u64 = CHUNK_BYTES / 16;
/// Allocated ahead of what the guest has written.
pub const AHEAD_BYTES: u64 = 256 << 20;
/// What makes an image shorter than the disk as long as it.
const BASE_SUFFIX: &str = "-base";
const DMSETUP_DEADLINE: Duration = Duration::from_secs(30);
/// udev, or whoever looks at new devices, may hold one for a moment.
const BUSY_DEADLINE: Duration = Duration::from_secs(10);
const BUSY_PERIOD: Duration = Duration::from_millis(50);
const CONTROL: &str = "/dev/mapper/control";
const SYS_BLOCK: &str = "/sys/block";

/// A device to make.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec<'a> {
    /// Characters of a VM's tag only; no device of this name is there.
    pub name: &'a str,
    /// The image's file system, raw.
    pub origin: &'a Path,
    /// Where changes go: made by [`make_store`].
    pub store: &'a Path,
    /// Of the disk.
    pub size_bytes: u64,
    /// The node for the VMM; replaced if there is one.
    pub node: &'a Path,
    /// uid and gid of the VMM.
    pub owner: Option<(u32, u32)>,
}

/// How full a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fill {
    /// So much of its file is in use.
    Used { bytes: u64 },
    /// It has lost changes: the guest sees errors, and it cannot be used again. What the kernel says.
    Lost(String),
}

/// The size of a file that holds every block of a disk of `size_bytes`, and what says which they are.
pub fn store_bytes(size_bytes: u64) -> u64 {
    let chunks = size_bytes.div_ceil(CHUNK_BYTES);
    let areas = chunks.div_ceil(EXCEPTIONS_PER_AREA) + 1;
    // The header is one chunk, each area one chunk and what it describes.
    (1 + areas * (1 + EXCEPTIONS_PER_AREA)) * CHUNK_BYTES
}

/// Makes an empty store at `path`, or lets one grow with its disk.
pub fn size_store(file: &File, size_bytes: u64) -> std::io::Result<()> {
    let wanted = store_bytes(size_bytes);
    if file.metadata()?.len() < wanted {
        file.set_len(wanted)?;
        file.sync_all()?;
    }
    Ok(())
}

/// Allocates what the guest may write next. Nothing is allocated twice, nothing shrinks.
///
/// # Errors
/// `disk_full`: the host has no room for it. Nothing was lost yet.
pub fn reserve(store: &Path, used_bytes: u64) -> Result<()> {
    let doing = |e: std::io::Error| Error::io(format!("make room for the changes of a guest in {}", store.display()), e);
    let file = OpenOptions::new().write(true).open(store).map_err(doing)?;
    let wanted = used_bytes.saturating_add(AHEAD_BYTES).min(file.metadata().map_err(doing)?.len());
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, wanted) {
        Ok(()) => Ok(()),
        // A file system that cannot: its free room has to do.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => has_room(&file).map_err(doing),
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

/// Brings everything that a guest has written to the device into its file.
pub fn flush(node: &Path) -> Result<()> {
    let device = crate::host::fs::open_nofollow(node)?;
    device.sync_all().map_err(|e| Error::io(format!("write back {}", node.display()), e))
}

/// Makes the device and its node.
///
/// Errors: `disk_full` where the host has no room for the guest's first writes; `command_missing` (dmsetup). After an error nothing
/// is left.
pub fn activate(commands: &dyn Commands, spec: &DeviceSpec<'_>, cancel: &Cancel) -> Result<()> {
    let doing = |e: Error| e.context(format!("make snapshot device {}", spec.name));
    reserve(spec.store, 0).map_err(doing)?;
    let made = make_devices(commands, spec, cancel).and_then(|()| make_node(spec));
    made.map_err(|e| {
        let undone = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e));
        if let Err(left) = undone.and_then(|cancel| deactivate(commands, spec.name, None, &cancel)) {
            log::warn!("{left}");
        }
        doing(e)
    })
}

fn make_devices(commands: &dyn Commands, spec: &DeviceSpec<'_>, cancel: &Cancel) -> Result<()> {
    // Both end with this function unless a device has taken them.
    let origin = loop_device::attach(spec.origin, true)?;
    let store = loop_device::attach(spec.store, false)?;
    let (size, origin_size) = (spec.size_bytes / SECTOR_BYTES, origin.sectors()?);
    let run = |command| commands.run(&command, cancel, &mut |_| {}).map(drop).map_err(mend);
    if size <= origin_size {
        return run(create(spec.name, &snapshot_table(size, &origin.number, &store.number), false));
    }
    let base = format!("{}{BASE_SUFFIX}", spec.name);
    run(create(&base, &base_table(size, origin_size, &origin.number), true))?;
    run(create(spec.name, &snapshot_table(size, &number(&base)?, &store.number), false))
}

fn snapshot_table(size: u64, origin: &str, store: &str) -> String {
    format!("0 {size} snapshot {origin} {store} P {CHUNK_SECTORS}\n")
}

fn base_table(size: u64, origin_size: u64, origin: &str) -> String {
    format!("0 {origin_size} linear {origin} 0\n{origin_size} {} zero\n", size - origin_size)
}

/// The guest's disk at a path of its own, for one uid.
fn make_node(spec: &DeviceSpec<'_>) -> Result<()> {
    let io = |e: std::io::Error| Error::io(format!("make node {}", spec.node.display()), e);
    let (major, minor) = numbers(spec.name)?;
    remove_file(spec.node).map_err(io)?;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let kind = rustix::fs::FileType::BlockDevice;
    rustix::fs::mknodat(rustix::fs::CWD, spec.node, kind, mode, rustix::fs::makedev(major, minor)).map_err(|e| io(e.into()))?;
    if let Some((uid, gid)) = spec.owner {
        std::os::unix::fs::lchown(spec.node, Some(uid), Some(gid)).map_err(io)?;
    }
    Ok(())
}

/// Removes the device, and `node` where it is this device's. Nothing there is ok.
pub fn deactivate(commands: &dyn Commands, name: &str, node: Option<&Path>, cancel: &Cancel) -> Result<()> {
    if let (Some(node), Ok((major, minor))) = (node, numbers(name))
        && is_node_of(node, rustix::fs::makedev(major, minor))
    {
        remove_file(node).map_err(|e| Error::io(format!("remove {}", node.display()), e))?;
    }
    remove(commands, name, cancel)?;
    remove(commands, &format!("{name}{BASE_SUFFIX}"), cancel)
}

fn is_node_of(node: &Path, rdev: u64) -> bool {
    std::fs::symlink_metadata(node).is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == rdev)
}

/// Tried again while somebody has it open, for a while.
fn remove(commands: &dyn Commands, name: &str, cancel: &Cancel) -> Result<()> {
    let deadline = Instant::now() + BUSY_DEADLINE;
    while find(name).is_some() {
        let command = dmsetup(["remove", "--noudevsync", name]);
        match commands.run(&command, cancel, &mut |_| {}).map_err(mend) {
            Ok(_) => {}
            Err(e) if is_busy(&e) && Instant::now() < deadline && !cancel.is_cancelled() => {
                crate::host::wait::sleep(BUSY_PERIOD, cancel).map_err(|e| Error::io(format!("remove {name}"), e))?;
            }
            Err(_) if find(name).is_none() => {}
            Err(e) => return Err(e.context(format!("remove snapshot device {name}"))),
        }
    }
    Ok(())
}

fn is_busy(e: &Error) -> bool {
    e.kind() == Kind::CommandFailed && e.to_string().contains("Device or resource busy")
}

/// Names of the devices that begin with `prefix`, whoever made them; each once, however many stand behind it.
pub fn list(prefix: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = devices()?.into_iter().map(|(name, _)| name).filter(|n| n.starts_with(prefix)).collect();
    for name in &mut names {
        name.truncate(name.strip_suffix(BASE_SUFFIX).map_or(name.len(), str::len));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// How full each snapshot is whose name begins with `prefix`.
pub fn fill(commands: &dyn Commands, prefix: &str, cancel: &Cancel) -> Result<Vec<(String, Fill)>> {
    let out = commands.run(&dmsetup(["status", "--target", "snapshot"]), cancel, &mut |_| {}).map_err(mend)?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text.lines().filter_map(parse_status).filter(|(name, _)| name.starts_with(prefix)).collect())
}

/// `NAME: 0 131072 snapshot 8392/65536 48`, or a word instead of the numbers.
fn parse_status(line: &str) -> Option<(String, Fill)> {
    let (name, rest) = line.split_once(": ")?;
    let state = rest.split_whitespace().skip_while(|w| *w != "snapshot").nth(1)?;
    let fill = match state.split_once('/').and_then(|(used, _)| used.parse::<u64>().ok()) {
        Some(sectors) => Fill::Used { bytes: sectors * SECTOR_BYTES },
        None => Fill::Lost(state.to_owned()),
    };
    Some((name.to_owned(), fill))
}

/// Whether this host can, and if not why.
pub fn probe(dir: &Path) -> std::result::Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("device-mapper is root's".to_owned());
    }
    OpenOptions::new().read(true).write(true).open(CONTROL).map_err(|e| format!("{CONTROL}: {e}"))?;
    let loops = "/dev/loop-control";
    OpenOptions::new().read(true).write(true).open(loops).map_err(|e| format!("{loops}: {e}"))?;
    let space = rustix::fs::statvfs(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    if space.f_flag.contains(rustix::fs::StatVfsMountFlags::NODEV) {
        return Err(format!("{} is mounted nodev", dir.display()));
    }
    Ok(())
}

fn find(name: &str) -> Option<String> {
    devices().ok()?.into_iter().find(|(n, _)| n == name).map(|(_, number)| number)
}

/// `major:minor` of a device.
fn number(name: &str) -> Result<String> {
    find(name).ok_or_else(|| Error::new(Kind::Host, format!("device {name} is not there")).hint("dmsetup ls"))
}

fn numbers(name: &str) -> Result<(u32, u32)> {
    let number = number(name)?;
    let parsed = number.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.ok_or_else(|| Error::new(Kind::Host, format!("device {name} has the number {number:?}")))
}

/// Name and number of every device of device-mapper.
fn devices() -> Result<Vec<(String, String)>> {
    let io = |e| Error::io(format!("list {SYS_BLOCK}"), e);
    let mut devices = Vec::new();
    for entry in std::fs::read_dir(SYS_BLOCK).map_err(io)? {
        let dir = entry.map_err(io)?.path();
        // One may go while the list is read.
        let read = |file: &str| std::fs::read_to_string(dir.join(file)).map(|s| s.trim_end().to_owned());
        if let (Ok(name), Ok(number)) = (read("dm/name"), read("dev")) {
            devices.push((name, number));
        }
    }
    Ok(devices)
}

/// The size of an open block device.
fn sectors(mut device: &File) -> std::io::Result<u64> {
    Ok(device.seek(SeekFrom::End(0))? / SECTOR_BYTES)
}

fn create(name: &str, table: &str, is_readonly: bool) -> Command {
    let command = dmsetup(["create", "--noudevsync", "--noudevrules"]);
    let command = if is_readonly { command.arg("--readonly") } else { command };
    // The table has several lines, which only a file may.
    command.arg(name).stdin(table)
}

fn dmsetup<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    Command::new("dmsetup").args(args).deadline(DMSETUP_DEADLINE)
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn mend(e: Error) -> Error {
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
    fn a_store_holds_every_block_of_its_disk() {
        for size in [4096, 1 << 20, 8 << 30, (8 << 30) + 4096] {
            let chunks = size / CHUNK_BYTES;
            let areas = chunks.div_ceil(EXCEPTIONS_PER_AREA);
            let needed = (1 + areas + chunks) * CHUNK_BYTES;
            let has = store_bytes(size);
            assert!(has >= needed && has < needed + 3 * (EXCEPTIONS_PER_AREA + 1) * CHUNK_BYTES, "{size}: {has} {needed}");
        }
    }

    #[test]
    fn tables() {
        let text = snapshot_table(16, "7:0", "7:1") + &base_table(24, 16, "7:0");
        expect![[r#"
            0 16 snapshot 7:0 7:1 P 8
            0 16 linear 7:0 0
            16 8 zero
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn what_the_kernel_says_of_a_snapshot() {
        let used = |bytes| Some(("fc-1-2-3".to_owned(), Fill::Used { bytes }));
        assert_eq!(parse_status("fc-1-2-3: 0 131072 snapshot 8392/65536 48"), used(8392 * 512));
        for word in ["Invalid", "Overflow", "Unknown"] {
            let lost = Some(("a".to_owned(), Fill::Lost(word.to_owned())));
            assert_eq!(parse_status(&format!("a: 0 131072 snapshot {word}")), lost);
        }
        for bad in ["", "No devices found", "a: 0 8 linear", "a: 0 8 snapshot"] {
            assert_eq!(parse_status(bad), None, "{bad}");
        }
    }

    #[test]
    fn room_is_allocated_ahead_and_not_past_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let file = File::create(&path).unwrap();
        size_store(&file, 1 << 20).unwrap();
        let len = store_bytes(1 << 20);
        reserve(&path, 0).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), len);
        assert!(meta.blocks() * SECTOR_BYTES >= len, "{} blocks", meta.blocks());
        // It grows with its disk, and shrinks never.
        size_store(&file, 4096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), len);
        size_store(&file, 2 << 30).unwrap();
        reserve(&path, 100 << 20).unwrap();
        let allocated = file.metadata().unwrap().blocks() * SECTOR_BYTES;
        assert!((356 << 20..400 << 20).contains(&allocated), "{allocated}");
    }
}
