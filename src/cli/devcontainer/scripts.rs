//! Builds the scripts that run in the guest. All functions are pure.

use super::parse::{Run, Step};
use super::variables::{shell_line, shell_word};
use crate::host::shell::quote;

/// The file in the guest that sets the variables. Login shells read it, too.
const ENV_FILE: &str = "/etc/profile.d/fcd-devcontainer.sh";
/// This file exists once the commands for a new VM have succeeded.
const MARKER: &str = "/var/lib/fcd-devcontainer";
/// The log of commands that run in the background.
pub(super) const LOG: &str = "/tmp/fcd-devcontainer.log";
/// The status of [`prepare`] if the commands for a new VM have not succeeded yet.
pub(super) const IS_NEW: u8 = 3;

/// Returns the script that writes stdin to [`ENV_FILE`], and ends with [`IS_NEW`] if the VM is new.
pub(super) fn prepare() -> String {
    format!(
        "umask 022; mkdir -p /etc/profile.d && cat >{ENV_FILE} || exit 1; [ -e {MARKER} ] || exit {IS_NEW}"
    )
}

/// Returns the script that records that the commands for a new VM have succeeded.
pub(super) fn mark() -> String {
    format!("mkdir -p /var/lib && : >{MARKER}")
}

/// Returns the content of the file with the variables.
pub(super) fn environment(env: &[(String, Option<String>)]) -> String {
    env.iter()
        .map(|(name, value)| match value {
            Some(value) => format!("export {name}={}\n", shell_word(value)),
            None => format!("unset {name}\n"),
        })
        .collect()
}

/// Returns the command that runs a step and ends with its status.
pub(super) fn step(step: &Step) -> Vec<String> {
    let mut argv = vec!["sh".to_owned(), "-c".to_owned()];
    match &step.run {
        Run::Line(line) => argv.push(format!(". {ENV_FILE}\n{}", shell_line(line))),
        Run::Words(words) => {
            argv.push(format!(". {ENV_FILE}\nexec \"$@\""));
            argv.push("sh".to_owned());
            argv.extend(words.iter().cloned());
        }
        Run::Parallel(all) => argv.push(format!(". {ENV_FILE}\n{}", parallel(all))),
    }
    argv
}

fn parallel(all: &[(String, Run)]) -> String {
    let mut script = String::from("pids= status=0\n");
    for (_, run) in all {
        script.push_str(&format!("{} &\npids=\"$pids $!\"\n", one(run)));
    }
    script + "for pid in $pids; do wait \"$pid\" || status=$?; done\nexit $status"
}

/// Returns a simple command for the shell.
fn one(run: &Run) -> String {
    match run {
        Run::Line(line) => format!("sh -c {}", quote(&shell_line(line))),
        Run::Words(words) => words_line(words),
        // The format does not allow parallel commands inside parallel commands.
        Run::Parallel(_) => ":".to_owned(),
    }
}

fn words_line(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
    words.join(" ")
}

/// Returns the command that starts steps one after another, and does not wait for them.
pub(super) fn background(steps: &[&Step]) -> Vec<String> {
    let lines: Vec<String> = steps.iter().map(|one| words_line(&step(one))).collect();
    let all = quote(&lines.join(" && "));
    let script = format!("setsid sh -c {all} >{LOG} 2>&1 </dev/null &");
    vec!["sh".to_owned(), "-c".to_owned(), script]
}

/// Returns a step as a user reads it, one line for each command.
pub(super) fn shown(step: &Step) -> Vec<String> {
    let command = |run: &Run| match run {
        Run::Line(line) => line.clone(),
        Run::Words(words) => words_line(words),
        Run::Parallel(_) => String::new(),
    };
    match &step.run {
        Run::Parallel(all) => all
            .iter()
            .map(|(name, run)| format!("{} ({name}): {}", step.key, command(run)))
            .collect(),
        run => vec![format!("{}: {}", step.key, command(run))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::command::{Command, run_any_status};
    use crate::locks::Cancel;

    /// Runs a step with another file of variables, and returns its status and its sorted output.
    fn run(argv: &[String], env: &str) -> (i32, String) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, env).unwrap();
        let here = |word: &String| word.replace(ENV_FILE, file.to_str().unwrap());
        let command = Command::new(&argv[0]).args(argv[1..].iter().map(here));
        let out = run_any_status(&command, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
        let mut lines: Vec<_> = std::str::from_utf8(&out.stdout).unwrap().lines().collect();
        lines.sort_unstable();
        (out.status, lines.join("\n"))
    }

    fn of(run: Run) -> Step {
        Step {
            key: "postCreateCommand",
            run,
        }
    }

    fn words(words: &[&str]) -> Run {
        Run::Words(words.iter().map(|word| (*word).to_owned()).collect())
    }

    #[test]
    fn steps_run_with_the_variables() {
        let env = [
            ("A".to_owned(), Some("it's $(x)".to_owned())),
            ("B".to_owned(), Some("${containerEnv:A}+".to_owned())),
            ("HOME".to_owned(), None),
        ];
        let env = environment(&env);
        let line = Run::Line("echo \"$B\" ${containerEnv:HOME:none}; exit 3".to_owned());
        let (status, out) = run(&step(&of(line)), &env);
        assert_eq!((status, out.as_str()), (3, "it's $(x)+ none"));
        let (status, out) = run(&step(&of(words(&["printf", "%s", "$A it's"]))), &env);
        assert_eq!((status, out.as_str()), (0, "$A it's"));
    }

    #[test]
    fn parallel_steps_end_with_a_failure_of_one() {
        let both = |line: &str| {
            Run::Parallel(vec![
                ("a".to_owned(), Run::Line(line.to_owned())),
                ("b".to_owned(), words(&["echo", "b c"])),
            ])
        };
        let (status, out) = run(&step(&of(both("echo a; exit 4"))), "");
        assert_eq!((status, out.as_str()), (4, "a\nb c"));
        assert_eq!(run(&step(&of(both(":"))), ""), (0, "b c".to_owned()));
    }

    #[test]
    fn background_steps_run_in_order() {
        let argv = background(&[
            &of(Run::Line("echo \"it's\"".to_owned())),
            &of(words(&["echo", "b  c"])),
        ]);
        let script = argv[2].replace(" >/tmp/fcd-devcontainer.log 2>&1 </dev/null &", "");
        let argv = ["sh".to_owned(), "-c".to_owned(), script];
        assert_eq!(run(&argv, ""), (0, "b  c\nit's".to_owned()));
    }

    #[test]
    fn steps_are_shown_as_written() {
        assert_eq!(
            shown(&of(Run::Parallel(vec![
                ("a".to_owned(), Run::Line("x y".to_owned())),
                ("b".to_owned(), words(&["x y"])),
            ]))),
            ["postCreateCommand (a): x y", "postCreateCommand (b): 'x y'"]
        );
    }
}
