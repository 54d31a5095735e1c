//! Tests of round trips with real repositories. The guest's scripts run on this host under `sh` in
//! a separate directory.

mod accepting;
mod applying;
mod exporting;
mod filters;
mod hostile;
mod importing;
mod leaving;
mod repeating;
mod stealing;
mod times;

use super::caller_env::CallerEnv;
use super::options::{History, Options};
use super::plan::{Plan, Sent};
use super::remote::{self, Finish, Finished, GuestWorkspace};
use super::{apply, left, patch, unpack};
use crate::api::exec::Exit;
use crate::error::{Error, Result};
use crate::host::command::{Command, Output, run_any_status};
use crate::host::piped::run_piped;
use crate::locks::Cancel;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn cancel() -> Cancel {
    Cancel::try_new().unwrap()
}

/// The state of a workspace, as the guest reports it.
#[derive(Debug, PartialEq, Eq)]
enum Status {
    None,
    Incomplete,
    Complete,
}

/// A host directory with a tree, and a directory in the role of the guest.
struct Site {
    dir: tempfile::TempDir,
    workspace: GuestWorkspace,
}

impl Site {
    /// Creates a site whose tree is an empty directory.
    fn plain() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["host/repo", "home", "guest"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let workspace = GuestWorkspace::with_root(
            dir.path().join("guest/repo").to_str().unwrap(),
            dir.path().join("state").to_str().unwrap(),
        );
        Self { dir, workspace }
    }

    /// Creates a site whose tree is a repository without commits.
    fn unborn() -> Self {
        let site = Self::plain();
        std::fs::write(
            site.dir.path().join("home/.gitconfig"),
            "[user]\n\tname = U Ser\n\temail = u@example.org\n",
        )
        .unwrap();
        site.git(&["init", "-q", "-b", "trunk"]);
        site
    }

    /// Creates a site whose tree is a repository with one commit of `a`, `dir/b` and the executable
    /// `run`.
    fn committed() -> Self {
        let site = Self::unborn();
        site.write("a", "one\ntwo\n");
        site.write("dir/b", "bee\n");
        site.write("run", "#!/bin/sh\n");
        site.chmod("run", 0o755);
        site.commit("first");
        site
    }

    fn host(&self) -> PathBuf {
        self.dir.path().join("host/repo")
    }
    fn guest(&self) -> PathBuf {
        PathBuf::from(&self.workspace.guest_path)
    }
    fn path(&self, name: impl AsRef<OsStr>) -> PathBuf {
        self.host().join(Path::new(name.as_ref()))
    }
    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        write(&self.host(), name, text);
    }
    fn write_guest(&self, name: &str, text: impl AsRef<[u8]>) {
        write(&self.guest(), name, text);
    }
    fn chmod(&self, name: &str, mode: u32) {
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    fn commit(&self, message: &str) {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "-m", message]);
    }
    /// Makes an empty commit with this message.
    fn commit_as(&self, message: &str) {
        self.git(&["commit", "-q", "--allow-empty", "-m", message]);
    }
    #[track_caller]
    fn git(&self, args: &[&str]) -> String {
        git(&self.host(), &self.dir.path().join("home"), args)
    }
    /// Runs git as a user in the guest does: the distribution's git with a separate home directory.
    #[track_caller]
    fn git_guest(&self, args: &[&str]) -> String {
        git(&self.guest(), &self.dir.path().join("guest"), args)
    }

    fn options(&self, history: History) -> Options {
        let env = CallerEnv {
            path: std::env::var_os("PATH"),
            home: Some(self.dir.path().join("home")),
            ..CallerEnv::default()
        };
        Options {
            history,
            env,
            ..Options::default()
        }
    }
    fn plan(&self) -> Result<Plan> {
        Plan::inspect(&self.host(), &self.options(History::default()), &cancel())
    }

    fn sh(&self, doing: &str, line: &str, stdin: Vec<u8>) -> Result<(Vec<u8>, Vec<u8>)> {
        let command = Command::new("/bin/sh")
            .args(["-c", line])
            .stdin(stdin)
            .deadline(Duration::from_secs(120));
        let command = Command {
            env: vec![("PATH".into(), "/usr/bin:/bin:/usr/sbin:/sbin".into())],
            ..command
        };
        let mut stdout = Vec::new();
        let output = run_piped(&command, &cancel(), &mut |b| {
            stdout.extend_from_slice(b);
            Ok(())
        })?;
        if output.status != 0 {
            return Err(remote::failure(
                doing,
                &Exit::Status(output.status as u8),
                &output.stderr,
            ));
        }
        Ok((stdout, output.stderr))
    }

    fn begin(&self) -> Result<Vec<Vec<u8>>> {
        remote::parse_begin(
            &self
                .sh(
                    "begin the import",
                    &remote::begin_command(&self.workspace),
                    Vec::new(),
                )?
                .0,
        )
    }
    fn receive(&self, payload: Vec<u8>, overwrite: bool) -> Result<()> {
        self.sh(
            "receive the tree",
            &remote::receive_command(&self.workspace, overwrite),
            payload,
        )
        .map(drop)
    }
    fn finish(&self, finish: &Finish<'_>) -> Result<Finished> {
        remote::parse_finish(
            &self
                .sh(
                    "finish the import",
                    &remote::finish_command(&self.workspace, finish),
                    Vec::new(),
                )?
                .0,
        )
    }
    fn status(&self) -> Status {
        let (out, _) = self
            .sh("look", &remote::status_command(&self.workspace), Vec::new())
            .unwrap();
        match out.trim_ascii() {
            b"none" => Status::None,
            b"incomplete" => Status::Incomplete,
            b"complete" => Status::Complete,
            other => panic!("{}", String::from_utf8_lossy(other)),
        }
    }

    fn prepare_with(&self, plan: &mut Plan, overwrite: bool) -> Result<(Sent, Finished)> {
        let mut keep = self.begin()?;
        if overwrite {
            keep.clear();
        }
        let mut payload = Vec::new();
        let sent = plan.send(&mut payload, &keep, &mut |_, _| {}, &cancel())?;
        assert_eq!(sent.bytes, payload.len() as u64);
        self.receive(payload, overwrite)?;
        let finish = Finish {
            overwrite,
            readonly: false,
            subdir: plan.subdir(),
        };
        Ok((sent, self.finish(&finish)?))
    }
    /// Runs a whole import. Returns the paths that were kept.
    #[track_caller]
    fn prepare(&self) -> Vec<String> {
        let (_, finished) = self.prepare_with(&mut self.plan().unwrap(), false).unwrap();
        finished
            .kept
            .iter()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .collect()
    }
    #[track_caller]
    fn overwrite(&self) {
        let (_, finished) = self.prepare_with(&mut self.plan().unwrap(), true).unwrap();
        assert_eq!(finished.kept, Vec::<Vec<u8>>::new());
    }

    /// Runs an export. Returns the payload without the list at its beginning, and the list.
    fn export(&self, command: &str) -> Result<(Vec<u8>, Vec<left::Left>)> {
        let (payload, _) = self.sh("export", command, Vec::new())?;
        let mut rest = payload.as_slice();
        let left = left::read(&mut rest)?;
        assert_eq!(left.total, left.named.len() as u64);
        Ok((rest.to_vec(), left.named))
    }
    /// Returns the paths that a patch export and a tree export report as left behind.
    #[track_caller]
    fn left(&self) -> Vec<String> {
        let named = [
            remote::export_patch_command(&self.workspace),
            remote::export_tree_command(&self.workspace),
        ]
        .map(|command| {
            let named = self.export(&command).unwrap().1;
            named
                .iter()
                .map(|l| format!("{:?} {}", l.why, String::from_utf8_lossy(&l.path)))
                .collect::<Vec<_>>()
        });
        assert_eq!(named[0], named[1]);
        named[0].clone()
    }
    fn export_patch(&self) -> Result<(Vec<u8>, u64)> {
        let (patch, _) = self.export(&remote::export_patch_command(&self.workspace))?;
        let (_, counted) = patch::spool(&mut &patch[..], u64::MAX, &cancel())?;
        Ok((patch, counted.files))
    }
    fn export_tree(&self) -> Result<Vec<u8>> {
        Ok(self
            .export(&remote::export_tree_command(&self.workspace))?
            .0)
    }

    #[track_caller]
    fn assert_same_status(&self) {
        let args = ["status", "--porcelain", "--untracked-files=all"];
        assert_eq!(self.git(&args), self.git_guest(&args));
    }
    /// Compares `git status` on both sides, ignoring a file that only the guest has.
    #[track_caller]
    fn assert_same_status_without(&self, only_in_guest: &str) {
        let args = ["status", "--porcelain", "--untracked-files=all"];
        let line = format!("?? {only_in_guest}\n");
        assert_eq!(self.git(&args), self.git_guest(&args).replace(&line, ""));
    }
    /// Checks that the guest has exactly the host's files, with the same content and permission
    /// bits.
    #[track_caller]
    fn assert_same_tree(&self) {
        assert_eq!(listing(&self.host()), listing(&self.guest()));
    }
    /// Exports a patch into a file. Returns the file's path.
    fn patch_file(&self) -> PathBuf {
        let file = self.dir.path().join("p.patch");
        std::fs::write(&file, self.export_patch().unwrap().0).unwrap();
        file
    }
    fn caller(&self) -> CallerEnv {
        self.options(History::default()).env
    }
    fn apply(&self, patch: &Path) -> Result<Vec<apply::Change>> {
        apply::check(&self.host(), patch, &self.caller(), &cancel())?.apply_all()
    }
    /// Exports a patch, applies it to the host's tree and compares the trees. Returns the patch.
    #[track_caller]
    fn apply_export(&self) -> String {
        let file = self.patch_file();
        self.apply(&file).unwrap();
        self.assert_same_tree();
        String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned()
    }
}

fn write(root: &Path, name: &str, text: impl AsRef<[u8]>) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[track_caller]
fn run(command: Command) -> Output {
    let output = run_any_status(&command, &cancel(), &mut |_| {}).unwrap();
    assert_eq!(
        output.status,
        0,
        "{:?}: {}",
        command.args,
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

#[track_caller]
fn git(dir: &Path, home: &Path, args: &[&str]) -> String {
    let c = Command::new("git")
        .args(args)
        .cwd(dir)
        .env("HOME", home)
        .env("GIT_CONFIG_NOSYSTEM", "1");
    let c = c.env("GIT_CEILING_DIRECTORIES", dir.parent().unwrap());
    String::from_utf8_lossy(&run(c).stdout).into_owned()
}

/// Maps a path to its permission bits and its content or target.
type Listing = BTreeMap<Vec<u8>, (u32, Vec<u8>)>;

/// Lists every file and link below `root`, without the `.git` at the top.
fn listing(root: &Path) -> Listing {
    let mut out = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for item in std::fs::read_dir(&dir).unwrap() {
            let path = item.unwrap().path();
            let below = path
                .strip_prefix(root)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec();
            let meta = std::fs::symlink_metadata(&path).unwrap();
            if below == b".git" {
                continue;
            }
            if meta.is_dir() {
                pending.push(path);
            } else if meta.is_symlink() {
                out.insert(
                    below,
                    (
                        0,
                        std::fs::read_link(&path)
                            .unwrap()
                            .as_os_str()
                            .as_bytes()
                            .to_vec(),
                    ),
                );
            } else {
                out.insert(below, (meta.mode() & 0o777, std::fs::read(&path).unwrap()));
            }
        }
    }
    out
}

fn unpack_tree(tar: &[u8], target: &Path) -> Result<unpack::Unpacked, Error> {
    unpack::stage(&mut &tar[..], target, &unpack::Limits::default(), &cancel())?.commit()
}

fn receive_patch(patch: &[u8], file: &Path) -> Result<patch::Patch, Error> {
    patch::receive(&mut &patch[..], file, u64::MAX, &cancel())
}
