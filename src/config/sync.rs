//! The sections `[[sync]]`: files of the host's that every guest gets at each of its starts.

use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::path::{Component, Path, PathBuf};

const FILES_MAX: usize = 64;
const MODE_DEFAULT: u32 = 0o644;
/// What the guest's init makes anew at each boot, or never keeps.
const NOT_FILES: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// One file, whatever user the VM belongs to.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SyncedFile {
    /// On the host.
    pub from: PathBuf,
    /// In the guest. What is there is replaced; directories that are missing are made.
    pub to: PathBuf,
    /// Permissions in octal, as in `"0600"`; 0644 when not given. Its owner is the guest's root.
    #[serde(default)]
    mode: Option<Mode>,
}

impl SyncedFile {
    pub fn mode(&self) -> u32 {
        self.mode.map_or(MODE_DEFAULT, |mode| mode.0)
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(try_from = "String")]
struct Mode(u32);

impl TryFrom<String> for Mode {
    type Error = String;
    fn try_from(text: String) -> std::result::Result<Self, String> {
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
        mode.map(Self).ok_or_else(|| format!("mode {text:?}: give permissions in octal, as in \"0644\""))
    }
}

/// # Errors
/// `invalid_config`.
pub fn validate(files: &[SyncedFile]) -> Result<()> {
    let bad = |what: String| Err(Error::new(Kind::InvalidConfig, what));
    if files.len() > FILES_MAX {
        return bad(format!("there are {} [[sync]] sections, at most {FILES_MAX} may be", files.len()));
    }
    for (i, file) in files.iter().enumerate() {
        let to = file.to.display();
        if !file.from.is_absolute() {
            return bad(format!("sync.from must be an absolute path: {}", file.from.display()));
        }
        if !is_a_files_path(&file.to) {
            return bad(format!("sync.to must be the absolute path of a file, without . and ..: {to}"));
        }
        if let Some(place) = NOT_FILES.iter().find(|place| file.to.starts_with(place)) {
            return bad(format!("sync.to is {to}, but nothing is kept below {place} in a guest"));
        }
        if files[..i].iter().any(|other| other.to.starts_with(&file.to) || file.to.starts_with(&other.to)) {
            return bad(format!("sync.to is {to}, which another [[sync]] section has too"));
        }
    }
    Ok(())
}

/// As text it is what its parts say: no trailing slash, no `//`, no `.`.
fn is_a_files_path(path: &Path) -> bool {
    let Some(text) = path.to_str() else { return false };
    let parts: Vec<&str> = path.components().skip(1).filter_map(|c| c.as_os_str().to_str()).collect();
    let is_plain = path.components().skip(1).all(|c| matches!(c, Component::Normal(_)));
    let has_control = text.chars().any(char::is_control);
    path.is_absolute() && is_plain && !parts.is_empty() && !has_control && format!("/{}", parts.join("/")) == text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(all: &[(&str, &str)]) -> Vec<SyncedFile> {
        all.iter().map(|(from, to)| SyncedFile { from: from.into(), to: to.into(), mode: None }).collect()
    }

    #[test]
    fn what_may_be_synced() {
        validate(&[]).unwrap();
        validate(&files(&[("/etc/ca.crt", "/usr/local/share/ca-certificates/ca.crt"), ("/x", "/root/.npmrc")])).unwrap();
        for (from, to) in [
            ("ca.crt", "/x"),
            ("/x", "x"),
            ("/x", "/"),
            ("/x", "/a/"),
            ("/x", "/a/../b"),
            ("/x", "/a//b"),
            ("/x", "/./b"),
            ("/x", "/a\nb"),
            ("/x", "/proc/sys/kernel/core_pattern"),
            ("/x", "/run/fcd/seed/config"),
        ] {
            assert_eq!(validate(&files(&[(from, to)])).unwrap_err().kind(), Kind::InvalidConfig, "{from} {to}");
        }
        for twice in [[("/x", "/a"), ("/y", "/a")], [("/x", "/a"), ("/y", "/a/b")], [("/x", "/a/b"), ("/y", "/a")]] {
            assert!(validate(&files(&twice)).is_err(), "{twice:?}");
        }
        assert!(validate(&files(&vec![("/x", "/a"); FILES_MAX + 1])).is_err());
    }

    #[test]
    fn permissions_are_octal() {
        let parse = |mode: &str| toml::from_str::<SyncedFile>(&format!("from = '/x'\nto = '/y'\n{mode}"));
        assert_eq!(parse("").unwrap().mode(), 0o644);
        assert_eq!(parse("mode = '0600'").unwrap().mode(), 0o600);
        for bad in ["mode = '9'", "mode = '4755'", "mode = 'rw'", "mode = 600", "what = 1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
