//! The sections `[[sync]]`: host files that every guest gets at each start.

use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::path::{Component, Path, PathBuf};

const FILES_MAX: usize = 64;
const MODE_DEFAULT: u32 = 0o644;
/// Directories that a guest recreates at each boot, or that are not on its disk.
const NOT_FILES: [&str; 4] = ["/dev", "/proc", "/sys", "/run"];

/// A file that is copied into every guest, whichever user owns the VM.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct SyncedFile {
    /// The path on the host.
    pub from: PathBuf,
    /// The path in the guest. An existing file is replaced, and missing directories are created.
    pub to: PathBuf,
    /// The permissions in octal, such as `"0600"`. The default is 0644. The guest's root owns the
    /// file.
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
        let mode = u32::from_str_radix(&text, 8)
            .ok()
            .filter(|mode| *mode <= 0o777);
        mode.map(Self)
            .ok_or_else(|| format!("mode {text:?}: give permissions in octal, as in \"0644\""))
    }
}

/// # Errors
/// `invalid_config`.
pub(super) fn validate(files: &[SyncedFile]) -> Result<()> {
    let bad = |what: String| Err(Error::new(Kind::InvalidConfig, what));
    if files.len() > FILES_MAX {
        return bad(format!(
            "there are {} [[sync]] sections, but at most {FILES_MAX} are allowed",
            files.len()
        ));
    }
    for (i, file) in files.iter().enumerate() {
        let to = file.to.display();
        if !file.from.is_absolute() {
            return bad(format!(
                "sync.from must be an absolute path: {}",
                file.from.display()
            ));
        }
        if !is_a_files_path(&file.to) {
            return bad(format!(
                "sync.to must be the absolute path of a file, without . or ..: {to}"
            ));
        }
        if let Some(place) = NOT_FILES.iter().find(|place| file.to.starts_with(place)) {
            return bad(format!(
                "sync.to is {to}, but {place} is not on the guest's disk"
            ));
        }
        if files[..i]
            .iter()
            .any(|other| other.to.starts_with(&file.to) || file.to.starts_with(&other.to))
        {
            return bad(format!(
                "sync.to is {to}, which conflicts with another [[sync]] section"
            ));
        }
    }
    Ok(())
}

/// True if the text of the path equals its components: no trailing slash, no `//`, no `.`.
fn is_a_files_path(path: &Path) -> bool {
    let Some(text) = path.to_str() else {
        return false;
    };
    let parts: Vec<&str> = path
        .components()
        .skip(1)
        .filter_map(|c| c.as_os_str().to_str())
        .collect();
    let is_plain = path
        .components()
        .skip(1)
        .all(|c| matches!(c, Component::Normal(_)));
    let has_control = text.chars().any(char::is_control);
    path.is_absolute()
        && is_plain
        && !parts.is_empty()
        && !has_control
        && format!("/{}", parts.join("/")) == text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(all: &[(&str, &str)]) -> Vec<SyncedFile> {
        all.iter()
            .map(|(from, to)| SyncedFile {
                from: from.into(),
                to: to.into(),
                mode: None,
            })
            .collect()
    }

    #[test]
    fn sync_paths_are_validated() {
        validate(&[]).unwrap();
        validate(&files(&[
            ("/etc/ca.crt", "/usr/local/share/ca-certificates/ca.crt"),
            ("/x", "/root/.npmrc"),
        ]))
        .unwrap();
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
            assert_eq!(
                validate(&files(&[(from, to)])).unwrap_err().kind(),
                Kind::InvalidConfig,
                "{from} {to}"
            );
        }
        for twice in [
            [("/x", "/a"), ("/y", "/a")],
            [("/x", "/a"), ("/y", "/a/b")],
            [("/x", "/a/b"), ("/y", "/a")],
        ] {
            assert!(validate(&files(&twice)).is_err(), "{twice:?}");
        }
        assert!(validate(&files(&vec![("/x", "/a"); FILES_MAX + 1])).is_err());
    }

    #[test]
    fn sync_permissions_are_octal() {
        let parse =
            |mode: &str| toml::from_str::<SyncedFile>(&format!("from = '/x'\nto = '/y'\n{mode}"));
        assert_eq!(parse("").unwrap().mode(), 0o644);
        assert_eq!(parse("mode = '0600'").unwrap().mode(), 0o600);
        for bad in [
            "mode = '9'",
            "mode = '4755'",
            "mode = 'rw'",
            "mode = 600",
            "what = 1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
