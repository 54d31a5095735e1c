//! Root disks: reflink or qcow2, and their growth.

use super::Draft;
use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A disk's size is a multiple of this: the guest's block size.
pub const SIZE_UNIT_BYTES: u64 = 4096;
/// `qemu-img` writes some metadata, no data.
const QEMU_IMG_DEADLINE: Duration = Duration::from_secs(60);
/// "QFI\xfb": a qcow2 file begins with it (QEMU, docs/interop/qcow2.txt).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How a root disk shares the image's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A raw file that shares extents (FICLONE); independent of the image's file.
    Reflink,
    /// A qcow2 file with the image's file behind it, which must stay as it is.
    Qcow2,
}

impl Method {
    pub const fn name(self) -> &'static str {
        match self {
            Method::Reflink => "reflink",
            Method::Qcow2 => "qcow2",
        }
    }
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct RootSpec<'a> {
    /// The image's file system, raw; absolute.
    pub base: &'a Path,
    /// Where the disk goes; absolute, in a directory that exists. Replaced if there is one.
    pub path: &'a Path,
    /// Virtual size: at least the base's, a multiple of [`SIZE_UNIT_BYTES`].
    pub size_bytes: u64,
    /// uid and gid of the VMM, when the daemon is root.
    pub owner: Option<(u32, u32)>,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootDisk {
    pub path: PathBuf,
    pub method: Method,
    pub size_bytes: u64,
}

/// What a directory's file system can, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    pub method: Method,
    /// For people: `ext4 cannot share blocks between files (operation not supported)`.
    pub reason: String,
}

/// Makes a root disk from an image: whole and synced, or not at all.
///
/// Errors: `invalid_argument` for a size below the base's, `disk_full`, `host`, `command_missing` (qemu-img).
pub fn make_root(commands: &dyn Commands, spec: &RootSpec<'_>, cancel: &Cancel) -> Result<RootDisk> {
    let doing = |e: Error| e.context(format!("make root disk {}", spec.path.display()));
    let base = File::open(spec.base).map_err(|e| Error::io(format!("open image {}", spec.base.display()), e)).map_err(doing)?;
    let base_bytes = base.metadata().map_err(|e| Error::io("read its size", e)).map_err(doing)?.len();
    check_size(base_bytes, spec.size_bytes).map_err(doing)?;
    let draft = Draft::new(spec.path)?;
    let method = match clone_file(&base, &draft.path, spec.size_bytes).map_err(doing)? {
        Cloned::Yes => Method::Reflink,
        Cloned::No(_) => {
            let command = create_qcow2(spec.base, &draft.path, spec.size_bytes);
            commands.run(&command, cancel, &mut |_| {}).map_err(|e| doing(mend_qemu_img(e)))?;
            set_private(&draft.path).map_err(doing)?;
            Method::Qcow2
        }
    };
    draft.publish(spec.owner)?;
    Ok(RootDisk { path: spec.path.to_owned(), method, size_bytes: spec.size_bytes })
}

/// Makes a disk larger; the VMM must not run. The same size is no error, a smaller one is `invalid_argument`.
pub fn grow(commands: &dyn Commands, path: &Path, method: Method, size_bytes: u64, cancel: &Cancel) -> Result<()> {
    let doing = |e: Error| e.context(format!("grow disk {}", path.display()));
    let now = disk_size(path, method).map_err(doing)?;
    check_size(now, size_bytes).map_err(doing)?;
    if now == size_bytes {
        return Ok(());
    }
    match method {
        Method::Reflink => {
            let file = OpenOptions::new().write(true).open(path).map_err(|e| doing(Error::io("open it", e)))?;
            file.set_len(size_bytes).and_then(|()| file.sync_all()).map_err(|e| doing(Error::io("set its size", e)))
        }
        Method::Qcow2 => {
            commands.run(&resize_qcow2(path, size_bytes), cancel, &mut |_| {}).map(drop).map_err(|e| doing(mend_qemu_img(e)))
        }
    }
}

/// The virtual size of a disk, in bytes.
pub fn disk_size(path: &Path, method: Method) -> Result<u64> {
    let io = |e| Error::io(format!("read the size of {}", path.display()), e);
    let mut file = File::open(path).map_err(io)?;
    match method {
        Method::Reflink => Ok(file.metadata().map_err(io)?.len()),
        Method::Qcow2 => {
            let mut header = [0; 32];
            file.read_exact(&mut header).map_err(io)?;
            qcow2_size(&header).ok_or_else(|| Error::new(Kind::Host, format!("{} is not a qcow2 file", path.display())))
        }
    }
}

/// Finds out what `dir` can by trying it on two small files.
pub fn probe(dir: &Path) -> Result<Probe> {
    let io = |e: std::io::Error| Error::io(format!("probe {}", dir.display()), e);
    let source = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    source.as_file().set_len(SIZE_UNIT_BYTES).map_err(io)?;
    let target = tempfile::NamedTempFile::new_in(dir).map_err(io)?;
    Ok(match ficlone(target.as_file(), source.as_file()).map_err(io)? {
        Cloned::Yes => Probe { method: Method::Reflink, reason: "the file system shares blocks between files".to_owned() },
        Cloned::No(why) => Probe { method: Method::Qcow2, reason: format!("the file system cannot share blocks ({why})") },
    })
}

enum Cloned {
    Yes,
    /// With what the kernel said.
    No(String),
}

fn clone_file(base: &File, path: &Path, size_bytes: u64) -> Result<Cloned> {
    let io = |e: std::io::Error| Error::io(format!("clone the image to {}", path.display()), e);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
    let cloned = ficlone(&file, base).map_err(io)?;
    match cloned {
        Cloned::Yes => file.set_len(size_bytes).map_err(io)?,
        Cloned::No(_) => std::fs::remove_file(path).map_err(io)?,
    }
    Ok(cloned)
}

/// ioctl_ficlone(2): these errors say "not here"; any other is a real one.
fn ficlone(target: &File, source: &File) -> std::io::Result<Cloned> {
    use rustix::io::Errno;
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(Cloned::Yes),
        Err(e @ (Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS)) => {
            Ok(Cloned::No(e.to_string().to_lowercase()))
        }
        Err(e) => Err(e.into()),
    }
}

fn check_size(now: u64, wanted: u64) -> Result<()> {
    if wanted < now {
        let text = format!("{wanted} bytes are fewer than the {now} bytes it has; a disk cannot shrink");
        return Err(Error::invalid(text).hint(format!("ask for at least {}M", now.div_ceil(1 << 20))));
    }
    if !wanted.is_multiple_of(SIZE_UNIT_BYTES) {
        return Err(Error::invalid(format!("disk size {wanted} is not a multiple of {SIZE_UNIT_BYTES} bytes")));
    }
    Ok(())
}

fn set_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| Error::io(format!("set the mode of {}", path.display()), e))
}

/// Bytes 24 to 31 of the header, big-endian (QEMU, docs/interop/qcow2.txt).
fn qcow2_size(header: &[u8; 32]) -> Option<u64> {
    if header[..4] != QCOW2_MAGIC {
        return None;
    }
    Some(u64::from_be_bytes(header[24..32].try_into().expect("eight bytes")))
}

fn create_qcow2(base: &Path, path: &Path, size_bytes: u64) -> Command {
    Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .arg(path)
        .arg(size_bytes.to_string())
        .deadline(QEMU_IMG_DEADLINE)
}

fn resize_qcow2(path: &Path, size_bytes: u64) -> Command {
    Command::new("qemu-img")
        .args(["resize", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size_bytes.to_string())
        .deadline(QEMU_IMG_DEADLINE)
}

fn mend_qemu_img(e: Error) -> Error {
    match e.kind() {
        Kind::CommandMissing => e.hint("sudo apt-get install qemu-utils"),
        Kind::CommandFailed if e.message().contains("No space left on device") => {
            e.with_kind(Kind::DiskFull).hint("free some space (df -h), then try again")
        }
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::HostCommands;
    use expect_test::{Expect, expect};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    fn cancel() -> Cancel {
        Cancel::try_new().unwrap()
    }

    fn base(dir: &Path) -> PathBuf {
        let path = dir.join("base");
        std::fs::write(&path, vec![7u8; 8192]).unwrap();
        path
    }

    #[track_caller]
    fn check(command: &Command, expected: Expect) {
        let words: Vec<_> = std::iter::once(&command.program).chain(&command.args).map(|a| a.to_string_lossy()).collect();
        expected.assert_eq(&words.join(" "));
    }

    #[test]
    fn argv() {
        let create = create_qcow2(Path::new("/i/rootfs.ext4"), Path::new("/v/.disk.new"), 8192);
        check(&create, expect!["qemu-img create -q -f qcow2 -F raw -b /i/rootfs.ext4 /v/.disk.new 8192"]);
        check(&resize_qcow2(Path::new("/v/disk"), 12288), expect!["qemu-img resize -q -f qcow2 /v/disk 12288"]);
    }

    #[test]
    fn a_disk_is_made_and_grows_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        let uid = nix::unistd::getuid().as_raw();
        let spec = RootSpec { base: &base, path: &path, size_bytes: 1 << 20, owner: Some((uid, nix::unistd::getgid().as_raw())) };
        let disk = make_root(&HostCommands, &spec, &cancel()).unwrap();
        assert_eq!(disk.method, probe(dir.path()).unwrap().method);
        assert_eq!(disk_size(&path, disk.method).unwrap(), 1 << 20);
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.permissions().mode() & 0o777, meta.uid()), (0o600, uid));

        grow(&HostCommands, &path, disk.method, 2 << 20, &cancel()).unwrap();
        grow(&HostCommands, &path, disk.method, 2 << 20, &cancel()).unwrap();
        assert_eq!(disk_size(&path, disk.method).unwrap(), 2 << 20);
        let e = grow(&HostCommands, &path, disk.method, 1 << 20, &cancel()).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
        let names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn a_raw_disk_grows_by_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        grow(&HostCommands, &path, Method::Reflink, 1 << 20, &cancel()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
        assert_eq!(std::fs::read(&path).unwrap()[..8192], vec![7u8; 8192]);
    }

    #[test]
    fn a_disk_smaller_than_its_image_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        let spec = RootSpec { base: &base, path: &path, size_bytes: 4096, owner: None };
        let e = make_root(&HostCommands, &spec, &cancel()).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_cancelled_or_failed_command_leaves_nothing() {
        struct Fails;
        impl Commands for Fails {
            fn run(&self, command: &Command, _: &Cancel, _: &mut dyn FnMut(&str)) -> Result<crate::host::Output> {
                std::fs::write(&command.args[command.args.len() - 2], "half").unwrap();
                Err(Error::new(Kind::CommandFailed, "qemu-img failed with status 1: No space left on device"))
            }
        }
        let dir = tempfile::tempdir().unwrap();
        if probe(dir.path()).unwrap().method == Method::Reflink {
            return; // No command is run on such a file system.
        }
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        let spec = RootSpec { base: &base, path: &path, size_bytes: 8192, owner: None };
        assert_eq!(make_root(&Fails, &spec, &cancel()).unwrap_err().kind(), Kind::DiskFull);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn the_header_of_a_qcow2_file_tells_its_size() {
        let mut header = [0; 32];
        assert_eq!(qcow2_size(&header), None);
        header[..4].copy_from_slice(&QCOW2_MAGIC);
        header[24..].copy_from_slice(&(5u64 << 30).to_be_bytes());
        assert_eq!(qcow2_size(&header), Some(5 << 30));
    }
}
