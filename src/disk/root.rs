//! Creates root disks from an image, and grows them.

use super::copy::{copy_sparse, share_or_copy};
use super::{Cloned, Draft, Method, ficlone, snapshot};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::{Command, Commands, Complaint, strerror};
use crate::locks::Cancel;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The guest's block size. A disk's size is a multiple of it.
pub const SIZE_UNIT_BYTES: u64 = 4096;
/// The deadline of `qemu-img`, which writes only metadata.
const QEMU_IMG_DEADLINE: Duration = Duration::from_secs(60);
/// The first bytes of a qcow2 file (docs/interop/qcow2.txt in QEMU).
pub(super) const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The root disk to create.
#[derive(Clone, Copy, Debug)]
pub struct RootSpec<'a> {
    pub method: Method,
    /// The absolute path of the image's raw file system.
    pub base: &'a Path,
    /// The absolute path of the disk, in the VM's own directory, which exists. An existing file is
    /// replaced. For a device-mapper snapshot, it is the path of the file with the changes.
    pub path: &'a Path,
    /// The virtual size, which is at least the base's and a multiple of [`SIZE_UNIT_BYTES`].
    pub size_bytes: u64,
    /// The uid and gid of the VMM, if the daemon is root.
    pub owner: Option<Credentials>,
}

/// Creates a root disk from an image. A crash never leaves a partly written disk at the path.
/// `progress` receives the bytes copied and their total, if the disk is a copy.
///
/// # Errors
/// `invalid_argument` for a size below the base's, `disk_full`, `host`, `command_missing`
/// (qemu-img), `cancelled`.
pub fn make_root(
    commands: &dyn Commands,
    spec: &RootSpec<'_>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = |e: Error| e.context(format!("create root disk {}", spec.path.display()));
    let base = File::open(spec.base)
        .map_err(|e| Error::io(format!("open image {}", spec.base.display()), e))
        .map_err(doing)?;
    let base_bytes = base
        .metadata()
        .map_err(|e| Error::io("read its size", e))
        .map_err(doing)?
        .len();
    check_size(base_bytes, spec.size_bytes).map_err(doing)?;
    let draft = Draft::new(spec.path)?;
    let origin = if spec.method.needs_image() {
        link_origin(spec.base, spec.path).map_err(doing)?
    } else {
        PathBuf::new()
    };
    let made = match spec.method {
        Method::Reflink => clone_file(&base, &draft.path, spec.size_bytes),
        Method::Qcow2 => {
            let command = create_qcow2(&origin, &draft.path, spec.size_bytes);
            let made = commands
                .run(&command, cancel, &mut |_| {})
                .map_err(with_qemu_img_hint);
            made.and_then(|_| set_private(&draft.path))
        }
        Method::DmSnapshot => new_file(&draft.path).and_then(|file| {
            snapshot::size_store(&file, spec.size_bytes)
                .map_err(|e| Error::io("allocate space for changes", e))
        }),
        Method::Copy => new_file(&draft.path).and_then(|file| {
            copy_sparse(&base, &file, cancel, progress)?;
            file.set_len(spec.size_bytes)
                .map_err(|e| Error::io("set its size", e))
        }),
    };
    // The kernel writes a snapshot's store; the VMM must not have access to it.
    let owner = spec.owner.filter(|_| spec.method != Method::DmSnapshot);
    made.and_then(|()| draft.publish(owner)).map_err(|e| {
        let _ = std::fs::remove_file(origin_path(spec.path));
        doing(e)
    })
}

/// A root disk to copy from an open file that somebody may change.
pub struct CopySpec<'a> {
    pub base: &'a File,
    /// The size of the base when it was last known to be unchanged.
    pub base_bytes: u64,
    /// See [`RootSpec::path`].
    pub path: &'a Path,
    /// See [`RootSpec::size_bytes`].
    pub size_bytes: u64,
    /// See [`RootSpec::owner`].
    pub owner: Option<Credentials>,
}

/// Creates a root disk that does not depend on its base. The disk is kept only if `is_same`, which
/// is called after the copy, confirms that the base has not changed. Returns the method: the disk
/// shares blocks with the base, or is a full copy.
pub fn copy_root(
    spec: &CopySpec<'_>,
    is_same: &dyn Fn() -> Result<()>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Method> {
    crate::locks::may_block("file access");
    let doing = |e: Error| e.context(format!("create root disk {}", spec.path.display()));
    check_size(spec.base_bytes, spec.size_bytes).map_err(doing)?;
    let draft = Draft::new(spec.path)?;
    let file = new_file(&draft.path).map_err(doing)?;
    let method = share_or_copy(spec.base, &file, cancel, progress).map_err(doing)?;
    is_same()?;
    file.set_len(spec.size_bytes)
        .map_err(|e| doing(Error::io("set its size", e)))?;
    draft.publish(spec.owner).map_err(doing)?;
    Ok(method)
}

/// Creates a hard link to the image's file in the VM's directory, so that deleting or rebuilding
/// the image does not affect the disk. Returns the image's own path if no hard link is possible,
/// for example because the image is on another file system.
pub(super) fn link_origin(base: &Path, disk: &Path) -> Result<PathBuf> {
    crate::locks::may_block("file access");
    use rustix::io::Errno;
    let origin = origin_path(disk);
    let io = |e: std::io::Error| {
        Error::io(
            format!("link {} to {}", origin.display(), base.display()),
            e,
        )
    };
    match std::fs::remove_file(&origin) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    match rustix::fs::link(base, &origin) {
        Ok(()) => Ok(origin),
        Err(Errno::XDEV | Errno::PERM | Errno::MLINK | Errno::OPNOTSUPP) => Ok(base.to_owned()),
        Err(e) => Err(io(e.into())),
    }
}

fn origin_path(disk: &Path) -> PathBuf {
    disk.with_file_name("origin")
}

/// Returns the file on which the disk at `path` is based: the hard link that [`make_root`] created,
/// or else `base`.
pub fn origin(path: &Path, base: &Path) -> PathBuf {
    crate::locks::may_block("file access");
    let origin = origin_path(path);
    if origin.exists() {
        origin
    } else {
        base.to_owned()
    }
}

/// Enlarges a disk. The VMM must not be running.
///
/// # Errors
/// `invalid_argument` if the size is smaller than the disk. An equal size is not an error.
pub fn grow(
    commands: &dyn Commands,
    path: &Path,
    method: Method,
    size_bytes: u64,
    cancel: &Cancel,
) -> Result<()> {
    crate::locks::may_block("file access");
    let doing = |e: Error| e.context(format!("grow disk {}", path.display()));
    let open = || {
        OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(|e| doing(Error::io("open it", e)))
    };
    if method == Method::DmSnapshot {
        return snapshot::size_store(&open()?, size_bytes)
            .map_err(|e| doing(Error::io("set its size", e)));
    }
    let now = disk_size(path, method).map_err(doing)?;
    check_size(now, size_bytes).map_err(doing)?;
    if now == size_bytes {
        return Ok(());
    }
    if method == Method::Qcow2 {
        return commands
            .run(&resize_qcow2(path, size_bytes), cancel, &mut |_| {})
            .map(drop)
            .map_err(|e| doing(with_qemu_img_hint(e)));
    }
    let file = open()?;
    file.set_len(size_bytes)
        .and_then(|()| file.sync_all())
        .map_err(|e| doing(Error::io("set its size", e)))
}

/// Returns the virtual size in bytes of a disk that is a file. Fails for a device-mapper snapshot.
pub fn disk_size(path: &Path, method: Method) -> Result<u64> {
    crate::locks::may_block("file access");
    let io = |e| Error::io(format!("read the size of {}", path.display()), e);
    let mut file = File::open(path).map_err(io)?;
    match method {
        Method::Reflink | Method::Copy => Ok(file.metadata().map_err(io)?.len()),
        Method::DmSnapshot => Err(Error::internal(format!(
            "{} is only part of a disk",
            path.display()
        ))),
        Method::Qcow2 => {
            let mut header = [0; 32];
            file.read_exact(&mut header).map_err(io)?;
            qcow2_size(&header).ok_or_else(|| {
                Error::new(
                    Kind::Host,
                    format!("{} is not a qcow2 file", path.display()),
                )
            })
        }
    }
}

fn clone_file(base: &File, path: &Path, size_bytes: u64) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("clone the image to {}", path.display()), e);
    let file = new_file(path)?;
    match ficlone(&file, base).map_err(io)? {
        Cloned::Yes => file.set_len(size_bytes).map_err(io),
        Cloned::No(why) => Err(Error::new(
            Kind::Unsupported,
            format!("clone the image to {}: {why}", path.display()),
        )
        .hint("set driver = \"auto\" under [disk] in the configuration, and see fcctl doctor")),
    }
}

pub(super) fn new_file(path: &Path) -> Result<File> {
    crate::locks::may_block("file access");
    let options = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .clone();
    options
        .open(path)
        .map_err(|e| Error::io(format!("create {}", path.display()), e))
}

fn check_size(now: u64, wanted: u64) -> Result<()> {
    if wanted < now {
        let text = format!("the disk cannot shrink from {now} to {wanted} bytes");
        return Err(
            Error::invalid(text).hint(format!("ask for at least {}M", now.div_ceil(1 << 20)))
        );
    }
    if !wanted.is_multiple_of(SIZE_UNIT_BYTES) {
        return Err(Error::invalid(format!(
            "disk size {wanted} is not a multiple of {SIZE_UNIT_BYTES} bytes"
        )));
    }
    Ok(())
}

fn set_private(path: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| Error::io(format!("set the mode of {}", path.display()), e))
}

/// Returns the disk's size, which is in bytes 24 to 31 of the header, big-endian
/// (docs/interop/qcow2.txt in QEMU). Returns None if this is not the header of a qcow2 file.
fn qcow2_size(header: &[u8; 32]) -> Option<u64> {
    if header[..4] != QCOW2_MAGIC {
        return None;
    }
    Some(u64::from_be_bytes(
        header[24..32].try_into().expect("eight bytes"),
    ))
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

/// Builds the command that changes only the name of the backing file.
pub(super) fn rebase_qcow2(base: &Path, path: &Path) -> Command {
    Command::new("qemu-img")
        .args(["rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .arg(path)
        .deadline(QEMU_IMG_DEADLINE)
}

pub(super) fn with_qemu_img_hint(e: Error) -> Error {
    match e.kind() {
        Kind::CommandMissing => e.hint("sudo apt-get install qemu-utils"),
        // qemu-img exits with status 1 after every failure and prints the text of `strerror` (QEMU
        // 7.2).
        Kind::CommandFailed if strerror::says_disk_full(Complaint::of(&e)) => e
            .with_kind(Kind::DiskFull)
            .hint("free some space (df -h), then try again"),
        _ => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::probe;
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
        let words: Vec<_> = std::iter::once(&command.program)
            .chain(&command.args)
            .map(|a| a.to_string_lossy())
            .collect();
        expected.assert_eq(&words.join(" "));
    }

    #[test]
    fn argv() {
        let create = create_qcow2(Path::new("/i/rootfs.ext4"), Path::new("/v/.disk.new"), 8192);
        check(
            &create,
            expect!["qemu-img create -q -f qcow2 -F raw -b /i/rootfs.ext4 /v/.disk.new 8192"],
        );
        check(
            &rebase_qcow2(Path::new("/v/origin"), Path::new("/v/.disk.new")),
            expect!["qemu-img rebase -q -u -f qcow2 -F raw -b /v/origin /v/.disk.new"],
        );
        check(
            &resize_qcow2(Path::new("/v/disk"), 12288),
            expect!["qemu-img resize -q -f qcow2 /v/disk 12288"],
        );
    }

    fn spec<'a>(method: Method, base: &'a Path, path: &'a Path, size_bytes: u64) -> RootSpec<'a> {
        RootSpec {
            method,
            base,
            path,
            size_bytes,
            owner: None,
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn disk_grows_and_never_shrinks() {
        let best = probe(tempfile::tempdir().unwrap().path(), None, true)
            .unwrap()
            .method;
        for method in [best, Method::Qcow2, Method::Copy] {
            let dir = tempfile::tempdir().unwrap();
            let (base, path) = (base(dir.path()), dir.path().join("disk"));
            let uid = nix::unistd::getuid().as_raw();
            let owner = Some(Credentials {
                uid,
                gid: nix::unistd::getgid().as_raw(),
            });
            let spec = RootSpec {
                owner,
                ..spec(method, &base, &path, 1 << 20)
            };
            make_root(&HostCommands, &spec, &cancel(), &mut |_, _| {}).unwrap();
            assert_eq!(disk_size(&path, method).unwrap(), 1 << 20);
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(
                (meta.permissions().mode() & 0o777, meta.uid()),
                (0o600, uid)
            );

            for _ in 0..2 {
                grow(&HostCommands, &path, method, 2 << 20, &cancel()).unwrap();
            }
            assert_eq!(disk_size(&path, method).unwrap(), 2 << 20);
            let e = grow(&HostCommands, &path, method, 1 << 20, &cancel()).unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidArgument);
            let all = if method.needs_image() {
                &["base", "disk", "origin"][..]
            } else {
                &["base", "disk"]
            };
            assert_eq!(names(dir.path()), all, "{method:?}");
        }
    }

    /// Deleting or rebuilding an image must not affect the VMs that are based on it.
    #[test]
    fn disk_survives_deletion_of_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        make_root(
            &HostCommands,
            &spec(Method::Qcow2, &base, &path, 8192),
            &cancel(),
            &mut |_, _| {},
        )
        .unwrap();
        std::fs::remove_file(&base).unwrap();
        std::fs::write(&base, vec![8u8; 8192]).unwrap();
        let raw = dir.path().join("raw");
        let convert = Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .arg(&path)
            .arg(&raw);
        HostCommands.run(&convert, &cancel(), &mut |_| {}).unwrap();
        assert_eq!(std::fs::read(raw).unwrap(), vec![7u8; 8192]);
        assert_eq!(
            std::fs::read(origin(&path, &base)).unwrap(),
            vec![7u8; 8192]
        );
    }

    #[test]
    fn snapshot_store_has_room_for_the_whole_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("changes"));
        make_root(
            &HostCommands,
            &spec(Method::DmSnapshot, &base, &path, 8192),
            &cancel(),
            &mut |_, _| {},
        )
        .unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            snapshot::store_bytes(8192)
        );
        grow(&HostCommands, &path, Method::DmSnapshot, 1 << 30, &cancel()).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            snapshot::store_bytes(1 << 30)
        );
    }

    #[test]
    fn raw_disk_grows_by_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        grow(&HostCommands, &path, Method::Reflink, 1 << 20, &cancel()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
        assert_eq!(std::fs::read(&path).unwrap()[..8192], vec![7u8; 8192]);
    }

    #[test]
    fn disk_smaller_than_its_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        let e = make_root(
            &HostCommands,
            &spec(Method::Copy, &base, &path, 4096),
            &cancel(),
            &mut |_, _| {},
        )
        .unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn cancelled_or_failed_command_leaves_no_file() {
        struct Fails;
        impl Commands for Fails {
            fn run(
                &self,
                command: &Command,
                _: &Cancel,
                _: &mut dyn FnMut(&str),
            ) -> Result<crate::host::Output> {
                std::fs::write(&command.args[command.args.len() - 2], "half").unwrap();
                Err(
                    Error::new(Kind::CommandFailed, "qemu-img failed with status 1")
                        .with_source(Complaint("No space left on device".to_owned())),
                )
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (base(dir.path()), dir.path().join("disk"));
        let spec = spec(Method::Qcow2, &base, &path, 8192);
        assert_eq!(
            make_root(&Fails, &spec, &cancel(), &mut |_, _| {})
                .unwrap_err()
                .kind(),
            Kind::DiskFull
        );
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn qcow2_size_is_read_from_the_header() {
        let mut header = [0; 32];
        assert_eq!(qcow2_size(&header), None);
        header[..4].copy_from_slice(&QCOW2_MAGIC);
        header[24..].copy_from_slice(&(5u64 << 30).to_be_bytes());
        assert_eq!(qcow2_size(&header), Some(5 << 30));
    }
}
