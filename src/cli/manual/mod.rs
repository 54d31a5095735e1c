//! Writes the files of a package that are generated from the command line: man pages and
//! completions. Only `scripts/package` runs `fcctl __package DIR`.

mod roff;

use super::{completions, help, syntax};
use crate::error::{Error, Result};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The hidden command that writes the files.
const COMMAND: &str = "__package";
/// The section of man pages about commands.
const COMMANDS: &str = "1";
/// The section of man pages about topics.
const TOPICS: &str = "7";

/// Returns the directory that `fcctl __package DIR` names.
pub(super) fn target(args: &[OsString]) -> Option<PathBuf> {
    match args {
        [_, command, dir] if command == COMMAND => Some(dir.into()),
        _ => None,
    }
}

/// Writes all files below a directory, each at its place below `/usr/share`.
pub(super) fn write(dir: &Path) -> Result<()> {
    let mut cli = syntax();
    cli.build();
    pages(&cli, "fcctl", &mut |name, text| {
        put(dir, &format!("man/man1/{name}.1"), text)
    })?;
    for (topic, about, page) in help::TOPICS {
        let text = roff::page(topic, about, page, TOPICS);
        put(dir, &format!("man/man7/fcd-{topic}.7"), &text)?;
    }
    for (shell, place) in [
        (Shell::Bash, "bash-completion/completions/fcctl"),
        (Shell::Zsh, "zsh/vendor-completions/_fcctl"),
        (Shell::Fish, "fish/vendor_completions.d/fcctl.fish"),
    ] {
        put(dir, place, completions::of(shell))?;
    }
    Ok(())
}

fn put(dir: &Path, place: &str, text: &str) -> Result<()> {
    let path = dir.join(place);
    let doing = |e| Error::io(format!("write {}", path.display()), e);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(doing)?;
    }
    std::fs::write(&path, text).map_err(doing)
}

/// Passes the page of a command and those of its subcommands to `each`.
fn pages(
    command: &clap::Command,
    name: &str,
    each: &mut dyn FnMut(&str, &str) -> Result<()>,
) -> Result<()> {
    each(name, &page(command.clone(), name, COMMANDS)?)?;
    for sub in command.get_subcommands() {
        if !sub.is_hide_set() && sub.get_name() != "help" {
            pages(sub, &format!("{name}-{}", sub.get_name()), each)?;
        }
    }
    Ok(())
}

/// Returns the man page of a command.
pub fn page(command: clap::Command, name: &str, section: &str) -> Result<String> {
    // The name in the title and in the synopsis.
    let shown = name.replace('-', " ");
    let command = command
        .display_name(name.to_owned())
        .bin_name(shown)
        .disable_help_subcommand(true)
        .version(env!("CARGO_PKG_VERSION"));
    let man = clap_mangen::Man::new(command)
        .title(name)
        .section(section)
        .source(concat!("fcd ", env!("CARGO_PKG_VERSION")))
        .manual("fcd");
    let mut text = Vec::new();
    man.render(&mut text)
        .map_err(|e| Error::io(format!("render the page {name}"), e))?;
    let text =
        String::from_utf8(text).map_err(|e| Error::internal("render a page").with_source(e))?;
    // A synopsis has long words. Break its lines only between alternatives.
    Ok(text
        .replacen(".SH NAME", ".ad l\n.nh\n.SH NAME", 1)
        .replace(r"|\fB", r"|\:\fB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_at_their_places() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        for place in [
            "man/man1/fcctl.1",
            "man/man1/fcctl-vm-create.1",
            "man/man1/fcctl-pull.1",
            "man/man7/fcd-networking.7",
            "bash-completion/completions/fcctl",
            "zsh/vendor-completions/_fcctl",
            "fish/vendor_completions.d/fcctl.fish",
        ] {
            assert!(dir.path().join(place).is_file(), "{place}");
        }
        assert!(!dir.path().join("man/man1/fcctl-help.1").exists());
        let text = std::fs::read_to_string(dir.path().join("man/man1/fcctl-vm-create.1")).unwrap();
        assert!(
            text.contains(".SH NAME\nfcctl\\-vm\\-create \\- Create a VM"),
            "{text}"
        );
    }

    #[test]
    fn only_the_hidden_command_names_a_directory() {
        let of = |words: &[&str]| target(&words.iter().map(Into::into).collect::<Vec<_>>());
        assert_eq!(of(&["fcctl", "__package", "/d"]), Some("/d".into()));
        assert_eq!(of(&["fcctl", "ps", "/d"]), None);
        assert_eq!(of(&["fcctl", "__package"]), None);
    }
}
