//! Finds directories on the path to a file that other users cannot enter.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

/// The number of symbolic links that the kernel follows in one path (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// Returns the first directory on the path to `path` that users other than its owner and group
/// cannot enter, or None if there is none. Symbolic links are followed as the kernel does;
/// components that do not exist yet are ignored.
///
/// Access control lists are ignored: VMMs have thousands of uids, which no one lists in an ACL.
pub fn closed_to_others(path: &Path) -> Option<PathBuf> {
    crate::locks::may_block("file access");
    let mut todo: VecDeque<OsString> = components(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        let meta = std::fs::metadata(&at).ok()?;
        if meta.is_dir() && meta.permissions().mode() & 0o001 == 0 {
            return Some(at);
        }
        if name == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&name);
        let Ok(target) = std::fs::read_link(&next) else {
            at = next;
            continue;
        };
        links += 1;
        if links > LINKS_MAX {
            return None;
        }
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        for component in components(&target).into_iter().rev() {
            todo.push_front(component);
        }
    }
    None
}

/// Returns the hint for a state directory inside a closed directory.
pub fn state_dir_fix(closed: &dyn std::fmt::Display) -> String {
    format!(
        "start fcd with a state directory that every user may enter (state_dir, --state-dir or FCD_STATE_DIR; /var/lib/fcd by \
         default), or let every user enter this one: chmod o+x {closed}"
    )
}

fn components(path: &Path) -> VecDeque<OsString> {
    let named = path
        .components()
        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
    named.map(|c| c.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Creates the directory `shut` (mode 0700), which contains `state`, and the link `open/link`
    /// to `shut/state`.
    fn directories() -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        fs::set_permissions(&temp, fs::Permissions::from_mode(0o755)).unwrap();
        for dir in ["shut/state", "open"] {
            fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        fs::set_permissions(temp.path().join("open"), fs::Permissions::from_mode(0o711)).unwrap();
        fs::set_permissions(temp.path().join("shut"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("../shut/state", temp.path().join("open/link")).unwrap();
        symlink(temp.path().join("shut"), temp.path().join("open/absolute")).unwrap();
        symlink("loop", temp.path().join("open/loop")).unwrap();
        temp
    }

    #[test]
    fn closed_directory_is_found_on_every_kind_of_path() {
        let temp = directories();
        let check = |path: &str, expected: Option<&str>| {
            let found = closed_to_others(&temp.path().join(path));
            assert_eq!(found, expected.map(|dir| temp.path().join(dir)), "{path}");
        };
        check("open/new/deeper", None);
        check("open", None);
        // The last component may be closed. Its mode only matters for entries below it.
        check("shut", None);
        for path in [
            "shut/state",
            "shut/not/yet",
            "open/link",
            "open/link/vms",
            "open/absolute/state",
            "open/../shut/state",
        ] {
            check(path, Some("shut"));
        }
        check("open/loop/x", None);
    }
}
