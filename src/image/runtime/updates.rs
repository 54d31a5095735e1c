//! Finds the packages of a guest runtime that the distribution has newer versions of.
//!
//! The versions come from the package lists that apt keeps on this host. Nothing is downloaded. On
//! a host without apt, only the age of a runtime counts.

use super::{Package, RuntimeInfo};
use crate::error::{Kind, Result};
use crate::host::{Command, Commands};
use crate::locks::Cancel;
use std::collections::HashMap;
use std::time::Duration;

const QUERY_DEADLINE: Duration = Duration::from_secs(20);

/// Returns the names of the packages that have newer versions, or none if the check fails.
pub(super) fn updates(info: &RuntimeInfo, commands: &dyn Commands, cancel: &Cancel) -> Vec<String> {
    find(info, commands, cancel).unwrap_or_else(|e| {
        log::debug!("look for updates of guest runtime {}: {e}", info.id);
        Vec::new()
    })
}

fn find(info: &RuntimeInfo, commands: &dyn Commands, cancel: &Cancel) -> Result<Vec<String>> {
    if info.packages.is_empty() {
        return Ok(Vec::new());
    }
    let query = Command::new("apt-cache")
        .arg("policy")
        .args(info.packages.iter().map(|p| &p.name))
        .env("LC_ALL", "C")
        .deadline(QUERY_DEADLINE);
    let answer = commands.run(&query, cancel, &mut |_| {})?;
    let text = String::from_utf8_lossy(&answer.stdout);
    let candidates = candidates(&text);
    let mut found = Vec::new();
    for Package { name, version } in &info.packages {
        let candidate = candidates.get(name.as_str()).copied().unwrap_or(version);
        if candidate != version && is_newer(candidate, version, commands, cancel)? {
            found.push(name.clone());
        }
    }
    Ok(found)
}

/// Parses the output of `apt-cache policy`: the version of each package that apt would install.
fn candidates(text: &str) -> HashMap<&str, &str> {
    let mut name = "";
    let mut found = HashMap::new();
    for line in text.lines() {
        if let Some(candidate) = line.strip_prefix("  Candidate: ") {
            found.insert(name, candidate);
        } else if let (false, Some(package)) = (line.starts_with(' '), line.strip_suffix(':')) {
            name = package;
        }
    }
    // A package that only dpkg knows has no candidate.
    found.retain(|_, candidate| *candidate != "(none)");
    found
}

/// Compares versions by the distribution's own rules (deb-version(7)).
fn is_newer(one: &str, than: &str, commands: &dyn Commands, cancel: &Cancel) -> Result<bool> {
    let compare = Command::new("dpkg")
        .args(["--compare-versions", one, "gt", than])
        .deadline(QUERY_DEADLINE);
    match commands.run(&compare, cancel, &mut |_| {}) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == Kind::CommandFailed => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::host::{HostCommands, Output};

    /// A host whose apt has these lists, with the real dpkg.
    struct Apt(&'static str);

    impl Commands for Apt {
        fn run(
            &self,
            command: &Command,
            cancel: &Cancel,
            on_line: &mut dyn FnMut(&str),
        ) -> Result<Output> {
            if command.program == "dpkg" {
                return HostCommands.run(command, cancel, on_line);
            }
            if self.0.is_empty() {
                return Err(Error::new(Kind::CommandMissing, "run apt-cache: not found"));
            }
            Ok(Output {
                stdout: self.0.into(),
                ..Output::default()
            })
        }
    }

    fn found(lists: &'static str) -> Vec<String> {
        let package = |name: &str, version: &str| Package {
            name: name.to_owned(),
            version: version.to_owned(),
        };
        let info = RuntimeInfo {
            packages: vec![
                package("git", "1:2.39.5-0+deb12u2"),
                package("openssh-server", "1:9.2p1-2+deb12u9"),
                package("tar", "1.34+dfsg-1.2"),
            ],
            ..RuntimeInfo::for_test()
        };
        updates(&info, &Apt(lists), &Cancel::try_new().unwrap())
    }

    #[test]
    fn newer_versions_are_found_by_the_rules_of_the_distribution() {
        let lists = "\
git:
  Installed: (none)
  Candidate: 1:2.39.5-0+deb12u10
  Version table:
     1:2.39.5-0+deb12u10 500
openssh-server:
  Installed: 1:9.2p1-2+deb12u9
  Candidate: 1:9.2p1-2+deb12u7
tar:
  Installed: (none)
  Candidate: (none)
";
        assert_eq!(found(lists), ["git"]);
    }

    #[test]
    fn host_without_apt_or_lists_finds_nothing() {
        assert!(found("").is_empty());
        assert!(found("N: Unable to locate package git\n").is_empty());
    }
}
