//! The commands that run in a guest for a copy, and what their exit statuses mean.

use super::{FileKind, shown};
use crate::error::{Error, Kind, Result};
use std::io::Read;

const COMMON: &str = include_str!("common.sh");
const OUT: &str = include_str!("out.sh");
const INTO: &str = include_str!("into.sh");
/// Maximum length of the line before the tar that a guest sends.
const FIRST_LINE_BYTES_MAX: usize = 64;
/// The beginning of that line.
const FIRST_LINE: &str = "fcd-copy 1 ";

/// A copy out of a guest.
#[derive(Clone, Debug)]
pub struct Out {
    /// The absolute path.
    pub path: Vec<u8>,
    /// Copy the target of a link, not the link.
    pub follow: bool,
    /// Record owners, hard links and attributes.
    pub archive: bool,
    /// Let the entries' paths begin with the last component of the path.
    pub named: bool,
    /// Count the bytes first.
    pub count: bool,
}

impl Out {
    /// Returns the words of the command.
    pub fn words(&self) -> Vec<Vec<u8>> {
        let flag = |is_set: bool, word: &str| if is_set { word } else { "" }.into();
        let mut words = command(OUT);
        words.extend([
            self.path.clone(),
            flag(self.follow, "follow"),
            flag(self.archive, "archive"),
            flag(self.named, "named"),
            flag(self.count, "count"),
        ]);
        words
    }
}

/// The content of the tar for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file or a link of this name.
    File(Vec<u8>),
    /// A directory of this name.
    Dir(Vec<u8>),
    /// The entries of a directory.
    Contents,
    /// Several files, links or directories.
    Many,
    /// A tar from the caller.
    Tar,
}

/// A copy into a guest.
#[derive(Clone, Debug)]
pub struct Into {
    pub content: Content,
    /// The destination, an absolute path.
    pub path: Vec<u8>,
    /// The name of the last entry; see [`last_entry`].
    pub last: String,
    /// Keep owners and attributes.
    pub archive: bool,
    /// The directory of the same guest from which the tar comes.
    pub origin: Option<Vec<u8>>,
}

impl Into {
    /// Returns the words of the command.
    pub fn words(&self) -> Vec<Vec<u8>> {
        let (what, name): (&str, &[u8]) = match &self.content {
            Content::File(name) => ("file", name),
            Content::Dir(name) => ("dir", name),
            Content::Contents => ("contents", b""),
            Content::Many => ("many", b""),
            Content::Tar => ("tar", b""),
        };
        let archive = if self.archive { "archive" } else { "" };
        let mut words = command(INTO);
        words.extend([
            what.into(),
            self.path.clone(),
            name.into(),
            self.last.clone().into(),
            archive.into(),
            self.origin.clone().unwrap_or_default(),
        ]);
        words
    }
}

/// Returns a name for the last entry of a tar. A guest that makes a tar for another guest cannot
/// guess it.
pub fn last_entry() -> String {
    let random = crate::host::hex::encode(&crate::host::random::bytes::<8>());
    format!(".fcctl-last-{random}")
}

fn command(script: &str) -> Vec<Vec<u8>> {
    let script = format!("{COMMON}{script}");
    vec!["sh".into(), "-c".into(), script.into(), "fcctl-cp".into()]
}

/// The guest's reply, which precedes the tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstLine {
    pub kind: FileKind,
    /// The approximate number of bytes that follow.
    pub bytes: Option<u64>,
}

/// Reads the line before the tar. Returns `stream_incomplete` if the stream ends first, and
/// `invalid_tree` for any other line.
pub fn read_first_line(from: &mut dyn Read) -> Result<FirstLine> {
    const DOING: &str = "read what the guest sends";
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        from.read_exact(&mut byte)
            .map_err(|e| crate::workspace::unpack::stream_error(DOING, e))?;
        if byte[0] == b'\n' {
            break;
        }
        line.push(byte[0]);
        if line.len() > FIRST_LINE_BYTES_MAX {
            break;
        }
    }
    parse_first_line(&line).ok_or_else(|| {
        Error::new(Kind::InvalidTree, format!("{DOING}: it is not a copy"))
            .hint("see what the guest runs: fcctl exec VM -- ls -l /bin/sh /bin/tar")
    })
}

fn parse_first_line(line: &[u8]) -> Option<FirstLine> {
    let line = std::str::from_utf8(line).ok()?.strip_prefix(FIRST_LINE)?;
    let (kind, bytes) = line.split_once(' ')?;
    let kind = match kind {
        "file" => FileKind::File,
        "link" => FileKind::Link,
        "dir" => FileKind::Dir,
        _ => return None,
    };
    let bytes = match bytes {
        "" => None,
        digits => Some(digits.parse().ok()?),
    };
    Some(FirstLine { kind, bytes })
}

/// The text for a command that failed silently.
const UNKNOWN: &str = "the copy failed in the guest";

/// Explains a status of one of the scripts other than 0. `stderr` is what it printed, which is a
/// path for most statuses.
pub fn explain(vm: &str, status: u8, stderr: &[u8]) -> Error {
    let said = shown(stderr);
    let said = said.trim_end_matches('\n');
    let of_path = |kind: Kind, what: &str| Error::new(kind, format!("{vm}:{said}: {what}"));
    let failed = |text: String| Error::new(Kind::GuestCommandFailed, format!("{vm}: {text}"));
    match status {
        70 if said.ends_with('/') => {
            let dir = crate::host::shell::quote(said);
            of_path(Kind::PathNotFound, "no such directory")
                .hint(format!("create it: fcctl exec {vm} -- mkdir -p {dir}"))
        }
        70 => of_path(Kind::PathNotFound, "no such file or directory"),
        71 => of_path(Kind::InvalidArgument, "not a directory"),
        72 => of_path(Kind::TargetExists, "it exists and is not a directory"),
        74 => of_path(
            Kind::InvalidArgument,
            "it is a device, a FIFO or a socket, which cannot be copied",
        ),
        75 => of_path(Kind::TargetExists, "it is a directory"),
        76 => Error::new(
            Kind::StreamIncomplete,
            format!("{vm}: the copy was cut off, so nothing was changed"),
        ),
        77 => of_path(
            Kind::InvalidArgument,
            "a directory cannot be copied into itself",
        ),
        73 => failed(last_line(said).unwrap_or(UNKNOWN).to_owned()),
        78 => failed(of_tar(said)),
        79 => failed(of_tar(said)).hint(format!(
            "if the guest's disk is full, make room: fcctl exec {vm} -- df -h"
        )),
        125 => failed(
            last_line(said)
                .unwrap_or("the command cannot begin")
                .trim_start_matches("fcd: ")
                .to_owned(),
        ),
        126 | 127 => {
            let text = last_line(said).unwrap_or("it lacks a program");
            failed(text.to_owned())
                .hint("a copy needs sh, tar, cp, mv and find in the guest, as in GNU's packages")
        }
        status => failed(match last_line(said) {
            Some(line) => format!("the copy ended with status {status}: {line}"),
            None => format!("the copy ended with status {status}"),
        }),
    }
}

/// Returns the last message of a program.
fn last_line(said: &str) -> Option<&str> {
    said.lines().rfind(|line| !line.is_empty())
}

/// Returns tar's last message about a cause. The line after it only says that tar failed.
fn of_tar(said: &str) -> String {
    let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    match lines.as_slice() {
        [] => UNKNOWN.to_owned(),
        [line] | [line, _] => (*line).to_owned(),
        [others @ .., line, _] => format!("{line} (and {} more messages)", others.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_line_is_parsed_strictly() {
        let read = |bytes: &[u8]| read_first_line(&mut &*bytes).map_err(|e| e.kind());
        let line = |kind, bytes| Ok(FirstLine { kind, bytes });
        assert_eq!(
            read(b"fcd-copy 1 dir 4096\n..."),
            line(FileKind::Dir, Some(4096))
        );
        assert_eq!(read(b"fcd-copy 1 file \n"), line(FileKind::File, None));
        assert_eq!(read(b"fcd-copy 1 link \n"), line(FileKind::Link, None));
        for bad in [
            &b"fcd-copy 2 dir \n"[..],
            b"fcd-copy 1 dir\n",
            b"fcd-copy 1 fifo \n",
            b"fcd-copy 1 dir -1\n",
            b"fcd-copy 1 dir 99999999999999999999\n",
            b"\xff\n",
            &[b'x'; 100],
        ] {
            assert_eq!(read(bad), Err(Kind::InvalidTree), "{bad:?}");
        }
        assert_eq!(read(b"fcd-copy 1"), Err(Kind::StreamIncomplete));
    }

    #[test]
    fn status_of_script_names_the_path() {
        let check = |status, stderr: &str, kind, text: &str| {
            let e = explain("web", status, stderr.as_bytes());
            assert_eq!((e.kind(), e.to_string().as_str()), (kind, text));
        };
        check(
            70,
            "/a",
            Kind::PathNotFound,
            "web:/a: no such file or directory",
        );
        check(70, "/a/", Kind::PathNotFound, "web:/a/: no such directory");
        check(71, "/a/", Kind::InvalidArgument, "web:/a/: not a directory");
        check(73, "mv: no\n", Kind::GuestCommandFailed, "web: mv: no");
        check(
            78,
            "tar: ./x: Cannot open: Permission denied\ntar: Exiting with failure status due to previous errors\n",
            Kind::GuestCommandFailed,
            "web: tar: ./x: Cannot open: Permission denied",
        );
        check(
            125,
            "fcd: the guest has no user ann\n",
            Kind::GuestCommandFailed,
            "web: the guest has no user ann",
        );
        check(
            137,
            "",
            Kind::GuestCommandFailed,
            "web: the copy ended with status 137",
        );
        let full = explain(
            "web",
            79,
            b"tar: a: Cannot write: No space left on device\n",
        );
        assert!(full.hint_text().unwrap().contains("df -h"));
    }
}
