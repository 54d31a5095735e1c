//! Mount options that forbid devices or programs, and where they apply.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The restrictions of the file system that holds a path (mount(8)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Device nodes cannot be opened.
    pub nodev: bool,
    /// Programs cannot be executed.
    pub noexec: bool,
}

impl Flags {
    /// Returns the options that are set, as mount(8) names them.
    pub fn names(self) -> Vec<&'static str> {
        [("nodev", self.nodev), ("noexec", self.noexec)]
            .into_iter()
            .filter(|(_, is_set)| *is_set)
            .map(|(name, _)| name)
            .collect()
    }
}

pub fn flags(path: &Path) -> std::io::Result<Flags> {
    crate::locks::may_block("file access");
    let set = rustix::fs::statvfs(path)?.f_flag;
    // rustix names only some of the flags of statvfs(3).
    let has = |flag: u64| set.bits() & flag != 0;
    Ok(Flags {
        nodev: has(nix::libc::ST_NODEV),
        noexec: has(nix::libc::ST_NOEXEC),
    })
}

/// Returns the highest ancestor of `path` on the same file system. Bind mounts within a file system
/// are not detected.
pub fn point(path: &Path) -> PathBuf {
    crate::locks::may_block("file access");
    let device = |p: &Path| std::fs::metadata(p).map(|m| m.dev()).ok();
    let own = device(path);
    path.ancestors()
        .take_while(|p| device(p) == own)
        .last()
        .unwrap_or(path)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_point_is_the_highest_directory_of_a_file_system() {
        assert_eq!(point(Path::new("/proc/self/status")), Path::new("/proc"));
        assert_eq!(point(Path::new("/")), Path::new("/"));
    }

    #[test]
    fn flags_are_named_as_mount_names_them() {
        assert_eq!(
            Flags {
                nodev: true,
                noexec: true
            }
            .names(),
            ["nodev", "noexec"]
        );
        assert_eq!(Flags::default().names(), [""; 0]);
        assert_eq!(flags(Path::new("/bin/sh")).unwrap(), Flags::default());
    }
}
