//! The variables of `devcontainer.json`, such as `${localEnv:NAME}`.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The values of the variables that do not depend on the guest.
pub(super) struct Variables<'a> {
    /// The directory of the project in the guest.
    pub guest_dir: &'a str,
    /// The last component of the project's directory.
    pub name: &'a str,
    /// The VM's name.
    pub id: &'a str,
    /// The variables of the caller that the guest may have.
    pub allowed: &'a [String],
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

/// A variable that cannot be replaced.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Refused {
    /// The caller's variables that were not allowed.
    pub local: BTreeSet<String>,
    /// True if the file uses a path on this host.
    pub host_path: bool,
}

impl Refused {
    pub(super) fn is_empty(&self) -> bool {
        self.local.is_empty() && !self.host_path
    }
}

/// Replaces the variables in all texts of a value. Variables of the guest stay unchanged, and so do
/// texts that are not variables of the format, such as `${HOME}` in a command.
pub(super) fn replace(value: &mut Value, variables: &Variables<'_>, refused: &mut Refused) {
    match value {
        Value::String(text) => *text = replaced(text, variables, refused),
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| replace(item, variables, refused)),
        Value::Object(members) => members
            .values_mut()
            .for_each(|member| replace(member, variables, refused)),
        _ => {}
    }
}

fn replaced(text: &str, variables: &Variables<'_>, refused: &mut Refused) -> String {
    let mut out = String::new();
    for piece in pieces(text) {
        let Piece::Variable { whole, inside } = piece else {
            out.push_str(piece.whole());
            continue;
        };
        let (kind, rest) = inside.split_once(':').unwrap_or((inside, ""));
        match kind {
            "localEnv" | "env" => {
                let (name, default) = rest.split_once(':').unwrap_or((rest, ""));
                if variables.allowed.iter().any(|allowed| allowed == name) {
                    let value = (variables.env)(name);
                    out.push_str(value.as_deref().unwrap_or(default));
                } else {
                    refused.local.insert(name.to_owned());
                }
            }
            "localWorkspaceFolder" => refused.host_path = true,
            "localWorkspaceFolderBasename" => out.push_str(variables.name),
            "containerWorkspaceFolder" => out.push_str(variables.guest_dir),
            "containerWorkspaceFolderBasename" => out.push_str(
                variables
                    .guest_dir
                    .rsplit('/')
                    .next()
                    .unwrap_or(variables.guest_dir),
            ),
            "devcontainerId" => out.push_str(variables.id),
            _ => out.push_str(whole),
        }
    }
    out
}

/// The variables that a guest sets, whatever the image says.
const OF_GUEST: [&str; 5] = ["HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME"];
/// The search path of commands, unless the image says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns the variables that are known before the guest runs. `of_image` lists the image's
/// variables as `NAME=VALUE`. `${containerEnv:NAME}` may refer to them.
pub(super) fn constants(
    env: &[(String, Option<String>)],
    of_image: &[String],
) -> Vec<(String, String)> {
    let of_image = of_image.iter().filter_map(|text| text.split_once('='));
    let mut known: BTreeMap<&str, String> = [("PATH", PATH)]
        .into_iter()
        .chain(of_image)
        .map(|(name, value)| (name, value.to_owned()))
        .collect();
    let mut own = BTreeMap::new();
    for (name, value) in env {
        match value.as_ref().and_then(|value| constant(value, &known)) {
            Some(value) => {
                known.insert(name, value.clone());
                own.insert(name.clone(), value);
            }
            None => {
                known.remove(name.as_str());
                own.remove(name);
            }
        }
    }
    own.into_iter().collect()
}

fn constant(text: &str, known: &BTreeMap<&str, String>) -> Option<String> {
    let mut out = String::new();
    for piece in pieces(text) {
        let Piece::Variable { whole, inside } = piece else {
            out.push_str(piece.whole());
            continue;
        };
        let Some(rest) = inside.strip_prefix("containerEnv:") else {
            out.push_str(whole);
            continue;
        };
        let (name, default) = rest.split_once(':').unwrap_or((rest, ""));
        match known.get(name) {
            Some(value) => out.push_str(value),
            None if OF_GUEST.contains(&name) => return None,
            None => out.push_str(default),
        }
    }
    Some(out)
}

/// Returns a text as a word for a shell in the guest, in which `${containerEnv:NAME}` stands for a
/// variable of that shell.
pub(super) fn shell_word(text: &str) -> String {
    let word: String = pieces(text)
        .map(|piece| match guest_variable(&piece) {
            Some(variable) => format!("\"{variable}\""),
            None => crate::host::shell::quote(piece.whole()),
        })
        .collect();
    if word.is_empty() {
        "''".to_owned()
    } else {
        word
    }
}

/// Returns a command for a shell in the guest, in which `${containerEnv:NAME}` stands for a
/// variable of that shell.
pub(super) fn shell_line(text: &str) -> String {
    pieces(text)
        .map(|piece| guest_variable(&piece).unwrap_or_else(|| piece.whole().to_owned()))
        .collect()
}

fn guest_variable(piece: &Piece<'_>) -> Option<String> {
    let Piece::Variable { inside, .. } = piece else {
        return None;
    };
    let rest = inside.strip_prefix("containerEnv:")?;
    let (name, default) = rest.split_once(':').unwrap_or((rest, ""));
    let default: String = default
        .chars()
        .flat_map(|c| {
            let escape = matches!(c, '"' | '\\' | '$' | '`').then_some('\\');
            escape.into_iter().chain([c])
        })
        .collect();
    is_name(name).then(|| format!("${{{name}:-{default}}}"))
}

/// True for the name of an environment variable.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.as_bytes()[0].is_ascii_digit()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

enum Piece<'a> {
    Text(&'a str),
    Variable { whole: &'a str, inside: &'a str },
}

impl<'a> Piece<'a> {
    fn whole(&self) -> &'a str {
        match self {
            Piece::Text(whole) | Piece::Variable { whole, .. } => whole,
        }
    }
}

/// Splits a text into plain texts and variables such as `${...}`.
fn pieces(text: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let begin = match rest.find("${") {
            Some(begin) if rest[begin..].contains('}') => begin,
            _ => rest.len(),
        };
        let (piece, after) = if begin > 0 {
            (Piece::Text(&rest[..begin]), begin)
        } else {
            let end = rest.find('}').unwrap_or(rest.len() - 1);
            let (whole, inside) = (&rest[..=end], &rest[2..end]);
            (Piece::Variable { whole, inside }, end + 1)
        };
        rest = &rest[after..];
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn constants_are_known_before_the_guest_runs() {
        let env = |pairs: &[(&str, Option<&str>)]| -> Vec<(String, Option<String>)> {
            let own = |text: &&str| (*text).to_owned();
            let pairs = pairs.iter();
            pairs.map(|(n, v)| (own(n), v.as_ref().map(own))).collect()
        };
        let found = constants(
            &env(&[
                ("A", Some("1")),
                ("B", Some("${containerEnv:A}${containerEnv:C:3}")),
                ("PATH", Some("${containerEnv:PATH}:/x")),
                ("GO", Some("${containerEnv:HOME}/go")),
                ("GONE", Some("x")),
                ("GONE", None),
                ("V", Some("${containerEnv:OF_IMAGE} $HOME")),
            ]),
            &["OF_IMAGE=i".to_owned(), "PATH=/image".to_owned()],
        );
        let found: Vec<String> = found.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(found, ["A=1", "B=13", "PATH=/image:/x", "V=i $HOME"]);
        assert_eq!(
            constants(&env(&[("P", Some("${containerEnv:PATH}"))]), &[])[0].1,
            PATH
        );
    }

    #[track_caller]
    fn check(text: &str, allowed: &[&str], expected: &str, refused: &[&str]) {
        let allowed: Vec<String> = allowed.iter().map(|name| (*name).to_owned()).collect();
        let variables = Variables {
            guest_dir: "/root/app",
            name: "App",
            id: "app-1",
            allowed: &allowed,
            env: &|name| (name == "MINE").then(|| "it's ${localEnv:X}".to_owned()),
        };
        let (mut value, mut found) = (json!({"a": [text]}), Refused::default());
        replace(&mut value, &variables, &mut found);
        assert_eq!(value["a"][0], expected);
        let found: Vec<&str> = found.local.iter().map(String::as_str).collect();
        assert_eq!(found, refused);
    }

    #[test]
    fn callers_variables_need_permission() {
        check("a", &[], "a", &[]);
        check("x${localEnv:MINE}y", &[], "xy", &["MINE"]);
        check("${env:MINE:d} ${localEnv:B}", &["B"], " ", &["MINE"]);
        // A replaced value is not expanded again.
        check("${localEnv:MINE}", &["MINE"], "it's ${localEnv:X}", &[]);
        check("${localEnv:NONE:a:b}", &["NONE"], "a:b", &[]);
        check("${localEnv:}${localEnv}", &["MINE"], "", &[""]);
    }

    #[test]
    fn other_variables_are_replaced_or_stay() {
        check(
            "${containerWorkspaceFolder} ${containerWorkspaceFolderBasename} ${localWorkspaceFolderBasename} ${devcontainerId}",
            &[],
            "/root/app app App app-1",
            &[],
        );
        for same in [
            "${HOME}",
            "$HOME",
            "${containerEnv:PATH}:/x",
            "${",
            "${a",
            "$${}",
            "}é${",
        ] {
            check(same, &[], same, &[]);
        }
    }

    #[test]
    fn host_path_is_refused() {
        let variables = Variables {
            guest_dir: "/root/app",
            name: "app",
            id: "app-1",
            allowed: &[],
            env: &|_| None,
        };
        let mut refused = Refused::default();
        replace(
            &mut json!("${localWorkspaceFolder}/x"),
            &variables,
            &mut refused,
        );
        assert!(refused.host_path && !refused.is_empty());
    }

    #[test]
    fn guest_variables_are_expanded_by_the_guest_only() {
        let word = |text: &str| shell_word(text);
        assert_eq!(word(""), "''");
        assert_eq!(word("$(rm -rf /)"), "'$(rm -rf /)'");
        assert_eq!(
            word("${containerEnv:PATH}:/it's"),
            r#""${PATH:-}":/it'\''s"#.replace(":/it'\\''s", r"':/it'\''s'")
        );
        assert_eq!(word("${containerEnv:A:$(x)\"}"), r#""${A:-\$(x)\"}""#);
        assert_eq!(
            word("${containerEnv:A;reboot}"),
            "'${containerEnv:A;reboot}'"
        );
        assert_eq!(
            shell_line("echo ${containerEnv:A} ${B}"),
            "echo ${A:-} ${B}"
        );
    }
}
