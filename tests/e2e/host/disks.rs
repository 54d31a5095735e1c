//! A small file system that a test can fill or break.

use super::{run, wait_for};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A file system in a mount namespace of the calling thread and its children. It disappears when
/// they have all ended.
pub struct SmallDisk(PathBuf);

/// The size of the XFS file system. Its file is sparse, so only written blocks use space.
const XFS_BYTES: u64 = 2 << 30;

const EXT4_BYTES: u64 = 2 << 30;

impl SmallDisk {
    pub(super) fn in_memory(at: PathBuf, size_mib: u64) -> Self {
        Self::mount(
            at,
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size_mib}M,mode=711"),
                "fcd-test",
            ],
        )
    }

    pub(super) fn of_few_inodes(at: PathBuf, count: u64) -> Self {
        Self::mount(
            at,
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size=1G,nr_inodes={count},mode=711"),
                "fcd-test",
            ],
        )
    }

    pub(super) fn xfs(at: PathBuf) -> Self {
        let file = at.with_extension("xfs");
        fs::File::create(&file).unwrap().set_len(XFS_BYTES).unwrap();
        run(Command::new("mkfs.xfs")
            .args(["-q", "-m", "reflink=1"])
            .arg(&file));
        let mounted = Self::mount(at, &["-t", "xfs", "-o", "loop", file.to_str().unwrap()]);
        fs::set_permissions(&mounted.0, fs::Permissions::from_mode(0o711)).unwrap();
        mounted
    }

    pub(super) fn ext4(at: PathBuf) -> Self {
        let file = at.with_extension("ext4");
        fs::File::create(&file)
            .unwrap()
            .set_len(EXT4_BYTES)
            .unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
        let mounted = Self::mount(
            at,
            &[
                "-t",
                "ext4",
                "-o",
                "loop,errors=remount-ro",
                file.to_str().unwrap(),
            ],
        );
        fs::set_permissions(&mounted.0, fs::Permissions::from_mode(0o711)).unwrap();
        mounted
    }

    /// Triggers an error in the file system, which then becomes read-only, even for open files.
    pub fn break_ext4(&self) {
        let out = Command::new("findmnt")
            .args(["-no", "SOURCE"])
            .arg(&self.0)
            .output()
            .unwrap();
        let device = String::from_utf8(out.stdout).unwrap();
        let device = Path::new(device.trim()).file_name().unwrap().to_owned();
        fs::write(
            Path::new("/sys/fs/ext4")
                .join(device)
                .join("trigger_fs_error"),
            "1",
        )
        .unwrap();
    }

    /// Repairs the file system as an administrator would after a reboot.
    pub fn mend_ext4(&self) {
        // The processes that had files open on it have just been killed, so the first attempts may
        // fail.
        wait_for("the file system is unmounted", || {
            Command::new("umount")
                .arg(&self.0)
                .status()
                .unwrap()
                .success()
                .then_some(())
        });
        let file = self.0.with_extension("ext4");
        let status = Command::new("e2fsck")
            .args(["-f", "-y"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(
            matches!(status.unwrap().code(), Some(0 | 1)),
            "e2fsck(8): errors were corrected, or there were none"
        );
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .arg(&file)
            .arg(&self.0));
    }

    fn mount(at: PathBuf, args: &[&str]) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "mounting needs root: run the tests as root"
        );
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        run(Command::new("mount").args(["--make-rprivate", "/"]));
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(args).arg(&at));
        Self(at)
    }

    /// Fills the file system until only this much space is left.
    pub fn fill(&self, leave_bytes: u64) {
        let stat = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let free = stat.blocks_free() * stat.fragment_size();
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(self.0.join("fill"))
            .unwrap();
        let (from, more) = (
            file.metadata().unwrap().len(),
            free.saturating_sub(leave_bytes),
        );
        if more > 0 {
            nix::fcntl::posix_fallocate(&file, from as i64, more as i64).unwrap();
        }
    }

    /// Uses up all inodes.
    pub fn fill_inodes(&self) {
        let dir = self.0.join("inodes");
        fs::create_dir(&dir).unwrap();
        let made = (0..)
            .map(|n| fs::File::create(dir.join(format!("{n}"))))
            .find_map(Result::err)
            .unwrap();
        assert_eq!(made.kind(), std::io::ErrorKind::StorageFull);
    }

    pub fn free_inodes(&self) {
        fs::remove_dir_all(self.0.join("inodes")).unwrap();
    }

    /// Makes the file system read-only or writable.
    pub fn set_read_only(&self, is_so: bool) {
        run(Command::new("mount")
            .args(["-o", if is_so { "remount,ro" } else { "remount,rw" }])
            .arg(&self.0));
    }

    pub fn free(&self) {
        fs::remove_file(self.0.join("fill")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
