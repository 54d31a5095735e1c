//! One command line for the guest's shell, from words that may hold anything but NUL.

use crate::api::exec::COMMAND_BYTES_MAX;
use crate::error::{Error, Result};

/// What a command line gives when its directory cannot be entered, with a line on stderr that begins with
/// [`CANNOT_ENTER`].
pub const CANNOT_ENTER_STATUS: u8 = 125;
pub const CANNOT_ENTER: &str = "fcd: cannot enter the directory ";

/// A word that a POSIX shell reads back as `word`. NUL cannot be in one.
pub fn quote(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:@%+,".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// `cd` to `workdir`, then `exec` of `argv` in its environment; an empty `argv` is the login shell. 126 and 127
/// come as the guest's shell gives them; a directory that cannot be entered as [`CANNOT_ENTER_STATUS`].
/// `invalid_argument`: a NUL, a bad variable name, a line over `COMMAND_BYTES_MAX`.
pub fn command_line(argv: &[String], env: &[(String, String)], workdir: Option<&str>) -> Result<String> {
    let mut line = String::new();
    if let Some(dir) = workdir.filter(|d| !d.is_empty()) {
        // Neither an option, nor `-` for the last directory, nor a search through CDPATH.
        let path = if dir.starts_with('/') { dir.to_owned() } else { format!("./{dir}") };
        let complaint = quote(&format!("{CANNOT_ENTER}{dir}"));
        line +=
            &format!("cd {} 2>/dev/null || {{ printf '%s\\n' {complaint} >&2; exit {CANNOT_ENTER_STATUS}; }}; ", quote(&path));
    }
    line += "exec";
    if !env.is_empty() {
        line += " env --";
    }
    for (name, value) in env {
        check_name(name)?;
        line += &format!(" {name}={}", quote(value));
    }
    line += &program(argv, !env.is_empty());
    if line.contains('\0') {
        return Err(Error::invalid("a command, its environment and its directory cannot hold a NUL"));
    }
    if line.len() > COMMAND_BYTES_MAX {
        return Err(Error::invalid(format!("the command is {} bytes long, the limit is {COMMAND_BYTES_MAX}", line.len()))
            .hint("give long input through stdin (-i) or a file"));
    }
    Ok(line)
}

fn program(argv: &[String], after_env: bool) -> String {
    let Some(first) = argv.first() else {
        return r#" sh -c '[ -x "$SHELL" ] || SHELL=/bin/sh; exec "$SHELL" -l'"#.to_owned();
    };
    let words: String = argv.iter().map(|word| format!(" {}", quote(word))).collect();
    // `exec` of some shells takes `-x` for an option of its own, and env(1) takes `a=b` for a variable.
    if first.starts_with('-') || (after_env && first.contains('=')) {
        return format!(r#" sh -c '"$@"' sh{words}"#);
    }
    words
}

fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first_is_good = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if first_is_good && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    Err(Error::invalid(format!("{shown:?} is no name of an environment variable"))
        .hint("use A-Z, a-z, 0-9 and _, as in -e NAME=VALUE"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::command::{Command, Output, run_any_status};
    use crate::locks::Cancel;
    use proptest::prelude::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    /// Runs a line as sshd does: the login shell's `-c`.
    fn run(shell: &str, line: &str) -> Output {
        let command = Command::new(shell).args(["-c", line]).env("SHELL", shell).env("CDPATH", "/");
        run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap()
    }

    const SHELLS: [&str; 2] = ["/bin/dash", "/bin/bash"];
    /// Prints its arguments, each with a NUL.
    const PRINTER: &str = r#"for a in "$@"; do printf '%s\0' "$a"; done"#;

    fn check_round_trip(words: &[String], env: &[(String, String)], dir: Option<&str>) {
        let argv: Vec<String> = strings(&["sh", "-c", PRINTER, "x"]).into_iter().chain(words.iter().cloned()).collect();
        let line = command_line(&argv, env, dir).unwrap();
        let wanted: Vec<u8> = words.iter().flat_map(|w| [w.as_bytes(), b"\0"].concat()).collect();
        for shell in SHELLS {
            let output = run(shell, &line);
            assert_eq!((output.status, &output.stdout), (0, &wanted), "{shell}: {line}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn words_come_through_real_shells(words in proptest::collection::vec("[^\0]{0,12}", 1..6)) {
            check_round_trip(&words, &[], None);
        }
        #[test]
        fn values_come_through_real_shells(value in "[^\0]{0,20}") {
            let argv = strings(&["sh", "-c", r#"printf '%s' "$FCD_TEST""#]);
            let line = command_line(&argv, &[("FCD_TEST".into(), value.clone())], Some("/")).unwrap();
            for shell in SHELLS {
                prop_assert_eq!(run(shell, &line).stdout, value.as_bytes(), "{}: {}", shell, line);
            }
        }
    }

    #[test]
    fn awkward_words() {
        let words = strings(&[
            "", "-n", "--", "a b", "it's", "''", "\\", "\\'", "\n", "a\nb", "$HOME", "`id`", "*", "~", "!!", "é", "a=b", "#",
        ]);
        check_round_trip(&words, &[("A".into(), "x y".into())], Some("/"));
    }

    #[test]
    fn directories_of_any_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["plain", "-", "-x", "it's", "a\nb", " "] {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let absolute = command_line(&strings(&["pwd"]), &[], path.to_str()).unwrap();
            let relative = command_line(&strings(&["pwd"]), &[], Some(name)).unwrap();
            let relative = format!("cd {}; {relative}", quote(dir.path().to_str().unwrap()));
            for (shell, line) in SHELLS.iter().flat_map(|s| [(s, &absolute), (s, &relative)]) {
                let output = run(shell, line);
                assert_eq!(String::from_utf8(output.stdout).unwrap().strip_suffix('\n'), path.to_str(), "{shell}: {line}");
            }
        }
    }

    #[test]
    fn statuses() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("not-executable");
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        let some_env = [("A".to_owned(), "b".to_owned())];
        for shell in SHELLS {
            for env in [&[][..], &some_env] {
                let status = |argv: &[&str], dir| run(shell, &command_line(&strings(argv), env, dir).unwrap()).status;
                assert_eq!(status(&["sh", "-c", "exit 7"], None), 7);
                assert_eq!(status(&["no-such-command"], None), 127);
                assert_eq!(status(&["-no-such-command"], None), 127);
                assert_eq!(status(&["no=such"], None), 127);
                assert_eq!(status(&[file.to_str().unwrap()], None), 126);
            }
            let output = run(shell, &command_line(&strings(&["pwd"]), &[], Some("/no/such dir")).unwrap());
            assert_eq!(output.status, i32::from(CANNOT_ENTER_STATUS));
            assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("{CANNOT_ENTER}/no/such dir\n"));
        }
    }

    #[test]
    fn no_words_are_the_login_shell() {
        let line = command_line(&[], &[("A".into(), "b".into())], None).unwrap();
        for shell in SHELLS {
            let command = Command::new(shell).args(["-c", &line]).env("SHELL", shell).env("HOME", "/nonexistent");
            let command = command.stdin("echo $A; echo $0; exit 3\n");
            let output = run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
            assert_eq!((output.status, String::from_utf8(output.stdout).unwrap()), (3, format!("b\n{shell}\n")));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for name in ["", "1A", "A B", "A=B", "A-B", "é", "A\0"] {
            assert!(command_line(&[], &[(name.into(), String::new())], None).is_err(), "{name:?}");
        }
        assert!(command_line(&strings(&["a\0b"]), &[], None).is_err());
        assert!(command_line(&[], &[], Some("\0")).is_err());
        assert!(command_line(&["x".repeat(COMMAND_BYTES_MAX)], &[], None).unwrap_err().hint_text().is_some());
    }
}
