//! Docker's credential helpers: the program `docker-credential-NAME` gets the command `get` and a
//! registry's name on stdin, and prints the credential as JSON.

use crate::api::registry::{Credential, Secret};
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, Output, run_any_status};
use crate::host::text::{printable, quoted};
use crate::locks::Cancel;
use serde::Deserialize;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// A helper may ask the user to unlock a key.
const DEADLINE: Duration = Duration::from_secs(120);
const NAME_BYTES_MAX: usize = 64;
const COMPLAINT_CHARS_MAX: usize = 300;
/// What every helper prints if it has nothing for the registry. It is a constant of the protocol,
/// which has no status for it.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The user name of an identity token.
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Found {
    #[serde(default)]
    username: String,
    secret: Secret,
}

/// Asks a helper. `config` is the file that names it.
pub(super) fn get(
    name: &str,
    registry: &str,
    config: &Path,
    environment: &[(OsString, OsString)],
    cancel: &Cancel,
) -> Result<Credential> {
    check_name(name, config)?;
    let program = format!("docker-credential-{name}");
    let mut command = Command::new(&program)
        .arg("get")
        .stdin(registry)
        .deadline(DEADLINE);
    command.env = environment.to_vec();
    let output = run_any_status(&command, cancel, &mut |_| {})
        .map_err(|e| e.context(format!("ask {program} for the credential of {registry}")))
        .map_err(|e| match e.kind() {
            Kind::CommandMissing => e.hint(format!(
                "install {program}, or remove it from {}",
                config.display()
            )),
            _ => e,
        })?;
    parse(&output).map_err(|why| {
        Error::new(
            Kind::CommandFailed,
            format!("{program} did not return the credential of {registry}: {why}"),
        )
        .hint(format!("docker login {registry}"))
    })
}

/// The name becomes part of a program's name, which must stay one without a directory.
fn check_name(name: &str, config: &Path) -> Result<()> {
    let is_valid = name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    match is_valid {
        true => Ok(()),
        false => Err(Error::new(
            Kind::InvalidConfig,
            format!(
                "{} names the credential helper {}",
                config.display(),
                quoted(name)
            ),
        )
        .hint("a helper's name has letters, digits, '.', '_' and '-'")),
    }
}

/// Reads what a helper has printed. A helper that fails explains itself on stdout.
pub(super) fn parse(output: &Output) -> Result<Credential, String> {
    let stdout = output.stdout.trim_ascii();
    if output.status != 0 {
        if stdout == NOT_FOUND.as_bytes() {
            return Ok(Credential::Anonymous);
        }
        let words = match stdout.is_empty() || stdout.starts_with(b"{") {
            true => output.stderr.trim_ascii(),
            false => stdout,
        };
        let words = String::from_utf8_lossy(words);
        let short: String = words.chars().take(COMPLAINT_CHARS_MAX).collect();
        return Err(format!("status {}: {}", output.status, printable(&short)));
    }
    // serde's messages may quote the secret.
    let found: Found =
        serde_json::from_slice(stdout).map_err(|_| "it printed something else".to_owned())?;
    Ok(match (found.username.as_str(), found.secret) {
        (_, secret) if secret.reveal().is_empty() => Credential::Anonymous,
        (TOKEN_USER, token) => Credential::Identity { token },
        (user, password) => Credential::Basic {
            user: user.to_owned(),
            password,
        },
    })
}
