//! Prints the configuration file as a reference: every setting with its default and its meaning.

use super::section::{Choice, Setting};
use super::{Disk, Firecracker, Limits, Network, Qemu, Registry, VmDefaults, Vmm};

/// Longest comment line.
const LINE_WIDTH: usize = 100;

/// The introduction, the settings outside any section, and the sections that may repeat.
const HEAD: &str = "\
# Configuration of fcd. `fcd --print-config` printed this file.
#
# Every setting is shown with its default. Remove the leading `#` of a line to change it. An unknown setting is refused.

# Where VMs, images and the database are stored. Users: $XDG_STATE_HOME/fcd.
#state_dir = \"/var/lib/fcd\"

# The Unix socket. Users: $XDG_RUNTIME_DIR/fcd/fcd.sock.
#socket = \"/run/fcd/fcd.sock\"
";
const TAIL: &str = "
# A file of the host that every guest gets at each start. Repeat the section for each file.
#[[sync]]

# The file on the host, at most 1 MiB.
#from = \"/etc/apt/apt.conf.d/80proxy\"

# The file in the guest. It replaces what is there and belongs to root.
#to = \"/etc/apt/apt.conf.d/80proxy\"

# Its permissions in octal.
#mode = \"0644\"
";

/// Returns a configuration file in which every setting is commented out and explained.
pub fn reference() -> String {
    let sections = [
        section("limits", Limits::DOC, &Limits::settings()),
        section("vm", VmDefaults::DOC, &VmDefaults::settings()),
        section("vmm", Vmm::DOC, &Vmm::settings()),
        section("qemu", Qemu::DOC, &Qemu::settings()),
        section("firecracker", Firecracker::DOC, &Firecracker::settings()),
        section("disk", Disk::DOC, &Disk::settings()),
        section("network", Network::DOC, &Network::settings()),
        section("registry", Registry::DOC, &Registry::settings()),
    ];
    format!("{HEAD}{}{TAIL}", sections.concat())
}

fn section(name: &str, doc: &[&str], settings: &[Setting]) -> String {
    let settings: String = settings.iter().map(setting).collect();
    format!("\n{}[{name}]\n{settings}", comment("# ", "# ", doc))
}

fn setting(setting: &Setting) -> String {
    let choices: String = setting.choices.iter().map(choice).collect();
    format!(
        "\n{}{choices}#{} = {}\n",
        comment("# ", "# ", setting.doc),
        setting.name,
        setting.default
    )
}

fn choice(choice: &Choice) -> String {
    comment(&format!("#   {}: ", choice.name), "#     ", choice.doc)
}

/// Wraps a doc comment into comment lines of at most [`LINE_WIDTH`] characters.
fn comment(first: &str, next: &str, doc: &[&str]) -> String {
    let (mut lines, mut line) = (String::new(), first.trim_end().to_owned());
    for word in doc.iter().flat_map(|line| line.split_whitespace()) {
        if line.len() + 1 + word.len() > LINE_WIDTH {
            lines.push_str(&line);
            lines.push('\n');
            line = next.trim_end().to_owned();
            line.push_str(&" ".repeat(next.len() - line.len() - 1));
        }
        line.push(' ');
        line.push_str(word);
    }
    lines + &line + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::{File, parse};
    use super::*;

    #[test]
    fn printed_reference_equals_defaults() {
        assert_eq!(parse(&reference()).unwrap(), File::default());
    }

    #[test]
    fn uncommented_reference_equals_defaults() {
        let is_setting =
            |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
        let uncommented = |line: &str| {
            if is_setting(line) {
                line[1..].to_owned()
            } else {
                line.to_owned()
            }
        };
        let text: Vec<String> = reference().lines().map(uncommented).collect();
        let file = parse(&text.join("\n")).unwrap();
        assert_eq!(file.state_dir.as_deref(), Some("/var/lib/fcd".as_ref()));
        assert_eq!(file.socket.as_deref(), Some("/run/fcd/fcd.sock".as_ref()));
        assert_eq!((file.sync.len(), file.sync[0].mode()), (1, 0o644));
        let rest = File {
            state_dir: None,
            socket: None,
            sync: Vec::new(),
            ..file
        };
        assert_eq!(rest, File::default());
    }

    /// The macros print every field of a section. This test checks that no section is missing.
    #[test]
    fn reference_has_every_section() {
        let refusal = parse("[no_such_section]\n").unwrap_err().to_string();
        let names: Vec<&str> = refusal.split('`').skip(1).step_by(2).skip(1).collect();
        assert!(names.len() > 5, "{refusal}");
        for name in names {
            let text = reference();
            let is_there = ["[", "#[[", "#"]
                .iter()
                .any(|before| text.contains(&format!("\n{before}{name}")));
            assert!(is_there, "{name} is not in the reference");
        }
    }

    #[test]
    fn reference_choices_parse() {
        for (section, settings) in [
            ("vmm", Vmm::settings()),
            ("network", Network::settings()),
            ("disk", Disk::settings()),
        ] {
            let driver = settings.iter().find(|s| s.name == "driver").unwrap();
            assert!(driver.choices.len() > 2, "{section}");
            for choice in driver.choices {
                parse(&format!("[{section}]\ndriver = \"{}\"\n", choice.name)).unwrap();
            }
        }
    }

    #[test]
    fn reference_comments_are_wrapped() {
        for line in reference().lines() {
            assert!(line.len() <= LINE_WIDTH + 20, "{line}");
        }
        let long = "word ".repeat(40);
        let text = comment("#   auto: ", "#     ", &[&long]);
        assert!(text.lines().all(|line| line.len() <= LINE_WIDTH), "{text}");
        assert!(
            text.starts_with("#   auto: word") && text.contains("\n#     word"),
            "{text}"
        );
    }
}
