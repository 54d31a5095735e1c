//! Locates programs that the configuration names, and explains why one cannot be run.

use super::command::find_program;
use super::mount;
use crate::error::{Error, Kind, Result};
use rustix::fs::Access;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Returns the path of the program, which this process may execute.
///
/// # Errors
/// `command_missing` if it does not exist, and `unsupported`, with the cause and a hint, if it
/// cannot be executed.
pub fn locate(name: &Path) -> Result<PathBuf> {
    crate::locks::may_block("file access");
    let Some(path) = find_program(name) else {
        return Err(why_not(name).unwrap_or_else(|| {
            Error::new(
                Kind::CommandMissing,
                format!("{} is not installed", name.display()),
            )
            .hint("run fcctl doctor")
        }));
    };
    match rustix::fs::access(&path, Access::EXEC_OK) {
        Ok(()) => Ok(path),
        Err(e) => Err(why_not(&path).unwrap_or_else(|| {
            Error::io(format!("run {}", path.display()), std::io::Error::from(e))
        })),
    }
}

/// Returns why the program cannot be executed, or None if it does not exist.
fn why_not(path: &Path) -> Option<Error> {
    crate::locks::may_block("file access");
    let meta = std::fs::metadata(path).ok()?;
    let shown = path.display();
    let refused = |why: String, hint: String| {
        Some(Error::new(Kind::Unsupported, format!("run {shown}: {why}")).hint(hint))
    };
    if !meta.is_file() {
        return refused(
            "it is not a file".to_owned(),
            "name the program itself in the configuration".to_owned(),
        );
    }
    if mount::flags(path).is_ok_and(|flags| flags.noexec) {
        let at = mount::point(path);
        return refused(
            format!("{} is mounted noexec", at.display()),
            "install it on another file system".to_owned(),
        );
    }
    let mode = meta.permissions().mode() & 0o7777;
    refused(
        format!("it has mode {mode:04o}, which does not let fcd execute it"),
        format!("chmod a+x {shown}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_cannot_run_differs_from_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        assert_eq!(locate(&program).unwrap_err().kind(), Kind::CommandMissing);
        assert_eq!(
            locate(Path::new("no-such-program")).unwrap_err().kind(),
            Kind::CommandMissing
        );
        std::fs::write(&program, "#!/bin/sh\n").unwrap();
        let set =
            |mode| std::fs::set_permissions(&program, PermissionsExt::from_mode(mode)).unwrap();
        set(0o644);
        let e = locate(&program).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported && e.to_string().contains("mode 0644"),
            "{e}"
        );
        assert_eq!(
            e.hint_text(),
            Some(format!("chmod a+x {}", program.display()).as_str())
        );
        set(0o755);
        assert_eq!(locate(&program).unwrap(), program);
        let e = locate(dir.path()).unwrap_err();
        assert!(e.to_string().ends_with("it is not a file"), "{e}");
        // systemd mounts /proc noexec. Without systemd, the mode of this file has the same effect.
        let e = locate(Path::new("/proc/self/status")).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported && e.hint_text().is_some(),
            "{e}"
        );
    }
}
