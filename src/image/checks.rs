//! Checks that the host can build images, before a build and for `doctor`.

use crate::api::daemon::{Check, Severity};
use crate::error::{Error, Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The number of subordinate uids and gids that a user namespace needs for the accounts of a
/// distribution, up to `nobody`.
const SUBIDS_MIN: u64 = 65_535;
const NAMESPACE_DEADLINE: Duration = Duration::from_secs(10);
/// The programs that a build needs and their packages.
const PROGRAMS: [(&str, &str); 5] = [
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("lz4", "lz4"),
];
const NEWUIDMAP: (&str, &str) = ("newuidmap", "uidmap");

/// The user who builds images, and the root directory of the host. Tests replace both.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub uid: u32,
    pub user: String,
    pub root: PathBuf,
}

impl Host {
    pub(super) fn this() -> Self {
        let uid = nix::unistd::geteuid();
        let user = nix::unistd::User::from_uid(uid)
            .ok()
            .flatten()
            .map_or_else(|| uid.to_string(), |u| u.name);
        Self {
            uid: uid.as_raw(),
            user,
            root: "/".into(),
        }
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }

    fn has(&self, program: &str) -> bool {
        crate::locks::may_block("file access");
        const DIRS: [&str; 6] = [
            "usr/local/sbin",
            "usr/local/bin",
            "usr/sbin",
            "usr/bin",
            "sbin",
            "bin",
        ];
        DIRS.iter()
            .any(|dir| self.root.join(dir).join(program).exists())
    }

    fn read(&self, path: &str) -> String {
        crate::locks::may_block("file access");
        std::fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }

    /// Returns the first program that is missing, with its package, or None if all programs are
    /// installed.
    fn missing(&self) -> Option<(&'static str, &'static str)> {
        let extra = if self.is_root() {
            None
        } else {
            Some(NEWUIDMAP)
        };
        PROGRAMS
            .into_iter()
            .chain(extra)
            .find(|(program, _)| !self.has(program))
    }

    fn lacks_subids(&self) -> bool {
        !self.is_root()
            && ["etc/subuid", "etc/subgid"]
                .iter()
                .any(|file| subids(&self.read(file), &self.user, self.uid) < SUBIDS_MIN)
    }

    fn subid_fix(&self) -> String {
        format!(
            "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {}",
            self.user
        )
    }

    /// Returns the command that lifts the host's ban on user namespaces of ordinary users, or other
    /// advice if no known setting of the host forbids them.
    fn namespace_fix(&self) -> String {
        let is = |path: &str, value: &str| self.read(path).trim() == value;
        if is("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
            return "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0".to_owned();
        }
        if is("proc/sys/kernel/unprivileged_userns_clone", "0") {
            return "sudo sysctl -w kernel.unprivileged_userns_clone=1".to_owned();
        }
        if is("proc/sys/user/max_user_namespaces", "0") {
            return "sudo sysctl -w user.max_user_namespaces=10000".to_owned();
        }
        "build the image as root, or in a container that may create namespaces".to_owned()
    }

    /// Checks that a build can run.
    ///
    /// # Errors
    /// `command_missing`, `unsupported` (no subordinate ids) or `denied` (no namespaces), each with
    /// a hint that fixes it.
    pub(super) fn ready(&self, commands: &dyn Commands, cancel: &Cancel) -> Result<()> {
        if let Some((program, package)) = self.missing() {
            return Err(
                Error::new(Kind::CommandMissing, format!("{program} is not installed"))
                    .hint(format!("sudo apt-get install {package}")),
            );
        }
        if self.lacks_subids() {
            let text = format!(
                "user {} has no subordinate uids and gids, which a root file system needs",
                self.user
            );
            return Err(Error::new(Kind::Unsupported, text).hint(self.subid_fix()));
        }
        let command = namespace(self.is_root())
            .args(["mount", "-t", "tmpfs", "fcd-probe", "/tmp"])
            .deadline(NAMESPACE_DEADLINE);
        match commands.run(&command, cancel, &mut |_| {}) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == Kind::CommandFailed => {
                let text = format!(
                    "user {} may not create the namespaces that a build needs",
                    self.user
                );
                Err(Error::new(Kind::Denied, text)
                    .with_source(e)
                    .hint(self.namespace_fix()))
            }
            Err(e) => Err(e),
        }
    }
}

/// Returns the beginning of a command that runs a program in its own namespaces. The program is
/// killed when the daemon dies. Without root, the command maps all of the user's subordinate ids
/// and runs the program as root of a user namespace.
pub(super) fn namespace(root: bool) -> Command {
    let command = Command::new("setpriv").args(["--pdeathsig", "KILL", "unshare"]);
    let command = if root {
        command
    } else {
        command.args(["--user", "--map-root-user", "--map-auto"])
    };
    command.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
    ])
}

/// Returns the size of the largest range that `text` (subuid(5)) assigns to the user, by name or by
/// number.
fn subids(text: &str, user: &str, uid: u32) -> u64 {
    let uid = uid.to_string();
    let ranges = text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        (owner == user || owner == uid).then_some(())?;
        fields.nth(1)?.parse().ok()
    });
    ranges.max().unwrap_or(0)
}

/// Checks for `doctor` whether this daemon can build images. Runs one short command.
pub fn checks(commands: &dyn Commands, cancel: &Cancel) -> Vec<Check> {
    checks_of(&Host::this(), commands, cancel)
}

fn checks_of(host: &Host, commands: &dyn Commands, cancel: &Cancel) -> Vec<Check> {
    let (severity, found, fix) = match host.ready(commands, cancel) {
        Ok(()) if host.is_root() => (
            Severity::Ok,
            "images can be built, as root".to_owned(),
            None,
        ),
        Ok(()) => (
            Severity::Ok,
            format!(
                "images can be built, as user {} in a user namespace",
                host.user
            ),
            None,
        ),
        // This is only a warning, because VMs can run from existing images without it.
        Err(e) => (
            Severity::Warn,
            format!("images cannot be built: {e}"),
            e.hint_text().map(str::to_owned),
        ),
    };
    vec![Check {
        id: "image.build".to_owned(),
        severity,
        found,
        fix,
    }]
}

/// Returns the names and contents of the host's apt sources, in both formats. Files that cannot be
/// read are omitted.
pub(super) fn source_files(root: &Path) -> Vec<(String, String)> {
    crate::locks::may_block("file access");
    let parts = std::fs::read_dir(root.join("etc/apt/sources.list.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path());
    let mut paths: Vec<_> = parts
        .filter(|p| p.extension().is_some_and(|e| e == "list" || e == "sources"))
        .collect();
    paths.sort();
    paths.insert(0, root.join("etc/apt/sources.list"));
    let read = |path: &PathBuf| {
        Some((
            path.display().to_string(),
            std::fs::read_to_string(path).ok()?,
        ))
    };
    paths.iter().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Output;

    struct Namespaces(bool);
    impl Commands for Namespaces {
        fn run(&self, command: &Command, _: &Cancel, _: &mut dyn FnMut(&str)) -> Result<Output> {
            assert!(command.args.iter().any(|a| a == "--map-auto"));
            if self.0 {
                Ok(Output::default())
            } else {
                Err(Error::new(
                    Kind::CommandFailed,
                    "unshare failed with status 1",
                ))
            }
        }
    }

    fn host(root: &Path, programs: &[&str]) -> Host {
        std::fs::create_dir_all(root.join("usr/bin")).unwrap();
        std::fs::create_dir_all(root.join("etc")).unwrap();
        for program in programs {
            std::fs::write(root.join("usr/bin").join(program), "").unwrap();
        }
        Host {
            uid: 1000,
            user: "ann".to_owned(),
            root: root.to_owned(),
        }
    }

    const ALL: [&str; 6] = [
        "mmdebstrap",
        "mkfs.ext4",
        "unshare",
        "setpriv",
        "lz4",
        "newuidmap",
    ];

    #[track_caller]
    fn refusal(host: &Host, namespaces: bool) -> (Kind, String) {
        let e = host
            .ready(&Namespaces(namespaces), &Cancel::try_new().unwrap())
            .unwrap_err();
        (e.kind(), e.hint_text().unwrap().to_owned())
    }

    #[test]
    fn every_missing_requirement_has_its_hint() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let ann = host(root, &ALL[..5]);
        assert_eq!(
            refusal(&ann, true),
            (
                Kind::CommandMissing,
                "sudo apt-get install uidmap".to_owned()
            )
        );
        let ann = host(root, &ALL);
        let fix = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ann";
        assert_eq!(refusal(&ann, true), (Kind::Unsupported, fix.to_owned()));
        std::fs::write(root.join("etc/subuid"), "bob:1:65536\nann:100000:65536\n").unwrap();
        assert_eq!(refusal(&ann, true).0, Kind::Unsupported);
        std::fs::write(root.join("etc/subgid"), "1000:100000:65536\n").unwrap();
        assert!(
            ann.ready(&Namespaces(true), &Cancel::try_new().unwrap())
                .is_ok()
        );
        assert_eq!(refusal(&ann, false).0, Kind::Denied);
        std::fs::create_dir_all(root.join("proc/sys/kernel")).unwrap();
        std::fs::write(
            root.join("proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
            "1\n",
        )
        .unwrap();
        assert_eq!(
            refusal(&ann, false).1,
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        );
        let checks = checks_of(&ann, &Namespaces(false), &Cancel::try_new().unwrap());
        assert_eq!(
            (checks[0].severity, checks[0].fix.is_some()),
            (Severity::Warn, true)
        );
    }

    #[test]
    fn largest_range_of_subordinate_ids_is_found() {
        let text = "ann:100000:10\nann:200000:65536\n1000:1:70000\nbob:x:y\nbroken\n";
        assert_eq!(
            (
                subids(text, "ann", 7),
                subids(text, "x", 1000),
                subids(text, "bob", 8)
            ),
            (65536, 70000, 0)
        );
    }
}
