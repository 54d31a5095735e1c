//! Words that users of docker type by habit, and the commands of `fcctl` that do the same.
//!
//! When a word becomes a command, remove it here. A test checks this.

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

const fn vm(words: &'static [&'static str], hint: &'static str) -> Habit {
    Habit {
        noun: "vm",
        words,
        hint,
    }
}

const COPY: &str = "into a VM: fcctl cp FILE VM:DIR\n\
    out of a VM: fcctl cp VM:FILE DIR\n\
    a tree, and its changes back: fcctl workspace prepare VM PATH";
const ATTACH: &str = "a VM has no command of its own to attach to, and its console takes no input\n\
    a shell: fcctl ssh VM\n\
    a command with a terminal: fcctl exec -it VM CMD\n\
    what the console shows: fcctl logs -f VM";
const LOAD: &str = "fcctl image pull - < FILE";
const PUSH: &str = "fcctl cannot push; write the image to a file for skopeo or docker: \
    fcctl image export IMAGE -o FILE";
const VOLUMES: &str = "fcd copies directories and does not mount them: fcctl run DIR -- CMD\n\
    into a running VM: fcctl workspace prepare VM DIR, and back: fcctl workspace apply VM";
const SAVE: &str = "fcctl image export IMAGE -o FILE";

const HABITS: &[Habit] = &[
    // Images.
    top(&["push"], PUSH),
    top(&["rmi"], "fcctl image rm IMAGE"),
    top(&["load", "import"], LOAD),
    top(
        &["save", "export"],
        "an image: fcctl image export IMAGE -o FILE\n\
         the memory and disks of a running VM: fcctl snapshot create VM\n\
         the changes of a workspace: fcctl workspace export VM",
    ),
    top(&["tag"], "fcctl image tag IMAGE NAME"),
    image(&["push"], PUSH),
    image(&["load", "import"], LOAD),
    image(&["save"], SAVE),
    // VMs and images.
    top(
        &["prune"],
        "what nothing uses: fcctl system prune --dry-run\n\
         stopped VMs: fcctl vm prune\n\
         unused images: fcctl image prune --all",
    ),
    top(
        &["show"],
        "a VM: fcctl vm show VM\nan image: fcctl image show IMAGE",
    ),
    // VMs.
    top(&["copy", "scp"], COPY),
    vm(&["copy", "scp"], COPY),
    top(
        &["shell", "sh", "enter"],
        "in a running VM: fcctl ssh VM\nin a new VM: fcctl run",
    ),
    top(&["attach", "console"], ATTACH),
    vm(&["attach", "console"], ATTACH),
    top(&["ls", "list", "container"], "fcctl ps -a"),
    top(&["delete", "remove", "destroy"], "fcctl rm VM"),
    top(&["reboot", "reset"], "fcctl restart VM"),
    top(&["shutdown", "poweroff", "halt"], "fcctl stop VM"),
    top(&["suspend"], "fcctl pause VM"),
    top(&["unpause"], "fcctl resume VM"),
    top(&["ports"], "fcctl port list VM"),
    top(
        &["launch", "new"],
        "for one command: fcctl run DIR -- CMD\n\
         to stay: fcctl create NAME && fcctl start NAME",
    ),
    top(&["clone"], "fcctl fork VM NAME"),
    top(
        &["restore"],
        "fcctl snapshot restore SNAPSHOT\nthe snapshots: fcctl snapshot list",
    ),
    top(&["update", "edit"], "fcctl set VM --memory 2G --vcpus 2"),
    top(
        &["ip"],
        "fcctl inspect -f '{{.IP}}' VM\npublished ports: fcctl port list VM",
    ),
    top(&["status"], "fcd: fcctl info\na VM: fcctl inspect VM"),
    top(
        &["diff"],
        "the changes of a workspace: fcctl workspace export VM\n\
         into your directory: fcctl workspace apply VM",
    ),
    // Whole groups of commands of other tools.
    top(&["volume", "volumes", "mount"], VOLUMES),
    top(
        &["network", "networks"],
        "for a new VM: fcctl create NAME --net nat, or --net none",
    ),
    top(
        &["compose", "devcontainer", "init"],
        "a VM for a directory, as its devcontainer.json says: fcctl up",
    ),
    top(&["context"], "--socket S or FCD_SOCKET chooses the daemon"),
    top(
        &["search"],
        "search on the registry's site, then: fcctl pull IMAGE",
    ),
    top(&["monitor"], "fcctl events"),
];

/// Options of `docker run`, `create` and `exec` that fcctl does not have, and what to use instead.
const OPTIONS: &[(&[&str], &str)] = &[
    (
        &["-d", "--detach"],
        "to start a VM that stays: fcctl create NAME && fcctl start NAME\n\
         to run a command in it without waiting: fcctl exec NAME -- sh -c 'CMD >/tmp/log 2>&1 &'",
    ),
    (&["-v", "--volume", "--mount"], VOLUMES),
    (&["--network"], "use --net nat or --net none"),
    (
        &["--privileged", "--cap-add"],
        "leave it out: root in a guest may do everything in that guest's kernel",
    ),
];

/// Returns the hint for an option of docker that fcctl does not have.
pub(super) fn option_hint(option: &str) -> Option<&'static str> {
    let (_, hint) = OPTIONS.iter().find(|(names, _)| names.contains(&option))?;
    Some(hint)
}

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
    use std::collections::HashSet;

    fn find<'a>(command: &'a clap::Command, word: &str) -> Option<&'a clap::Command> {
        command
            .get_subcommands()
            .find(|sub| sub.get_name() == word || sub.get_all_aliases().any(|alias| alias == word))
    }

    #[test]
    fn habits_are_not_commands() {
        let cli = super::super::syntax();
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
        let cli = super::super::syntax();
        let options = OPTIONS.iter().map(|(_, hint)| *hint);
        for hint in HABITS.iter().map(|habit| habit.hint).chain(options) {
            // Prose such as "fcctl cannot push" looks like a command, too.
            let commands = hint.split("fcctl ").skip(1);
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
