//! Commands at top level that are short for a verb of a noun, such as `fcctl pull` for `fcctl image
//! pull`. They are expanded before clap parses the words, so each has the options and the help of
//! the long form.

use super::words;
use std::ffi::OsString;

struct ShortForm {
    word: &'static str,
    noun: &'static str,
    verb: &'static str,
}

const fn short(word: &'static str, noun: &'static str, verb: &'static str) -> ShortForm {
    ShortForm { word, noun, verb }
}

/// Places the short forms after the other commands in the help.
const DISPLAY_ORDER: usize = 100;

const SHORT_FORMS: &[ShortForm] = &[
    short("create", "vm", "create"),
    short("cp", "vm", "cp"),
    short("inspect", "vm", "show"),
    short("restart", "vm", "restart"),
    short("kill", "vm", "kill"),
    short("pause", "vm", "pause"),
    short("resume", "vm", "resume"),
    short("wait", "vm", "wait"),
    short("set", "vm", "set"),
    short("rename", "vm", "rename"),
    short("top", "vm", "top"),
    short("stats", "vm", "stats"),
    short("port", "vm", "ports"),
    short("fork", "vm", "fork"),
    short("images", "image", "list"),
    short("pull", "image", "pull"),
    short("build", "image", "build"),
    short("commit", "image", "commit"),
    short("history", "image", "history"),
    short("login", "image", "login"),
    short("logout", "image", "logout"),
];

/// Adds the short forms to the command line, for its help and for completions.
pub(super) fn add(cli: clap::Command) -> clap::Command {
    let short: Vec<clap::Command> = SHORT_FORMS
        .iter()
        .zip(DISPLAY_ORDER..)
        .map(|(form, order)| {
            let (noun, verb) = (form.noun, form.verb);
            let long = cli.find_subcommand(noun).expect("a noun");
            let long = long.find_subcommand(verb).expect("a verb").clone();
            // An alias such as `ls` belongs to the verb, not to the short form.
            long.name(form.word)
                .visible_alias(None)
                .alias(None)
                .about(format!("Short for {noun} {verb}"))
                .display_order(order)
        })
        .collect();
    cli.subcommands(short)
}

/// Returns the command line with a short form replaced by its long form, also after `help`.
pub(super) fn expand(cli: &clap::Command, args: &[OsString]) -> Vec<OsString> {
    let mut args = args.to_vec();
    let Some(form) = form_at(cli, &args) else {
        return args;
    };
    args.splice(form.0..=form.0, [form.1.noun.into(), form.1.verb.into()]);
    args
}

/// Returns the index of a short form, and the form.
fn form_at(cli: &clap::Command, args: &[OsString]) -> Option<(usize, &'static ShortForm)> {
    let mut at = words::noun_at(cli, args)?;
    if args[at] == "help" {
        at += 1;
    }
    let word = args.get(at)?;
    let form = SHORT_FORMS.iter().find(|form| *word == *form.word)?;
    Some((at, form))
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn short_forms_are_expanded() {
        let cli = add(Cli::command());
        for (line, expected) in [
            ("fcctl pull app", "fcctl image pull app"),
            ("fcctl images --json", "fcctl image list --json"),
            (
                "fcctl --socket pull --json port web",
                "fcctl --socket pull --json vm ports web",
            ),
            ("fcctl help build", "fcctl help image build"),
            ("fcctl inspect --help", "fcctl vm show --help"),
            ("fcctl exec pull pull", "fcctl exec pull pull"),
            ("fcctl image pull pull", "fcctl image pull pull"),
            ("fcctl help", "fcctl help"),
            ("fcctl", "fcctl"),
        ] {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let words = expand(&cli, &args);
            let words: Vec<_> = words.iter().map(|w| w.to_str().unwrap()).collect();
            assert_eq!(words.join(" "), expected);
        }
    }

    #[test]
    fn short_forms_are_in_the_help_once() {
        let mut cli = add(Cli::command());
        cli.build();
        let help = cli.render_help().to_string();
        for form in SHORT_FORMS {
            let short = format!("Short for {} {}\n", form.noun, form.verb);
            assert_eq!(help.matches(&short).count(), 1, "{}", form.word);
        }
        cli.debug_assert();
    }

    /// clap shows an option in the usage lines if the environment sets it.
    #[test]
    fn no_option_is_read_from_the_environment() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments() {
                assert!(arg.get_env().is_none(), "{}", arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&add(Cli::command()));
    }
}
