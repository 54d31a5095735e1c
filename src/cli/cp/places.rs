//! Parses the arguments of `fcctl cp`: paths on the host, paths in VMs, and `-`.

use crate::error::{Error, Result};
use crate::host::text::quoted;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A path in a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestPath {
    pub vm: String,
    /// The path, which begins with `/`.
    pub path: Vec<u8>,
}

/// One argument of `cp`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Host(PathBuf),
    Guest(GuestPath),
    /// Standard input or output.
    Stream,
}

/// The sources and the destination of a copy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Into(Vec<PathBuf>, GuestPath),
    TarInto(GuestPath),
    Out(Vec<GuestPath>, PathBuf),
    OutTar(GuestPath),
    Between(Vec<GuestPath>, GuestPath),
}

impl Place {
    /// Applies docker's rules. A word that begins with `/` or `.` is a path on the host, and any
    /// other word with a colon is a path in a VM. Names of VMs contain no slash, so a word with a
    /// slash before the colon is a path on the host, too. Paths in a VM are relative to `/`.
    fn parse(word: &OsStr) -> Result<Self> {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        if bytes.is_empty() {
            return Err(Error::invalid("a path is empty"));
        }
        let host = || Ok(Self::Host(word.into()));
        let Some(colon) = bytes.iter().position(|b| *b == b':') else {
            return host();
        };
        let (before, path) = (&bytes[..colon], &bytes[colon + 1..]);
        let Ok(vm) = std::str::from_utf8(before) else {
            return host();
        };
        if vm.is_empty() || vm.starts_with('.') || vm.contains('/') {
            return host();
        }
        if path.is_empty() {
            let text = format!(
                "{} lacks the path in the VM",
                quoted(&word.to_string_lossy())
            );
            return Err(Error::invalid(text).hint(format!("such as {vm}:/root/")));
        }
        let path = if path.starts_with(b"/") {
            path.to_vec()
        } else {
            [b"/", path].concat()
        };
        Ok(Self::Guest(GuestPath {
            vm: vm.to_owned(),
            path,
        }))
    }
}

/// Parses the arguments of `cp`.
pub(super) fn plan(words: &[OsString]) -> Result<Plan> {
    let (to, from) = match words {
        [from @ .., to] if !from.is_empty() => (to, from),
        _ => {
            let text = "cp needs a source and a destination";
            return Err(Error::invalid(text)
                .hint("into a VM: fcctl cp FILE VM:DIR\nout of a VM: fcctl cp VM:FILE DIR"));
        }
    };
    let (mut host, mut guest, mut streams) = (Vec::new(), Vec::new(), 0);
    for word in from {
        match Place::parse(word)? {
            Place::Host(path) => host.push(path),
            Place::Guest(path) => guest.push(path),
            Place::Stream => streams += 1,
        }
    }
    if streams > 0 && from.len() > 1 {
        return Err(Error::invalid("a tar from stdin must be the only source"));
    }
    if !host.is_empty() && !guest.is_empty() {
        let text = "some sources are on this host and some in a VM";
        return Err(Error::invalid(text).hint("copy them with two commands"));
    }
    let is_tar = streams > 0;
    match (Place::parse(to)?, guest.is_empty()) {
        (Place::Guest(to), _) if is_tar => Ok(Plan::TarInto(to)),
        (Place::Guest(to), true) => Ok(Plan::Into(host, to)),
        (Place::Guest(to), false) => Ok(Plan::Between(guest, to)),
        (Place::Host(to), false) => Ok(Plan::Out(guest, to)),
        (Place::Stream, false) => match <[GuestPath; 1]>::try_from(guest) {
            Ok([from]) => Ok(Plan::OutTar(from)),
            Err(_) => Err(Error::invalid("only one path can be written to stdout")
                .hint("copy the directory that contains them, or use exec: fcctl exec VM -- tar c PATH...")),
        },
        (_, true) if is_tar => Err(Error::invalid("a tar from stdin is only copied into a VM")
            .hint("to unpack it on this host: tar x -C DIR")),
        (_, true) => Err(Error::invalid("neither the source nor the destination is in a VM")
            .hint("name a path in a VM as VM:PATH, such as fcctl cp FILE web:/root/")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(vm: &str, path: &str) -> GuestPath {
        GuestPath {
            vm: vm.to_owned(),
            path: path.as_bytes().to_vec(),
        }
    }

    #[track_caller]
    fn check(words: &str, expected: Plan) {
        let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
        assert_eq!(plan(&words).unwrap(), expected);
    }

    #[test]
    fn words_are_read_as_docker_reads_them() {
        let into = |from: &[&str], to| Plan::Into(from.iter().map(PathBuf::from).collect(), to);
        check("a web:/b", into(&["a"], guest("web", "/b")));
        check("a b web:b/", into(&["a", "b"], guest("web", "/b/")));
        check("/a:b web:/b", into(&["/a:b"], guest("web", "/b")));
        check("./a:b web:/b:c", into(&["./a:b"], guest("web", "/b:c")));
        check("d/a:b :x web:.", into(&["d/a:b", ":x"], guest("web", "/.")));
        check("- web:/b", Plan::TarInto(guest("web", "/b")));
        check("web:/b -", Plan::OutTar(guest("web", "/b")));
        check(
            "web:/b ./-",
            Plan::Out(vec![guest("web", "/b")], "./-".into()),
        );
        check(
            "web:/a db:/b .",
            Plan::Out(vec![guest("web", "/a"), guest("db", "/b")], ".".into()),
        );
        check(
            "web:/a web:b",
            Plan::Between(vec![guest("web", "/a")], guest("web", "/b")),
        );
    }

    #[test]
    fn names_of_any_bytes_are_kept() {
        let raw = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        let found = plan(&[raw(b"web:/\xff\n"), ".".into()]).unwrap();
        let path = b"/\xff\n".to_vec();
        let vm = "web".to_owned();
        assert_eq!(found, Plan::Out(vec![GuestPath { vm, path }], ".".into()));
        // Names of VMs are UTF-8, so this word is a path on the host.
        let found = plan(&[raw(b"\xff:a"), "web:/".into()]).unwrap();
        let from = PathBuf::from(raw(b"\xff:a"));
        assert_eq!(found, Plan::Into(vec![from], guest("web", "/")));
    }

    #[test]
    fn other_combinations_are_explained() {
        for (words, text) in [
            ("a", "needs a source"),
            ("a b", "neither the source"),
            ("a -", "neither the source"),
            ("- a", "only copied into a VM"),
            ("- -", "only copied into a VM"),
            ("- a web:/b", "the only source"),
            ("a web:/a web:/b", "some sources"),
            ("web:/a web:/b -", "only one path"),
            ("a web:", "lacks the path"),
        ] {
            let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            let e = plan(&words).unwrap_err();
            assert!(e.to_string().contains(text), "{words:?} {e}");
        }
        assert!(plan(&["".into(), "web:/".into()]).is_err());
    }
}
