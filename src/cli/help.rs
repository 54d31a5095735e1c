//! `fcctl help TOPIC`: longer pages about one topic each.

use std::ffi::OsString;

/// The pages of `src/docs`: topic, summary, text.
pub(super) const TOPICS: &[(&str, &str, &str)] = &[
    (
        "workspaces",
        "what is sent to the guest, and how changes come back",
        include_str!("../docs/workspaces.md"),
    ),
    (
        "copying",
        "fcctl cp: where a copy goes, what it keeps, what it refuses",
        include_str!("../docs/copying.md"),
    ),
    (
        "devcontainer",
        "a VM for a directory: fcctl up and devcontainer.json",
        include_str!("../docs/devcontainer.md"),
    ),
    (
        "images",
        "what is in an image, how to build one, users of the guest",
        include_str!("../docs/images.md"),
    ),
    (
        "networking",
        "user mode, the bridge, IPv6, ports, names, vsock",
        include_str!("../docs/networking.md"),
    ),
    (
        "lists",
        "labels, filters, templates, JSON",
        include_str!("../docs/lists.md"),
    ),
    (
        "limits",
        "disk and network rates, memory, quotas",
        include_str!("../docs/limits.md"),
    ),
    (
        "snapshots",
        "pause, save, restore, clone",
        include_str!("../docs/snapshots.md"),
    ),
    (
        "security",
        "what is isolated from what, and what is not",
        include_str!("../docs/security.md"),
    ),
    (
        "firecracker",
        "how to run VMs on Firecracker",
        include_str!("../docs/firecracker.md"),
    ),
    (
        "configuration",
        "the configuration file",
        include_str!("../docs/configuration.md"),
    ),
    (
        "recovery",
        "what survives a crash, a reboot, a full disk",
        include_str!("../docs/recovery.md"),
    ),
    (
        "event-stream",
        "following changes of VMs and operations",
        include_str!("../docs/event-stream.md"),
    ),
    (
        "protocol",
        "the Unix socket, for scripts",
        include_str!("../docs/protocol.md"),
    ),
    (
        "exit-statuses",
        "what fcctl's exit statuses mean",
        include_str!("../docs/exit-statuses.md"),
    ),
];

/// Returns the list of topics that ends `fcctl --help`.
pub(super) fn topics() -> String {
    let width = TOPICS
        .iter()
        .map(|(name, _, _)| name.len())
        .max()
        .unwrap_or(0);
    let lines: Vec<String> = TOPICS
        .iter()
        .map(|(name, about, _)| format!("  {name:width$}  {about}"))
        .collect();
    format!("Topics (fcctl help TOPIC):\n{}", lines.join("\n"))
}

/// Returns the page for `fcctl help TOPIC`. clap handles `fcctl help COMMAND`, but does not know
/// the topics.
pub(super) fn page(args: &[OsString]) -> Option<String> {
    let [_, help, topic] = args else { return None };
    let (_, _, page) = TOPICS
        .iter()
        .find(|(name, _, _)| help == "help" && topic == name)?;
    // Leave out HTML comments, which only mark generated tables.
    let lines = page.lines().filter(|line| !line.starts_with("<!--"));
    Some(lines.map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    #[test]
    fn help_pages_are_topics_and_in_readme() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
        let file_name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let files: BTreeSet<String> = std::fs::read_dir(root.join("src/docs"))
            .unwrap()
            .map(file_name)
            .collect();
        let topics: BTreeSet<String> = TOPICS
            .iter()
            .map(|(name, _, _)| format!("{name}.md"))
            .collect();
        assert_eq!(files, topics);
        for (name, _, page) in TOPICS {
            assert!(page.starts_with("# ") && page.ends_with('\n'), "{name}");
            assert!(
                readme.contains(&format!("`{name}`")),
                "the README does not list the topic {name}"
            );
        }
    }

    #[test]
    fn help_topics_differ_from_commands() {
        let command = <super::super::Cli as clap::CommandFactory>::command();
        for name in command.get_subcommands().map(clap::Command::get_name) {
            assert!(TOPICS.iter().all(|(topic, _, _)| *topic != name), "{name}");
        }
    }

    #[test]
    fn help_pages_refer_to_existing_topics() {
        for (name, _, page) in TOPICS {
            for reference in page.split("fcctl help ").skip(1) {
                let topic: String = reference
                    .chars()
                    .take_while(|c| c.is_ascii_lowercase() || *c == '-')
                    .collect();
                assert!(
                    TOPICS.iter().any(|(known, _, _)| *known == topic),
                    "{name} refers to the topic {topic:?}"
                );
            }
        }
    }
}
