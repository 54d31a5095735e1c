//! Finds the command in `fcctl run`, `exec` and `ssh`, which need no `--` before it.
//!
//! The command of `exec` and `ssh` begins with the first word after the VM, and that of `run` with
//! the first word after a directory. After `--image`, the first word without `/` that is not `.` is
//! the command, as with docker. All words after the command's first word belong to the command.
//! clap cannot make these distinctions, so the missing `--` is inserted before clap sees the words.
//! If the first word of `run` is not a directory, the words stay unchanged, and
//! [`without_separator`] explains the error.

use super::values::is_path;
use crate::error::Error;
use crate::host::shell::quote;
use crate::host::text::quoted;
use crate::ids::ImageRef;
use std::ffi::OsString;
use std::path::Path;

/// Returns the words of a command line with `--` before the command, if it is missing.
pub(super) fn with_separator(cli: &clap::Command, args: &[OsString]) -> Vec<OsString> {
    let mut args = args.to_vec();
    if let Some(at) = command_at(cli, &args) {
        args.insert(at, "--".into());
    }
    args
}

/// Replaces `--format json` before the command of a guest with `--json`, which every command has.
pub(super) fn with_json(args: &[OsString]) -> Vec<OsString> {
    let mut words = args.iter().peekable();
    let mut replaced = Vec::new();
    while let Some(word) = words.next() {
        let is_pair = word == "--format" && words.peek().is_some_and(|next| *next == "json");
        if is_pair {
            words.next();
        }
        if is_pair || word == "--format=json" {
            replaced.push("--json".into());
            continue;
        }
        replaced.push(word.clone());
        if word == "--" {
            replaced.extend(words.by_ref().cloned());
        }
    }
    replaced
}

/// Returns the index of the command in a command line, if no `--` precedes it.
fn command_at(cli: &clap::Command, args: &[OsString]) -> Option<usize> {
    let noun = first_plain(cli, args.get(1..)?)?;
    let begin = noun.at + 2;
    let command = cli.find_subcommand(&noun.word)?;
    let first = first_plain(command, args.get(begin..)?)?;
    match noun.word.as_str() {
        "exec" | "ssh" => {}
        "run" if first.is_command() => return Some(begin + first.at),
        "run" if first.is_directory() => {}
        _ => return None,
    }
    let behind = begin + first.at + 1;
    let second = first_plain(command, args.get(behind..)?)?;
    Some(behind + second.at)
}

/// Returns the index of the first word that is neither an option nor the value of one.
pub(super) fn noun_at(cli: &clap::Command, args: &[OsString]) -> Option<usize> {
    Some(first_plain(cli, args.get(1..)?)?.at + 1)
}

/// Returns the index after the word `run`, if it is the noun of this command line.
fn run_at(cli: &clap::Command, args: &[OsString]) -> Option<usize> {
    let first = first_plain(cli, args.get(1..)?)?;
    (first.word == "run").then_some(first.at + 2)
}

/// The first word that is neither an option nor the value of one.
struct First {
    at: usize,
    word: String,
    /// True if `--image` precedes it.
    has_image: bool,
}

impl First {
    /// True if the word is the command of a `run` with an image.
    fn is_command(&self) -> bool {
        self.has_image && !is_path(&self.word) && !self.word.contains('/')
    }

    /// True if the word is the directory of a `run`. A path that does not exist counts, so that the
    /// error is about the path.
    fn is_directory(&self) -> bool {
        self.has_image || is_path(&self.word) || Path::new(&self.word).is_dir()
    }
}

fn first_plain(command: &clap::Command, args: &[OsString]) -> Option<First> {
    let (mut at, mut has_image) = (0, false);
    loop {
        match Word::of(command, args.get(at)?) {
            Word::Option { words, is_image } => {
                at += words;
                has_image |= is_image;
            }
            Word::Plain(word) => {
                return Some(First {
                    at,
                    word,
                    has_image,
                });
            }
            Word::Separator => return None,
        }
    }
}

/// True for `exec` and `run`, which report their own failures as 125, even if the rest of the
/// command line cannot be parsed.
pub(super) fn runs_in_guest(args: &[OsString]) -> bool {
    let mut words = args.iter().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--socket" | "--format") => drop(words.next()),
            Some(word) if word.starts_with('-') => {}
            Some(word) => return word == "exec" || word == "run",
            None => return false,
        }
    }
    false
}

/// Returns the noun of a command line and, if the noun has verbs, the word in the verb's place.
pub(super) fn noun_and_verb(
    cli: &clap::Command,
    args: &[OsString],
) -> Option<(String, Option<String>)> {
    let noun = first_plain(cli, args.get(1..)?)?;
    let verb = cli
        .find_subcommand(&noun.word)
        .filter(|command| command.has_subcommands())
        .and_then(|command| first_plain(command, args.get(noun.at + 2..)?));
    Some((noun.word, verb.map(|first| first.word)))
}

/// Explains `fcctl run FIRST CMD` if FIRST is not a directory. `command` is the first word of the
/// command.
pub(super) fn without_separator(
    cli: &clap::Command,
    args: &[OsString],
    command: &str,
) -> Option<Error> {
    let run = run_at(cli, args)?;
    let first = first_plain(cli.find_subcommand("run")?, &args[run..])?;
    let first_at = run + first.at;
    let rest = &args[first_at + 1..];
    let command_at = first_at + 1 + rest.iter().position(|word| word == command)?;
    let (options, cmd) = (line(&args[1..first_at]), line(&args[command_at..]));
    let between = line(&args[first_at + 1..command_at]);
    let word = quote(&first.word);
    let as_directory = |dir: &str| format!("fcctl{options} {dir}{between} --{cmd}");
    let text = format!("{} is not a directory", quoted(&first.word));
    let mut hint = format!("to copy a directory, name it: {}", as_directory("."));
    if first.word.parse::<ImageRef>().is_ok() {
        hint = format!("if it is an image: fcctl{options}{between} --image {word}{cmd}\n{hint}");
    }
    Some(Error::invalid(text).hint(hint))
}

/// Joins words for a shell, each with a space before it.
fn line(words: &[OsString]) -> String {
    let words = words.iter().map(|word| quote(&word.to_string_lossy()));
    words.map(|word| format!(" {word}")).collect()
}

/// A word at a place where an option can be.
enum Word {
    Option {
        /// 2 if the next word is the option's value.
        words: usize,
        is_image: bool,
    },
    Separator,
    Plain(String),
}

impl Word {
    fn of(command: &clap::Command, word: &OsString) -> Self {
        let word = word.to_string_lossy();
        let takes_value = |arg: &clap::Arg| arg.get_action().takes_values();
        if word == "--" {
            return Self::Separator;
        }
        if let Some(long) = word.strip_prefix("--") {
            let name = long.split('=').next().unwrap_or_default();
            // Every command takes `--format json`.
            let takes_next = !long.contains('=')
                && (name == "format"
                    || command
                        .get_arguments()
                        .any(|arg| arg.get_long() == Some(name) && takes_value(arg)));
            return Self::Option {
                words: 1 + usize::from(takes_next),
                is_image: name == "image",
            };
        }
        let Some(shorts) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
            return Self::Plain(word.into_owned());
        };
        // The first option with a value takes the rest of the word, or the next one.
        let with_value = shorts.char_indices().find(|(_, short)| {
            command
                .get_arguments()
                .any(|arg| arg.get_short() == Some(*short) && takes_value(arg))
        });
        let takes_next = with_value.is_some_and(|(i, short)| i + short.len_utf8() == shorts.len());
        Self::Option {
            words: 1 + usize::from(takes_next),
            is_image: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[track_caller]
    fn check(line: &str, expected: &str) {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let mut cli = Cli::command();
        cli.build();
        let words = with_separator(&cli, &args);
        let words: Vec<_> = words.iter().map(|w| w.to_str().unwrap()).collect();
        assert_eq!(words.join(" "), expected);
    }

    #[test]
    fn first_word_after_image_is_command() {
        for (line, expected) in [
            (
                "fcctl run --image alpine ls /",
                "fcctl run --image alpine -- ls /",
            ),
            (
                "fcctl run --image=a:1 -it sh -l",
                "fcctl run --image=a:1 -it -- sh -l",
            ),
            (
                "fcctl --socket S --json run --rm -n box --image a -e A=b -uroot ls --rm",
                "fcctl --socket S --json run --rm -n box --image a -e A=b -uroot -- ls --rm",
            ),
            (
                "fcctl run --image a -ie A=b ls",
                "fcctl run --image a -ie A=b -- ls",
            ),
            (
                "fcctl run --image a ls -- x",
                "fcctl run --image a -- ls -- x",
            ),
            ("fcctl run . make test", "fcctl run . -- make test"),
            (
                "fcctl run /bin --image a --rm ls -l",
                "fcctl run /bin --image a --rm -- ls -l",
            ),
            (
                "fcctl run --image a ./repo make -j2",
                "fcctl run --image a ./repo -- make -j2",
            ),
            ("fcctl run ../none make", "fcctl run ../none -- make"),
            (
                "fcctl run --image a .. make",
                "fcctl run --image a .. -- make",
            ),
        ] {
            check(line, expected);
        }
    }

    #[test]
    fn command_begins_behind_vm() {
        for (line, expected) in [
            ("fcctl exec web ls /", "fcctl exec web -- ls /"),
            ("fcctl exec -it web bash", "fcctl exec -it web -- bash"),
            (
                "fcctl exec web -i -e A=b tar x -- -C /",
                "fcctl exec web -i -e A=b -- tar x -- -C /",
            ),
            (
                "fcctl exec web git log -- file",
                "fcctl exec web -- git log -- file",
            ),
            (
                "fcctl --socket exec exec --user dev web id",
                "fcctl --socket exec exec --user dev web -- id",
            ),
            (
                "fcctl exec --format json web prog --format json",
                "fcctl exec --format json web -- prog --format json",
            ),
            ("fcctl ssh web uptime", "fcctl ssh web -- uptime"),
            (
                "fcctl ssh -u dev web ls -l",
                "fcctl ssh -u dev web -- ls -l",
            ),
        ] {
            check(line, expected);
        }
    }

    #[test]
    fn format_json_is_json() {
        for (line, expected) in [
            ("fcctl --format json ps -a", "fcctl --json ps -a"),
            ("fcctl op list --format=json", "fcctl op list --json"),
            (
                "fcctl exec --format json web -- p --format json",
                "fcctl exec --json web -- p --format json",
            ),
            ("fcctl ps --format {{.Name}}", "fcctl ps --format {{.Name}}"),
            ("fcctl ps --format", "fcctl ps --format"),
        ] {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let words = with_json(&args);
            let words: Vec<_> = words.iter().map(|w| w.to_str().unwrap()).collect();
            assert_eq!(words.join(" "), expected);
        }
    }

    #[test]
    fn other_lines_are_unchanged() {
        for line in [
            "fcctl",
            "fcctl run",
            "fcctl run repo -- make",
            "fcctl run repo --image a -- make",
            "fcctl run --image a",
            "fcctl run --image a . -- make",
            "fcctl run --image a ./repo -- make",
            "fcctl run --image a /bin -- make",
            "fcctl run --image a -- make",
            "fcctl run --rm -- --image a ls",
            "fcctl run alpine ls",
            "fcctl run -it ghcr.io/a/b:1 sh",
            "fcctl exec web",
            "fcctl exec -it web -i",
            "fcctl exec web -i -- tar x",
            "fcctl exec web -- git log -- file",
            "fcctl ssh web -- -L 8080:localhost:80",
            "fcctl ps exec ls",
            "fcctl image build --image run ls",
        ] {
            check(line, line);
        }
    }
}
