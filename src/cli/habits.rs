//! Words that users of docker type by habit, and the commands of `fcctl` that do the same.
//!
//! Remove a word here once it is a command; a test demands it.

/// Words that are not commands, and what to use instead.
struct Habit {
    /// The noun before the word, or empty at the top level.
    noun: &'static str,
    words: &'static [&'static str],
    /// One hint per line.
    hint: &'static str,
}

const fn top(words: &'static [&'static str], hint: &'static str) -> Habit {
    Habit {
        noun: "",
        words,
        hint,
    }
}

const fn image(words: &'static [&'static str], hint: &'static str) -> Habit {
    Habit {
        noun: "image",
        words,
        hint,
    }
}

const BUILD: &str = "from a script: fcctl image build --script FILE NAME\n\
    from a Dockerfile: docker build -t app . && docker save app | fcctl image pull -";
const LOAD: &str = "fcctl image pull - < FILE";
const PUSH: &str = "fcctl cannot push; write the image to a file for skopeo or docker: \
    fcctl image export IMAGE -o FILE";
const SAVE: &str = "fcctl image export IMAGE -o FILE";

const HABITS: &[Habit] = &[
    // Images.
    top(&["pull"], "fcctl image pull REF"),
    top(&["push"], PUSH),
    top(&["images"], "fcctl image list"),
    top(&["rmi"], "fcctl image rm IMAGE"),
    top(&["load", "import"], LOAD),
    top(
        &["save", "export"],
        "an image: fcctl image export IMAGE -o FILE\n\
         the memory and disks of a running VM: fcctl snapshot create VM\n\
         the changes of a workspace: fcctl workspace export VM",
    ),
    top(&["build"], BUILD),
    top(&["tag"], "fcctl image tag IMAGE NAME"),
    top(&["commit"], "fcctl image commit VM NAME"),
    top(&["history"], "fcctl image history IMAGE"),
    top(
        &["login", "logout"],
        "fcctl reads docker's config.json: docker login REGISTRY",
    ),
    image(&["push"], PUSH),
    image(&["load", "import"], LOAD),
    image(&["save"], SAVE),
    // VMs and images.
    top(
        &["prune"],
        "stopped VMs: fcctl vm prune\n\
         cached layers: fcctl image prune\n\
         unused images too: fcctl image prune --all",
    ),
    top(
        &["inspect", "show"],
        "a VM: fcctl vm show VM\nan image: fcctl image show IMAGE",
    ),
    // VMs.
    top(&["create"], "fcctl vm create --image IMAGE"),
    top(
        &["cp", "copy", "scp"],
        "a directory: fcctl workspace prepare VM PATH, and back: fcctl workspace export VM\n\
         into a VM: tar c FILE | fcctl exec -i VM -- tar x -C DIR\n\
         out of a VM: fcctl exec VM -- tar c -C DIR FILE | tar x",
    ),
    top(
        &["shell", "sh", "enter"],
        "in a running VM: fcctl ssh VM\nin a new VM: fcctl run",
    ),
    top(
        &["attach"],
        "a shell: fcctl ssh VM\nthe console: fcctl logs -f VM",
    ),
    top(&["ls", "list"], "fcctl ps -a"),
    top(&["delete", "remove"], "fcctl rm VM"),
    top(&["up"], "a new VM: fcctl run\na stopped VM: fcctl start VM"),
    top(&["down"], "fcctl stop VM"),
    top(&["top", "stats"], "fcctl vm stats VM"),
    top(&["kill"], "fcctl vm kill VM"),
    top(&["restart", "reboot"], "fcctl vm restart VM"),
    top(&["pause", "suspend"], "fcctl vm pause VM"),
    top(&["resume", "unpause"], "fcctl vm resume VM"),
    top(&["port", "ports"], "fcctl vm ports VM"),
    top(&["wait"], "fcctl vm wait VM"),
    top(
        &["rename"],
        "a VM keeps its name; choose it at the beginning: fcctl run --name NAME",
    ),
];

/// Returns the hint for a word that is not a command, if it is a known habit.
pub(super) fn hint(noun: &str, word: &str) -> Option<&'static str> {
    let habit = HABITS
        .iter()
        .find(|habit| habit.noun == noun && habit.words.contains(&word))?;
    Some(habit.hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::collections::HashSet;

    fn find<'a>(command: &'a clap::Command, word: &str) -> Option<&'a clap::Command> {
        command
            .get_subcommands()
            .find(|sub| sub.get_name() == word || sub.get_all_aliases().any(|alias| alias == word))
    }

    #[test]
    fn habits_are_not_commands() {
        let cli = super::super::Cli::command();
        let mut seen = HashSet::new();
        for habit in HABITS {
            let at = match habit.noun {
                "" => &cli,
                noun => find(&cli, noun).unwrap(),
            };
            for word in habit.words {
                assert!(find(at, word).is_none(), "{word} is a command");
                assert!(seen.insert((habit.noun, word)), "{word} is there twice");
            }
        }
    }

    #[test]
    fn hints_name_existing_commands() {
        let cli = super::super::Cli::command();
        for habit in HABITS {
            // What follows the name in prose, such as "fcctl cannot push", is in lower case, too.
            let commands = habit.hint.split("fcctl ").skip(1);
            let commands: Vec<_> = commands
                .filter(|text| {
                    !["cannot", "reads"]
                        .iter()
                        .any(|verb| text.starts_with(verb))
                })
                .collect();
            for text in &commands {
                let mut words = text.split_whitespace();
                let noun = words.next().unwrap();
                let noun = find(&cli, noun).unwrap_or_else(|| panic!("fcctl {text}"));
                if noun.has_subcommands() {
                    let verb = words.next().unwrap().trim_end_matches(',');
                    assert!(find(noun, verb).is_some(), "fcctl {text}");
                }
            }
        }
    }
}
