//! Checks where a workspace may be in a guest.

use crate::error::{Error, Kind, Result};

/// The directories that a workspace must be below. `/workspace` itself is also allowed.
pub const ROOTS: &[&str] = &["/home", "/root", "/srv", "/workspace", "/workspaces"];
/// Maximum length of a guest path, in bytes.
pub const GUEST_PATH_BYTES_MAX: usize = 200;
/// Names that no component may have. `.ssh` decides who can log in, and `.git` holds a repository's
/// own files.
const RESERVED: &[&str] = &[".git", ".ssh"];
const NAME_BYTES_MAX: usize = 64;

fn refuse(path: &str, why: &str) -> Error {
    Error::new(Kind::InvalidGuestPath, format!("guest path {path:?} {why}")).hint(format!(
        "give an absolute path below one of {}, such as /root/project",
        ROOTS.join(", ")
    ))
}

/// Checks a path from the caller and removes a trailing slash. Returns `invalid_guest_path` if the
/// path is not absolute, is not normalized, is outside [`ROOTS`], is too long, or contains a
/// reserved name or a control character.
pub fn validate(path: &str) -> Result<String> {
    let trimmed = path.trim_end_matches('/');
    if path.len() > GUEST_PATH_BYTES_MAX {
        return Err(refuse(
            path,
            &format!("is longer than {GUEST_PATH_BYTES_MAX} bytes"),
        ));
    }
    if !trimmed.starts_with('/') {
        return Err(refuse(path, "is not absolute"));
    }
    check_components(&trimmed[1..]).map_err(|why| refuse(path, &why))?;
    let inside = |root: &&str| {
        trimmed
            .strip_prefix(*root)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    if !ROOTS.iter().any(inside) && trimmed != "/workspace" {
        return Err(refuse(path, "is not below a directory for workspaces"));
    }
    Ok(trimmed.to_owned())
}

/// Checks the directory in which commands start. It must be empty, or relative to the guest path
/// and normalized. Returns `invalid_argument` otherwise.
pub fn validate_subdir(subdir: &str) -> Result<()> {
    if subdir.is_empty() {
        return Ok(());
    }
    if subdir.len() > super::PATH_BYTES_MAX {
        return Err(Error::invalid(format!(
            "subdirectory is longer than {} bytes",
            super::PATH_BYTES_MAX
        )));
    }
    check_components(subdir).map_err(|why| Error::invalid(format!("subdirectory {subdir:?} {why}")))
}

fn check_components(path: &str) -> Result<(), String> {
    if path.chars().any(char::is_control) {
        return Err("has control characters".into());
    }
    for part in path.split('/') {
        match part {
            "" => return Err("has an empty component".into()),
            "." | ".." => return Err(format!("has a component {part:?}")),
            _ if RESERVED.iter().any(|r| part.eq_ignore_ascii_case(r)) => {
                return Err(format!("has a component {part:?}"));
            }
            _ if part.len() > 255 => return Err("has a component longer than 255 bytes".into()),
            _ => {}
        }
    }
    Ok(())
}

/// Returns `/root/<name>` for a tree whose directory is called `name`.
pub fn default_for(name: &str) -> String {
    format!("/root/{}", sanitise(name.as_bytes()))
}

/// Turns a name into a component that [`validate`] accepts: at most 64 ASCII letters, digits, `.`,
/// `_` and `-`. A name of which nothing is left becomes `workspace`.
pub fn sanitise(name: &[u8]) -> String {
    let plain = |b: &u8| {
        if b.is_ascii_alphanumeric() || b"._-".contains(b) {
            *b as char
        } else {
            '-'
        }
    };
    let text: String = name.iter().map(plain).collect();
    let text = text.trim_start_matches(['.', '-']);
    let text = &text[..text.len().min(NAME_BYTES_MAX)];
    if text.is_empty() {
        "workspace".into()
    } else {
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_good_path_passes_without_trailing_slash() {
        for (given, want) in [
            ("/root/x", "/root/x"),
            ("/home/u/a b/", "/home/u/a b"),
            ("/workspace", "/workspace"),
            ("/workspace/", "/workspace"),
            ("/srv/é", "/srv/é"),
        ] {
            assert_eq!(validate(given).unwrap(), want);
        }
    }

    #[test]
    fn validate_bad_path_is_rejected_with_a_hint() {
        let long = format!("/root/{}", "x".repeat(300));
        for bad in [
            "",
            "/",
            "x",
            "../x",
            "/etc",
            "/etc/x",
            "/root",
            "/home",
            "/root/",
            "/root/../etc",
            "/root/./x",
            "/root//x",
            "/rootx/y",
            "/root/x\n",
            "/root/\u{1b}[0m",
            "/root/.ssh",
            "/root/x/.git",
            "/root/.SSH/x",
            "/proc/self",
            "/var/lib/fcd",
            &long,
        ] {
            let e = validate(bad).unwrap_err();
            assert_eq!(e.kind(), Kind::InvalidGuestPath, "{bad:?}");
            assert!(e.hint_text().is_some());
        }
    }

    #[test]
    fn default_path_of_any_name_is_valid() {
        for name in [
            "fcd",
            "",
            ".git",
            "-rf",
            "a b\n",
            "...",
            "é",
            &"y".repeat(300),
            ".ssh",
        ] {
            validate(&default_for(name)).unwrap();
        }
        assert_eq!(default_for("My Repo"), "/root/My-Repo");
    }

    #[test]
    fn validate_subdir_accepts_only_relative_normalized_paths() {
        for good in ["", "a", "a/b c"] {
            validate_subdir(good).unwrap();
        }
        for bad in ["/a", "a/", "../a", "a//b", "a/./b", ".git/x"] {
            assert!(validate_subdir(bad).is_err(), "{bad:?}");
        }
    }
}
