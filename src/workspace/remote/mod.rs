//! Builds the command lines that the daemon runs in the guest, and parses what they print.
//!
//! The scripts need POSIX sh, git (2.31 or later), GNU tar, coreutils, findutils 4.9 and sed. No
//! name from a tree is ever part of a command line: names are passed in files, NUL-terminated.
//!
//! | step | stdin | stdout |
//! |---|---|---|
//! | [`begin_command`] | - | [`parse_begin`] |
//! | [`receive_command`] | the payload | - |
//! | [`finish_command`] | - | [`parse_finish`] |
//! | [`export_patch_command`] | - | [`super::left`], then the patch |
//! | [`export_tree_command`] | - | [`super::left`], then a tar for [`super::unpack`] |
//! | [`status_command`] | - | `none`, `incomplete` or `complete` |

use super::git_texts;
use crate::api::exec::Exit;
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::host::shell::quote;
use crate::host::text::printable;

const COMMON: &str = include_str!("common.sh");
const BEGIN: &str = include_str!("begin.sh");
const RECEIVE: &str = include_str!("receive.sh");
const FILTERS: &str = include_str!("filters.sh");
const FINISH: &str = include_str!("finish.sh");
const EXPORT: &str = include_str!("export.sh");
const STATUS: &str = include_str!("status.sh");

/// Directory in the guest that holds a state directory for each workspace.
pub const STATE_ROOT: &str = "/var/lib/fcd/workspaces";
/// Maximum size of the output of `begin` or `finish`, which the daemon keeps in memory.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The paths of a workspace and of its state in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestWorkspace {
    pub guest_path: String,
    pub state_dir: String,
}

impl GuestWorkspace {
    /// Returns the paths of the workspace at `guest_path`, which must have passed
    /// [`super::guest_path::validate`].
    pub fn new(guest_path: &str) -> Self {
        Self::with_root(guest_path, STATE_ROOT)
    }

    /// Does the same as [`GuestWorkspace::new`] with another directory for the state directories.
    pub fn with_root(guest_path: &str, state_root: &str) -> Self {
        use sha2::Digest;
        let hash = sha2::Sha256::digest(guest_path.as_bytes());
        let key = hex::encode(&hash[..8]);
        Self {
            guest_path: guest_path.to_owned(),
            state_dir: format!("{state_root}/{key}"),
        }
    }
}

/// Removes comments, blank lines and indentation, because the length of a command line is limited.
fn compact(script: &str) -> String {
    let lines = script
        .lines()
        .map(str::trim_start)
        .filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.flat_map(|l| [l, "\n"]).collect()
}

fn command(script: &str, workspace: &GuestWorkspace, args: &[&str]) -> String {
    let script = compact(COMMON) + &compact(script);
    let words = [
        "sh",
        "-c",
        &script,
        "fcd",
        &workspace.guest_path,
        &workspace.state_dir,
    ];
    let words: Vec<String> = words.iter().chain(args).map(|w| quote(w)).collect();
    words.join(" ")
}

fn flag(on: bool) -> &'static str {
    if on { "1" } else { "0" }
}

/// Returns the command that creates the directory, marks the workspace dirty, and prints what the
/// guest changed since the last complete import.
pub fn begin_command(workspace: &GuestWorkspace) -> String {
    command(BEGIN, workspace, &[])
}

/// Returns the command that reads the payload on stdin and writes the tree. It leaves the workspace
/// marked dirty.
pub fn receive_command(workspace: &GuestWorkspace, overwrite: bool) -> String {
    command(RECEIVE, workspace, &[flag(overwrite)])
}

/// Options of [`finish_command`]. That command runs after the daemon has verified the trailer. It
/// writes the guest's index, records the baseline, syncs, and marks the workspace complete.
#[derive(Clone, Copy, Debug, Default)]
pub struct Finish<'a> {
    pub overwrite: bool,
    /// Makes the workspace read-only with a bind mount over itself. [`status_command`] makes the
    /// mount again after a boot.
    pub readonly: bool,
    /// The directory in which commands start (`PrepareRequest::subdir`). The command creates it if
    /// it does not exist.
    pub subdir: &'a str,
}

pub fn finish_command(workspace: &GuestWorkspace, finish: &Finish<'_>) -> String {
    command(
        &[FILTERS, FINISH].concat(),
        workspace,
        &[flag(finish.readonly), flag(finish.overwrite), finish.subdir],
    )
}

/// Returns the command that prints a binary git patch from the baseline to the present state. The
/// patch is empty if nothing differs.
pub fn export_patch_command(workspace: &GuestWorkspace) -> String {
    command(EXPORT, workspace, &["patch"])
}

/// Returns the command that prints a GNU tar of the present state: the paths that were sent and
/// those that git does not ignore.
pub fn export_tree_command(workspace: &GuestWorkspace) -> String {
    command(EXPORT, workspace, &["tree"])
}

/// Returns the command that prints the workspace's state, and makes a read-only mount again after a
/// boot.
pub fn status_command(workspace: &GuestWorkspace) -> String {
    command(STATUS, workspace, &[])
}

/// The report of `finish`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// The number of files and links that the host has.
    pub entries: u64,
    /// Paths that the guest changed and that differ from the host's. The list includes `.git/HEAD`
    /// if the guest's commits or branch were kept.
    pub kept: Vec<Vec<u8>>,
}

fn unknown(step: &str) -> Error {
    Error::new(
        Kind::GuestCommandFailed,
        format!("{step}: the guest's answer has an unknown form"),
    )
    .hint("a login script in the guest may print text; check with: fcctl exec {vm} -- true")
}

fn header<'a>(stdout: &'a [u8], start: &str, step: &str) -> Result<(&'a str, &'a [u8])> {
    let end = stdout
        .iter()
        .position(|b| *b == b'\n')
        .ok_or_else(|| unknown(step))?;
    let line = std::str::from_utf8(&stdout[..end]).map_err(|_| unknown(step))?;
    Ok((
        line.strip_prefix(start).ok_or_else(|| unknown(step))?,
        &stdout[end + 1..],
    ))
}

fn nul_list(bytes: &[u8], step: &str) -> Result<Vec<Vec<u8>>> {
    match bytes.strip_suffix(&[0]) {
        None if bytes.is_empty() => Ok(Vec::new()),
        None => Err(unknown(step)),
        Some(list) => Ok(list.split(|b| *b == 0).map(<[u8]>::to_vec).collect()),
    }
}

/// Parses the output of `begin`: the sorted paths that the guest changed since the last complete
/// import.
pub fn parse_begin(stdout: &[u8]) -> Result<Vec<Vec<u8>>> {
    let (_, list) = header(stdout, "fcd-begin 1", "begin the import")?;
    nul_list(list, "begin the import")
}

pub fn parse_finish(stdout: &[u8]) -> Result<Finished> {
    let step = "finish the import";
    let (count, list) = header(stdout, "fcd-finish 1 ", step)?;
    Ok(Finished {
        entries: count.trim().parse().map_err(|_| unknown(step))?,
        kept: nul_list(list, step)?,
    })
}

/// Builds the error for a step that did not end with status 0. `doing` names the step, as in
/// `receive the tree`.
pub fn failure(doing: &str, exit: &Exit, stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    let said = lines
        .iter()
        .find_map(|l| l.strip_prefix("fcd: "))
        .or_else(|| lines.last().copied());
    let said = said.map_or_else(|| format!("it ended with {exit:?}"), printable);
    let error = |kind, hint: &str| Error::new(kind, format!("{doing}: {said}")).hint(hint);
    // The guest's tar (GNU tar 1.34) prints the `strerror`, as git does for most files.
    if git_texts::is_disk_full(&text) {
        let full = Error::new(
            Kind::GuestCommandFailed,
            format!("{doing}: the guest's disk is full: {said}"),
        );
        return full.hint("enlarge it: fcctl vm set {vm} --disk SIZE, then fcctl restart {vm}");
    }
    match exit {
        // Usually the guest's OOM killer causes status 137, because git holds both versions of a
        // large binary file in memory.
        _ if exit.shell_status() == 137 => error(
            Kind::GuestCommandFailed,
            "the guest may be out of memory: fcctl vm set {vm} --memory SIZE",
        ),
        Exit::Status(65) => error(Kind::InvalidGuestPath, "give another --guest-path"),
        Exit::Status(66) => error(
            Kind::WorkspaceIncomplete,
            "run fcctl workspace prepare again",
        ),
        Exit::Status(67) => error(
            Kind::WorkspaceNotFound,
            "bring the tree in: fcctl workspace prepare {vm} PATH",
        ),
        Exit::Status(68) => error(
            Kind::GuestCommandFailed,
            "use an image that has git, GNU tar and findutils",
        ),
        Exit::Status(71) => error(
            Kind::Busy,
            "wait until it has ended, or run fcctl vm restart {vm}",
        ),
        Exit::Status(69 | 70) => error(Kind::StreamIncomplete, "run the command again"),
        _ => error(
            Kind::GuestCommandFailed,
            "inspect the guest: fcctl exec {vm} -- df -h, fcctl logs {vm}",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libssh2 refuses an exec request of about 34 KiB.
    const COMMAND_BYTES_MAX: usize = 24 * 1024;

    fn workspace() -> GuestWorkspace {
        GuestWorkspace::new("/root/it's here")
    }

    #[test]
    fn command_lines_fit_the_limit() {
        let long = GuestWorkspace::new(&format!("/root/{}", "x".repeat(194)));
        let finish = Finish {
            subdir: &"é".repeat(2000),
            ..Finish::default()
        };
        for line in [
            begin_command(&long),
            receive_command(&long, true),
            finish_command(&long, &finish),
            export_patch_command(&long),
            export_tree_command(&long),
            status_command(&long),
        ] {
            assert!(line.len() < COMMAND_BYTES_MAX, "{}", line.len());
        }
    }

    #[test]
    fn state_dirs_of_different_paths_differ() {
        assert_ne!(
            GuestWorkspace::new("/root/a").state_dir,
            GuestWorkspace::new("/root/b").state_dir
        );
        assert!(
            workspace()
                .state_dir
                .starts_with("/var/lib/fcd/workspaces/")
        );
    }

    #[test]
    fn answers_are_parsed_and_unknown_forms_rejected() {
        assert_eq!(
            parse_begin(b"fcd-begin 1\n").unwrap(),
            Vec::<Vec<u8>>::new()
        );
        assert_eq!(
            parse_begin(b"fcd-begin 1\na\nb\0c\0").unwrap(),
            [b"a\nb".to_vec(), b"c".to_vec()]
        );
        for bad in [&b""[..], b"motd\nfcd-begin 1\n", b"fcd-begin 1\nhalf"] {
            assert_eq!(
                parse_begin(bad).unwrap_err().kind(),
                Kind::GuestCommandFailed
            );
        }
        let want = Finished {
            entries: 12,
            kept: vec![b"x".to_vec()],
        };
        assert_eq!(parse_finish(b"fcd-finish 1 12\nx\0").unwrap(), want);
    }

    #[test]
    fn failure_names_the_step_and_hints_at_a_remedy() {
        let e = failure(
            "export",
            &Exit::Status(66),
            b"fcd: an import was interrupted\n",
        );
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (
                Kind::WorkspaceIncomplete,
                "export: an import was interrupted"
            )
        );
        let e = failure(
            "receive the tree",
            &Exit::Status(2),
            b"tar: x: Cannot write: No space left on device\ntar: Exiting\n",
        );
        assert_eq!(e.kind(), Kind::GuestCommandFailed);
        assert!(
            e.to_string().contains("disk is full") && e.hint_text().unwrap().contains("vm set")
        );
        let e = failure(
            "begin",
            &Exit::Status(128),
            b"fatal: sha1 file 'p' write error. Out of diskspace\n",
        );
        assert!(e.to_string().contains("disk is full"), "{e}");
    }
}
