//! Docker's credential helpers. The program `docker-credential-NAME` gets a command and, on stdin,
//! a registry's name or a credential. For `get` it prints the credential as JSON.

use crate::api::registry::{Credential, Secret};
use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, Output, run_any_status};
use crate::host::text::{printable, quoted};
use crate::locks::Cancel;
use serde::Deserialize;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// How long a helper may take. It may ask the user to unlock a key.
const DEADLINE: Duration = Duration::from_secs(120);
const NAME_BYTES_MAX: usize = 64;
const COMPLAINT_CHARS_MAX: usize = 300;
/// The text that every helper prints if it has nothing for the registry. The protocol has no exit
/// status for this case, but fixes the text.
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

/// A helper that `config.json` names.
pub(super) struct Helper<'a> {
    program: String,
    /// The file that names the helper.
    config: &'a Path,
    environment: &'a [(OsString, OsString)],
}

impl<'a> Helper<'a> {
    pub(super) fn new(
        name: &str,
        config: &'a Path,
        environment: &'a [(OsString, OsString)],
    ) -> Result<Self> {
        check_name(name, config)?;
        Ok(Self {
            program: format!("docker-credential-{name}"),
            config,
            environment,
        })
    }

    pub(super) fn program(&self) -> &str {
        &self.program
    }

    /// Asks for the credential of a registry.
    pub(super) fn get(&self, registry: &str, cancel: &Cancel) -> Result<Credential> {
        let doing = format!("ask {} for the credential of {registry}", self.program);
        let output = self.run(("get", registry.to_owned()), &doing, cancel)?;
        parse(&output).map_err(|why| {
            let program = &self.program;
            let text = format!("{program} did not return the credential of {registry}: {why}");
            Error::new(Kind::CommandFailed, text).hint(format!("fcctl image login {registry}"))
        })
    }

    /// True if the helper has a credential for the registry.
    pub(super) fn has(&self, registry: &str, cancel: &Cancel) -> Result<bool> {
        Ok(self.get(registry, cancel)? != Credential::Anonymous)
    }

    pub(super) fn store(
        &self,
        registry: &str,
        user: &str,
        password: &Secret,
        cancel: &Cancel,
    ) -> Result<()> {
        let entry = serde_json::json!({
            "ServerURL": registry,
            "Username": user,
            "Secret": password.reveal(),
        });
        let doing = format!("store the credential of {registry} with {}", self.program);
        let output = self.run(("store", entry.to_string()), &doing, cancel)?;
        require_success(&output, &doing)
    }

    pub(super) fn erase(&self, registry: &str, cancel: &Cancel) -> Result<()> {
        let doing = format!("remove the credential of {registry} from {}", self.program);
        let output = self.run(("erase", registry.to_owned()), &doing, cancel)?;
        require_success(&output, &doing)
    }

    fn run(&self, (verb, stdin): (&str, String), doing: &str, cancel: &Cancel) -> Result<Output> {
        let program = &self.program;
        let mut command = Command::new(program)
            .arg(verb)
            .stdin(stdin)
            .deadline(DEADLINE);
        command.env = self.environment.to_vec();
        run_any_status(&command, cancel, &mut |_| {})
            .map_err(|e| e.context(doing))
            .map_err(|e| match e.kind() {
                Kind::CommandMissing => e.hint(format!(
                    "install {program}, or remove it from {}",
                    self.config.display()
                )),
                _ => e,
            })
    }
}

fn require_success(output: &Output, doing: &str) -> Result<()> {
    match output.status {
        0 => Ok(()),
        _ => {
            let text = format!("{doing}: {}", complaint(output));
            Err(Error::new(Kind::CommandFailed, text).hint("unlock it, and try again"))
        }
    }
}

/// Checks the name of a helper. It becomes part of a program's name, which must not get a
/// directory.
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
        .hint("a helper's name may contain only letters, digits, '.', '_' and '-'")),
    }
}

/// Returns the error message of a helper, which prints it to stdout.
fn complaint(output: &Output) -> String {
    let stdout = output.stdout.trim_ascii();
    let words = match stdout.is_empty() || stdout.starts_with(b"{") {
        true => output.stderr.trim_ascii(),
        false => stdout,
    };
    let words = String::from_utf8_lossy(words);
    let short: String = words.chars().take(COMPLAINT_CHARS_MAX).collect();
    format!("status {}: {}", output.status, printable(&short))
}

/// Parses the output of a helper.
pub(super) fn parse(output: &Output) -> Result<Credential, String> {
    let stdout = output.stdout.trim_ascii();
    if output.status != 0 {
        if stdout == NOT_FOUND.as_bytes() {
            return Ok(Credential::Anonymous);
        }
        return Err(complaint(output));
    }
    // serde's messages may quote the secret.
    let found: Found = serde_json::from_slice(stdout)
        .map_err(|_| "its output is not a credential in JSON".to_owned())?;
    Ok(match (found.username.as_str(), found.secret) {
        (_, secret) if secret.reveal().is_empty() => Credential::Anonymous,
        (TOKEN_USER, token) => Credential::Identity { token },
        (user, password) => Credential::Basic {
            user: user.to_owned(),
            password,
        },
    })
}
