//! Builds a command line for the guest's shell from words that may contain any byte except NUL.

use super::user::{CANNOT_BEGIN_STATUS, GuestUser};
use crate::error::{Error, Result};
use crate::host::shell::quote_bytes;
use crate::host::text::quoted;

/// The beginning of the line on stderr if the working directory cannot be entered.
const CANNOT_ENTER: &str = "fcd: cannot enter the directory ";

/// The part of the line that starts a subshell for the command and waits for it. sshd reports few
/// signals by name and none by number, so the outer shell stays and exits with 128+n. The outer
/// shell survives signals that are sent to its process group, and prints no messages such as `Bus
/// error`.
const WAIT: &str =
    "exec 3>&2 2>/dev/null; trap : 1 2 3 4 5 6 7 8 10 11 12 13 14 15 16 24 25 26 27 29 30 31; (";
const WAIT_END: &str = " 2>&3 3>&-); exit $?";

/// Builds a line that changes to `workdir` and runs `argv` as `user` with the environment `env`. An
/// empty `argv` runs the login shell. Without a user, the command runs as the user who logged in.
/// The line exits with the command's status, or with 128+n after a signal. The guest's shell
/// produces 126 and 127; [`CANNOT_BEGIN_STATUS`] means that `workdir` cannot be entered or that
/// there is no such user. Returns `invalid_argument` for a NUL and for an invalid variable name.
pub fn command_bytes(
    argv: &[Vec<u8>],
    env: &[(String, Vec<u8>)],
    workdir: Option<&[u8]>,
    user: Option<&GuestUser>,
) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    if let Some(user) = user {
        line.extend(user.look_up().into_bytes());
    }
    if let Some(dir) = workdir.filter(|d| !d.is_empty()) {
        // The prefix prevents `cd` from reading the name as an option or as `-` (the previous
        // directory), and from searching CDPATH.
        let path = if dir.starts_with(b"/") {
            dir.to_vec()
        } else {
            [b"./", dir].concat()
        };
        let complaint = quote_bytes(&[CANNOT_ENTER.as_bytes(), dir].concat());
        line.extend(
            [
                b"cd ".as_slice(),
                &quote_bytes(&path),
                b" 2>/dev/null || { printf '%s\\n' ",
                &complaint,
            ]
            .concat(),
        );
        line.extend(format!(" >&2; exit {CANNOT_BEGIN_STATUS}; }}; ").into_bytes());
    }
    if !argv.is_empty() {
        line.extend(WAIT.as_bytes());
    }
    line.extend(b"exec");
    if user.is_some() {
        line.extend(GuestUser::BECOME.as_bytes());
    }
    if !env.is_empty() {
        line.extend(b" env --");
    }
    for (name, value) in env {
        check_variable(name)?;
        line.extend([b" ".as_slice(), name.as_bytes(), b"=", &quote_bytes(value)].concat());
    }
    line.extend(program(argv, !env.is_empty()));
    if !argv.is_empty() {
        line.extend(WAIT_END.as_bytes());
    }
    if line.contains(&0) {
        return Err(Error::invalid(
            "a command, its environment and its directory cannot hold a NUL",
        ));
    }
    Ok(line)
}

fn program(argv: &[Vec<u8>], after_env: bool) -> Vec<u8> {
    let Some(first) = argv.first() else {
        return br#" sh -c '[ -x "$SHELL" ] || SHELL=/bin/sh; exec "$SHELL" -l'"#.to_vec();
    };
    let words: Vec<u8> = argv
        .iter()
        .flat_map(|word| [b" ".to_vec(), quote_bytes(word)].concat())
        .collect();
    // In some shells, `exec` reads `-x` as its own option. env(1) reads `a=b` as a variable.
    if first.starts_with(b"-") || (after_env && first.contains(&b'=')) {
        return [br#" sh -c '"$@"' sh"#.as_slice(), &words].concat();
    }
    words
}

/// # Errors
/// `invalid_argument` if this is not the name of an environment variable.
pub fn check_variable(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first_is_good = bytes
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if first_is_good && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} is not a valid environment variable name",
        quoted(name)
    ))
    .hint("use A-Z, a-z, 0-9 and _, as in -e NAME=VALUE"))
}

/// Calls [`command_bytes`] with words that are text.
#[cfg(test)]
pub fn command_line(
    argv: &[String],
    env: &[(String, String)],
    workdir: Option<&str>,
) -> Result<String> {
    let argv: Vec<Vec<u8>> = argv.iter().map(|word| word.clone().into()).collect();
    let env: Vec<(String, Vec<u8>)> = env
        .iter()
        .map(|(name, value)| (name.clone(), value.clone().into()))
        .collect();
    Ok(String::from_utf8(command_bytes(
        &argv,
        &env,
        workdir.map(str::as_bytes),
        None,
    )?)
    .expect("built from UTF-8 strings"))
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

    /// Runs a line as sshd does, with the login shell's `-c`.
    fn run(shell: &str, line: &str) -> Output {
        let command = Command::new(shell)
            .args(["-c", line])
            .env("SHELL", shell)
            .env("CDPATH", "/");
        run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap()
    }

    const SHELLS: [&str; 2] = ["/bin/dash", "/bin/bash"];
    /// A script that prints each argument followed by a NUL.
    const PRINTER: &str = r#"for a in "$@"; do printf '%s\0' "$a"; done"#;

    fn check_round_trip(words: &[String], env: &[(String, String)], dir: Option<&str>) {
        let argv: Vec<String> = strings(&["sh", "-c", PRINTER, "x"])
            .into_iter()
            .chain(words.iter().cloned())
            .collect();
        let line = command_line(&argv, env, dir).unwrap();
        let wanted: Vec<u8> = words
            .iter()
            .flat_map(|w| [w.as_bytes(), b"\0"].concat())
            .collect();
        for shell in SHELLS {
            let output = run(shell, &line);
            assert_eq!(
                (output.status, &output.stdout),
                (0, &wanted),
                "{shell}: {line}"
            );
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
    fn quote_preserves_special_characters() {
        let words = strings(&[
            "", "-n", "--", "a b", "it's", "''", "\\", "\\'", "\n", "a\nb", "$HOME", "`id`", "*",
            "~", "!!", "é", "a=b", "#",
        ]);
        check_round_trip(&words, &[("A".into(), "x y".into())], Some("/"));
    }

    #[test]
    fn command_line_enters_directories_of_any_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["plain", "-", "-x", "it's", "a\nb", " "] {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let absolute = command_line(&strings(&["pwd"]), &[], path.to_str()).unwrap();
            let relative = command_line(&strings(&["pwd"]), &[], Some(name)).unwrap();
            let relative = format!(
                "cd {}; {relative}",
                crate::host::shell::quote(dir.path().to_str().unwrap())
            );
            for (shell, line) in SHELLS.iter().flat_map(|s| [(s, &absolute), (s, &relative)]) {
                let output = run(shell, line);
                assert_eq!(
                    String::from_utf8(output.stdout).unwrap().strip_suffix('\n'),
                    path.to_str(),
                    "{shell}: {line}"
                );
            }
        }
    }

    #[test]
    fn command_line_keeps_exit_statuses() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("not-executable");
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        let some_env = [("A".to_owned(), "b".to_owned())];
        for shell in SHELLS {
            for env in [&[][..], &some_env] {
                let status = |argv: &[&str], dir| {
                    run(shell, &command_line(&strings(argv), env, dir).unwrap()).status
                };
                assert_eq!(status(&["sh", "-c", "exit 7"], None), 7);
                assert_eq!(status(&["no-such-command"], None), 127);
                assert_eq!(status(&["-no-such-command"], None), 127);
                assert_eq!(status(&["no=such"], None), 127);
                assert_eq!(status(&[file.to_str().unwrap()], None), 126);
            }
            let output = run(
                shell,
                &command_line(&strings(&["pwd"]), &[], Some("/no/such dir")).unwrap(),
            );
            assert_eq!(output.status, i32::from(CANNOT_BEGIN_STATUS));
            assert_eq!(
                String::from_utf8(output.stderr).unwrap(),
                format!("{CANNOT_ENTER}/no/such dir\n")
            );
        }
    }

    #[test]
    fn command_line_without_words_runs_the_login_shell() {
        let line = command_line(&[], &[("A".into(), "b".into())], None).unwrap();
        for shell in SHELLS {
            let command = Command::new(shell)
                .args(["-c", &line])
                .env("SHELL", shell)
                .env("HOME", "/nonexistent");
            let command = command.stdin("echo $A; echo $0; exit 3\n");
            let output =
                run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
            assert_eq!(
                (output.status, String::from_utf8(output.stdout).unwrap()),
                (3, format!("b\n{shell}\n"))
            );
        }
    }

    #[test]
    fn command_line_with_invalid_input_is_rejected() {
        for name in ["", "1A", "A B", "A=B", "A-B", "é", "A\0"] {
            assert!(
                command_line(&[], &[(name.into(), String::new())], None).is_err(),
                "{name:?}"
            );
        }
        assert!(command_line(&strings(&["a\0b"]), &[], None).is_err());
        assert!(command_line(&[], &[], Some("\0")).is_err());
    }

    /// sshd has no name for some of these signals, so the shell must turn each one into a status.
    /// It must also print nothing.
    #[test]
    fn command_line_maps_signals_to_shell_statuses() {
        let all = [
            ("BUS", 135),
            ("SYS", 159),
            ("TRAP", 133),
            ("XCPU", 152),
            ("STKFLT", 144),
            ("35", 163),
            ("64", 192),
        ];
        for (signal, status) in all.into_iter().chain([
            ("TERM", 143),
            ("KILL", 137),
            ("SEGV", 139),
            ("INT", 130),
            ("HUP", 129),
        ]) {
            let line = command_line(
                &strings(&["bash", "-c", &format!("ulimit -c 0; kill -{signal} $$")]),
                &[],
                None,
            )
            .unwrap();
            for shell in SHELLS {
                let output = run(shell, &line);
                assert_eq!(
                    (output.status, output.stderr),
                    (status, vec![]),
                    "{shell} {signal}"
                );
            }
        }
    }

    #[test]
    fn command_line_passes_bytes_that_are_not_utf8() {
        let raw: Vec<u8> = (1..=255).collect();
        let words = |argv: &[&[u8]]| argv.iter().map(|w| w.to_vec()).collect::<Vec<_>>();
        let dir = tempfile::tempdir().unwrap();
        let at = [dir.path().as_os_str().as_encoded_bytes(), b"/\xff'\xfe"].concat();
        std::fs::create_dir(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(&at))
            .unwrap();
        let script = b"pwd; printf '%s' \"$1$A\"";
        let line = command_bytes(
            &words(&[b"sh", b"-c", script, b"x", &raw]),
            &[("A".into(), raw.clone())],
            Some(&at),
            None,
        )
        .unwrap();
        let wanted = [at.as_slice(), b"\n", &raw, &raw].concat();
        let line = <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(line);
        for shell in SHELLS {
            let command = Command::new(shell).arg("-c").arg(line.clone());
            let output =
                run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
            assert_eq!(
                (output.status, output.stdout == wanted),
                (0, true),
                "{shell}: {:?}",
                output.stdout
            );
        }
    }
}
