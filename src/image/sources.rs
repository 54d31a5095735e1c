//! Extracts the parts of the host's apt configuration that a build uses.

use std::collections::BTreeMap;

/// The keys of `apt-config dump` that control access to an archive and the check of its dates.
const CONFIG_KEPT: [&str; 7] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Retries",
    "Acquire::ForceIPv",
    "Acquire::Check-Date",
    "Acquire::Check-Valid-Until",
    "Acquire::Max-ValidTime",
];

/// The distribution of the host, from os-release(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Os {
    /// The distribution's id, for example `debian`.
    pub id: String,
    /// The release's code name, for example `bookworm`. It may be empty.
    pub codename: String,
}

pub(super) fn os(os_release: &str) -> Os {
    let value = |key: &str| {
        let line = os_release
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    Os {
        id: value("ID"),
        codename: value("VERSION_CODENAME"),
    }
}

/// Returns an apt.conf for a build: the needed lines of `apt-config dump`, and no translations.
pub(super) fn apt_conf(dump: &str) -> String {
    let mut conf = String::from("Acquire::Languages \"none\";\n");
    for line in dump
        .lines()
        .filter(|l| CONFIG_KEPT.iter().any(|key| l.starts_with(key)))
    {
        // Empty groups have no effect.
        if !line.ends_with(" \"\";") {
            conf.push_str(line);
            conf.push('\n');
        }
    }
    conf
}

/// Returns the host's sources for `codename` and its updates as one-line entries (sources.list(5)).
/// `files` contains names and contents in either format. Third-party archives are omitted: their
/// suites have other names, or they have no `main`.
pub(super) fn sources_list(files: &[(String, String)], codename: &str) -> String {
    let mut lines = Vec::new();
    for (name, text) in files {
        if name.ends_with(".sources") {
            deb822(text, codename, &mut lines)
        } else {
            one_line(text, codename, &mut lines)
        }
    }
    let mut seen = std::collections::HashSet::new();
    lines.retain(|l| seen.insert(l.clone()));
    lines.iter().map(|l| format!("{l}\n")).collect()
}

fn is_ours(suite: &str, codename: &str) -> bool {
    let suite = suite.strip_prefix(codename).unwrap_or("?");
    matches!(suite, "" | "-updates" | "-security" | "/updates")
}

fn one_line(text: &str, codename: &str, lines: &mut Vec<String>) {
    for line in text.lines().map(str::trim) {
        let Some(rest) = line
            .strip_prefix("deb ")
            .or_else(|| line.strip_prefix("deb\t"))
        else {
            continue;
        };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((options, rest)) => (options.trim(), rest),
            None => ("", rest),
        };
        let rest = rest.split(" #").next().unwrap_or(rest);
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        let components: Vec<_> = words.collect();
        if is_ours(suite, codename) && components.contains(&"main") {
            lines.push(entry(options, uri, suite, &components));
        }
    }
}

fn deb822(text: &str, codename: &str, lines: &mut Vec<String>) {
    let text = text.replace('\r', "");
    // A stanza may contain comments between its fields.
    let text: String = text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| format!("{l}\n"))
        .collect();
    for stanza in text.split("\n\n") {
        let fields = stanza_fields(stanza);
        let words = |key: &str| {
            fields
                .get(key)
                .map(|v| v.split_whitespace().collect::<Vec<_>>())
                .unwrap_or_default()
        };
        let components = words("components");
        if !words("types").contains(&"deb")
            || fields.get("enabled").is_some_and(|v| v == "no")
            || !components.contains(&"main")
        {
            continue;
        }
        // The one-line format cannot contain an inline key, so the keyring has to contain it.
        let key = words("signed-by")
            .first()
            .filter(|w| w.starts_with('/'))
            .map(|w| format!("signed-by={w}"));
        let trusted = words("trusted").first().map(|v| format!("trusted={v}"));
        let options: Vec<_> = key.into_iter().chain(trusted).collect();
        for uri in words("uris") {
            for suite in words("suites").into_iter().filter(|s| is_ours(s, codename)) {
                lines.push(entry(&options.join(" "), uri, suite, &components));
            }
        }
    }
}

fn stanza_fields(stanza: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let mut last = String::new();
    for line in stanza.lines() {
        if line.starts_with([' ', '\t']) {
            if let Some(value) = fields.get_mut(&last) {
                *value = format!("{value}\n{}", line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            last = key.to_ascii_lowercase();
            fields.insert(last.clone(), value.trim().to_owned());
        }
    }
    fields
}

fn entry(options: &str, uri: &str, suite: &str, components: &[&str]) -> String {
    let options = if options.is_empty() {
        String::new()
    } else {
        format!("[{options}] ")
    };
    format!("deb {options}{uri} {suite} {}", components.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(name: &str, text: &str, expected: Expect) {
        expected.assert_eq(&sources_list(
            &[(name.to_owned(), text.to_owned())],
            "bookworm",
        ));
    }

    #[test]
    fn one_line_entries_are_filtered() {
        let text = "# comment\ndeb http://mirror.example/debian bookworm main non-free # why\n\
            deb-src http://mirror.example/debian bookworm main\n\
            deb [ arch=amd64 signed-by=/k.gpg ] http://sec bookworm-security main\n\
            deb http://mirror.example/debian bookworm main non-free\n\
            deb http://x bookworm-backports main\ndeb http://x trixie main\n\
            deb https://docker bookworm stable\ndeb https://google cloud-sdk-bookworm main\n";
        check(
            "sources.list",
            text,
            expect![[r#"
                deb http://mirror.example/debian bookworm main non-free
                deb [arch=amd64 signed-by=/k.gpg] http://sec bookworm-security main
            "#]],
        );
    }

    #[test]
    fn stanzas_are_converted_to_one_line_entries() {
        let text = "Types: deb\n# snapshot\nURIs: http://a/debian\nSuites: bookworm bookworm-updates trixie\n\
            Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n\n\
            Types: deb deb-src\nURIs: http://b\nSuites: bookworm-security\nComponents: main contrib\nSigned-By:\n \
            -----BEGIN PGP\n .\n /notapath\n\nTypes: deb\nEnabled: no\nURIs: http://c\nSuites: bookworm\nComponents: main\n\n\
            Types: deb-src\nURIs: http://d\nSuites: bookworm\nComponents: main\n";
        check(
            "debian.sources",
            text,
            expect![[r#"
                deb [signed-by=/usr/share/keyrings/k.gpg] http://a/debian bookworm main
                deb [signed-by=/usr/share/keyrings/k.gpg] http://a/debian bookworm-updates main
                deb http://b bookworm-security main contrib
            "#]],
        );
    }

    #[test]
    fn apt_conf_keeps_proxy_and_date_settings() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http \"\";\nAcquire::http::Proxy \"http://p:3142\";\n\
            Acquire::https::Verify-Peer \"\";\nAcquire::Check-Date \"false\";\nDPkg::Post-Invoke:: \"rm -f /x\";\n";
        expect![[r#"
            Acquire::Languages "none";
            Acquire::http::Proxy "http://p:3142";
            Acquire::Check-Date "false";
        "#]]
        .assert_eq(&apt_conf(dump));
    }

    #[test]
    fn host_distribution_is_read_from_os_release() {
        let text = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(
            os(text),
            Os {
                id: "debian".into(),
                codename: "bookworm".into()
            }
        );
    }
}
