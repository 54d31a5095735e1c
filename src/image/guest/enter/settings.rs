//! The settings of an image, which the seed drive contains for the login shell.

/// The path that a command searches if its image sets none (Docker's default).
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `USER[:GROUP]`, or empty for root.
    pub user: String,
    /// The directory in which commands start, or empty for `/`.
    pub working_dir: String,
    pub env: Vec<Variable>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Variable {
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

/// Parses the records, which end with NUL: `user=USER`, `working_dir=PATH` and `env=NAME=VALUE`. A
/// record of another form is skipped, because a newer daemon may have written it.
pub(crate) fn parse(bytes: &[u8]) -> Settings {
    let mut settings = Settings::default();
    for record in bytes.split(|b| *b == 0) {
        let Some((key, value)) = split(record) else {
            continue;
        };
        match key {
            b"user" => settings.user = String::from_utf8_lossy(value).into_owned(),
            b"working_dir" => settings.working_dir = String::from_utf8_lossy(value).into_owned(),
            b"env" => {
                if let Some((name, value)) = split(value).filter(|(name, _)| !name.is_empty()) {
                    settings.env.push(Variable {
                        name: name.to_vec(),
                        value: value.to_vec(),
                    });
                }
            }
            _ => {}
        }
    }
    settings
}

/// A line before a command that names the user to run it. Every other shell takes it for a comment.
const USER_LINE: &[u8] = b"#fcd-user ";

/// A command of the daemon or of a user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// The user in the first line, as `USER[:GROUP]`.
    pub user: Option<String>,
    pub command: &'a [u8],
}

/// Separates the line that names the user from the command.
pub(crate) fn split_line(line: &[u8]) -> Line<'_> {
    let found = line.strip_prefix(USER_LINE).and_then(|rest| {
        let end = rest.iter().position(|b| *b == b'\n')?;
        let user = std::str::from_utf8(&rest[..end]).ok()?;
        Some((user.to_owned(), &rest[end + 1..]))
    });
    match found {
        Some((user, command)) => Line {
            user: Some(user),
            command,
        },
        None => Line {
            user: None,
            command: line,
        },
    }
}

/// Splits `NAME=VALUE`.
fn split(record: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = record.iter().position(|b| *b == b'=')?;
    Some((&record[..at], &record[at + 1..]))
}

/// Returns the image's search path with the runtime's directory as its last entry, so that a
/// program of the image always comes first.
pub(crate) fn search_path(settings: &Settings, runtime: &str) -> Vec<u8> {
    let of_image = settings.env.iter().rfind(|v| v.name == b"PATH");
    let path = of_image.map_or(DEFAULT_PATH.as_bytes(), |v| &v.value);
    let separator: &[u8] = if path.is_empty() { b"" } else { b":" };
    [path, separator, runtime.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_parsed_and_unknown_ones_skipped() {
        let bytes = b"user=dev:video\0working_dir=/a b\0env=A=1=2\nx\0env==x\0env=NONE\0later=1\0\0env=B=\xff\0";
        let settings = parse(bytes);
        assert_eq!(
            (settings.user.as_str(), settings.working_dir.as_str()),
            ("dev:video", "/a b")
        );
        let env: Vec<_> = settings
            .env
            .iter()
            .map(|v| (v.name.as_slice(), v.value.as_slice()))
            .collect();
        assert_eq!(
            env,
            [(&b"A"[..], &b"1=2\nx"[..]), (&b"B"[..], &b"\xff"[..])]
        );
        assert_eq!(parse(b""), Settings::default());
    }

    #[test]
    fn user_is_named_in_the_first_line_only() {
        let split = |line: &'static str| {
            let found = split_line(line.as_bytes());
            (
                found.user,
                String::from_utf8_lossy(found.command).into_owned(),
            )
        };
        let named = |user: &str, command: &str| (Some(user.to_owned()), command.to_owned());
        assert_eq!(
            split("#fcd-user dev:5\ncd /\nls"),
            named("dev:5", "cd /\nls")
        );
        assert_eq!(split("#fcd-user 0\n"), named("0", ""));
        for line in [
            "ls",
            "#fcd-user dev",
            "ls\n#fcd-user dev\nx",
            "# fcd-user a\nb",
            "",
        ] {
            assert_eq!(split(line), (None, line.to_owned()));
        }
    }

    #[test]
    fn runtime_is_last_in_the_search_path() {
        let path =
            |bytes: &[u8]| String::from_utf8(search_path(&parse(bytes), "/.fcd/bin")).unwrap();
        assert_eq!(path(b""), format!("{DEFAULT_PATH}:/.fcd/bin"));
        assert_eq!(path(b"env=PATH=/a\0env=PATH=/b:/c\0"), "/b:/c:/.fcd/bin");
        assert_eq!(path(b"env=PATH=\0"), "/.fcd/bin");
    }
}
