//! A tree on the host and its copy in a guest. The same tools list both sides for a comparison.

use crate::host::{Host, text};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A script that lists records, each ending in NUL: first type, mode, size or target, and path of
/// each entry, and then hash and path of each file. git's directory is left out.
// b2sum is the fastest good hash under software emulation.
const LIST: &str = r"
export LC_ALL=C
find . -mindepth 1 -path ./.git -prune -o -type f -printf 'f %m %s %P\0' -o -type l -printf 'l %P -> %l\0' \
  -o -type d DIRS -o -printf 'other %y %P\0' | sort -z
find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 -r b2sum -bz
";
/// A script that lists everything in the guest's repository: index, refs, objects and settings.
const REPOSITORY: &str =
    "export GIT_OPTIONAL_LOCKS=0; git for-each-ref; git rev-parse HEAD; git count-objects -v
    find .git -type f -print0 | sort -z | xargs -0 -r sha256sum";

/// Compares two listings. If they differ, the message shows the first few records that only one
/// side has.
#[track_caller]
fn assert_same(host: &[u8], guest: &[u8]) {
    assert!(
        host.contains(&0),
        "the host's tree is empty: nothing is compared"
    );
    let lacks = |a: &[u8], b: &[u8]| {
        let b: std::collections::HashSet<_> = b.split(|c| *c == 0).collect();
        let missing = a.split(|c| *c == 0).filter(|record| !b.contains(record));
        missing
            .take(5)
            .map(|record| record.escape_ascii().to_string())
            .collect::<Vec<_>>()
    };
    // The message is formatted only if there is a difference, because a large listing takes half a
    // minute.
    assert!(
        host == guest,
        "on the host only: {:#?}\nin the guest only: {:#?}",
        lacks(host, guest),
        lacks(guest, host)
    );
}

pub struct Site<'a> {
    pub host: &'a Host,
    pub vm: &'a str,
    pub guest: String,
    dir: tempfile::TempDir,
    has_dirs: bool,
}

impl<'a> Site<'a> {
    /// Creates an empty directory that is copied to `/root/<name>`. Everything in it is compared,
    /// including directories.
    pub fn plain(host: &'a Host, vm: &'a str, name: &str) -> Self {
        // The tree is not below the checkout, because then the whole checkout would be copied.
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("repo")).unwrap();
        fs::create_dir_all(dir.path().join("home")).unwrap();
        Self {
            host,
            vm,
            guest: format!("/root/{name}"),
            dir,
            has_dirs: true,
        }
    }

    /// Creates a repository without commits. Like git, comparisons ignore empty directories.
    pub fn unborn(host: &'a Host, vm: &'a str, name: &str) -> Self {
        let site = Self {
            has_dirs: false,
            ..Self::plain(host, vm, name)
        };
        fs::write(
            site.dir.path().join("home/.gitconfig"),
            "[user]\n\tname = U Ser\n\temail = u@example.org\n",
        )
        .unwrap();
        site.git(&["init", "-q", "-b", "trunk"]);
        site
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("repo")
    }
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub fn path(&self, name: impl AsRef<[u8]>) -> PathBuf {
        self.root().join(OsStr::from_bytes(name.as_ref()))
    }
    pub fn write(&self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    pub fn chmod(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    pub fn link(&self, target: &str, name: &str) {
        std::os::unix::fs::symlink(target, self.path(name)).unwrap();
    }

    /// Runs a command with the settings of the site's user and without a repository in any parent
    /// directory.
    fn as_user(&self, command: &mut Command) -> Output {
        let command = command
            .env("HOME", self.beside("home"))
            .env("GIT_CONFIG_NOSYSTEM", "1");
        command
            .env("GIT_CEILING_DIRECTORIES", self.dir.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap()
    }

    #[track_caller]
    pub fn on_host(&self, script: &str) -> Vec<u8> {
        let out = self.as_user(
            Command::new("sh")
                .args(["-ec", script])
                .current_dir(self.root()),
        );
        assert!(out.status.success(), "{script}: {:?}", text(&out));
        out.stdout
    }
    #[track_caller]
    pub fn git(&self, args: &[&str]) -> String {
        let out = self.as_user(Command::new("git").args(args).current_dir(self.root()));
        assert!(out.status.success(), "git {args:?}: {:?}", text(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
    pub fn commit(&self, message: &str) {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "-m", message]);
    }

    pub fn in_guest_out(&self, script: &str) -> Output {
        self.host.fcctl(&[
            "exec",
            self.vm,
            "-w",
            &self.guest,
            "--",
            "sh",
            "-ec",
            script,
        ])
    }
    /// Runs a script in the guest's copy and returns its stdout.
    #[track_caller]
    pub fn in_guest(&self, script: &str) -> Vec<u8> {
        let out = self.in_guest_out(script);
        assert!(
            out.status.success(),
            "in the guest: {script}: {} {:?}",
            out.status,
            text(&out)
        );
        out.stdout
    }
    #[track_caller]
    pub fn said_in_guest(&self, script: &str) -> String {
        String::from_utf8_lossy(&self.in_guest(script)).into_owned()
    }

    /// Runs `fcctl` as the site's user, in its tree.
    pub fn fcctl(&self, args: &[&str]) -> Output {
        self.as_user(self.host.command(args).current_dir(self.root()))
    }
    /// Runs `workspace prepare` on the tree and returns its stderr.
    #[track_caller]
    pub fn prepare_with(&self, more: &[&str]) -> String {
        let args = [
            &[
                "workspace",
                "prepare",
                self.vm,
                ".",
                "--guest-path",
                &self.guest,
            ],
            more,
        ]
        .concat();
        let begun = std::time::Instant::now();
        let out = self.fcctl(&args);
        assert!(out.status.success(), "{args:?}: {:?}", text(&out));
        eprintln!("prepare {} {more:?}: {:?}", self.guest, begun.elapsed());
        text(&out).1
    }
    #[track_caller]
    pub fn prepare(&self) -> String {
        self.prepare_with(&[])
    }
    /// Runs `workspace export` and returns its stdout and stderr.
    #[track_caller]
    pub fn export(&self, more: &[&str]) -> (Vec<u8>, String) {
        let out = self.fcctl(&[&["workspace", "export", self.vm], more].concat());
        assert!(out.status.success(), "export {more:?}: {:?}", text(&out));
        let said = text(&out).1;
        (out.stdout, said)
    }

    fn list_script(&self) -> String {
        LIST.replace(
            "DIRS",
            if self.has_dirs {
                r"-printf 'd %m %P\0'"
            } else {
                ""
            },
        )
    }
    #[track_caller]
    pub fn assert_same_tree(&self) {
        let script = self.list_script();
        assert_same(&self.on_host(&script), &self.in_guest(&script));
    }
    /// Compares a directory on the host with the guest's tree.
    #[track_caller]
    pub fn assert_is_guests(&self, dir: &Path) {
        let script = format!("cd '{}'; {}", dir.display(), self.list_script());
        assert_same(&self.on_host(&script), &self.in_guest(&self.list_script()));
    }
    #[track_caller]
    pub fn assert_same_status(&self) -> String {
        self.assert_same_output(
            "git status --porcelain -z --untracked-files=all; git status --porcelain",
        )
    }
    /// Runs a script about the repository on both sides. Both must print the same. Returns the
    /// output.
    #[track_caller]
    pub fn assert_same_output(&self, script: &str) -> String {
        let (host, guest) = (self.on_host(script), self.in_guest(script));
        assert!(
            host == guest,
            "{script}: {}\nin the guest: {}",
            host.escape_ascii(),
            guest.escape_ascii()
        );
        String::from_utf8_lossy(&host).into_owned()
    }
    /// Describes the guest's repository for a later comparison.
    #[track_caller]
    pub fn repository(&self) -> String {
        self.said_in_guest(REPOSITORY)
    }
}
