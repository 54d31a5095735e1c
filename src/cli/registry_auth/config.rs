//! Docker's `config.json`.

use crate::api::registry::{Credential, Secret};
use crate::error::{Error, Kind, Result};
use crate::host::command::read_bounded;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const FILE_BYTES_MAX: u64 = 4 << 20;

/// Standard Base64. Some tools leave out the padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The members of the file that credentials depend on.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Config {
    auths: BTreeMap<String, Entry>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    /// `USER:PASSWORD` in Base64.
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
}

impl Config {
    /// Reads the file. Returns None if it does not exist.
    pub(super) fn read(path: &Path) -> Result<Option<Self>> {
        let Some(bytes) = read_bytes(path)? else {
            return Ok(None);
        };
        Self::parse(&bytes)
            .map(Some)
            .map_err(|why| invalid(path, &why))
    }

    /// Parses the file. serde's own messages may quote a secret, so only the place is reported.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        // Docker accepts an empty file.
        if bytes.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        // serde would also accept an array, with the members in their order.
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err("it is not a JSON object".to_owned());
        }
        serde_json::from_slice(bytes).map_err(|e| {
            let what = match e.classify() {
                serde_json::error::Category::Data => "a member has the wrong type",
                _ => "it is not JSON",
            };
            format!("{what} (line {}, column {})", e.line(), e.column())
        })
    }

    /// Returns the name of the helper that stores the registry's credential.
    pub(super) fn helper(&self, keys: &[&str]) -> Option<&str> {
        keys.iter()
            .find_map(|key| self.cred_helpers.get(*key))
            .or(self.creds_store.as_ref())
            .map(String::as_str)
            .filter(|name| !name.is_empty())
    }

    /// True if the file itself lists the registry.
    pub(super) fn lists(&self, keys: &[&str]) -> bool {
        self.auths.keys().any(|name| is_key(keys, name))
    }

    /// Returns the credential that the file itself stores.
    pub(super) fn stored(&self, keys: &[&str], path: &Path) -> Result<Credential> {
        let exact = keys.iter().find_map(|key| self.auths.get(*key));
        let by_host = || {
            let mut entries = self.auths.iter();
            entries
                .find(|(name, _)| keys.contains(&host_of(name)))
                .map(|(_, entry)| entry)
        };
        match exact.or_else(by_host) {
            Some(entry) => entry
                .credential()
                .ok_or_else(|| invalid(path, &format!("the auth of {} is malformed", keys[0]))),
            None => Ok(Credential::Anonymous),
        }
    }
}

/// Returns the bytes of the file, or None if it does not exist.
fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |e| Error::io(format!("read {}", path.display()), e);
    // Opening a FIFO must not block.
    let opened = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(failed(e)),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(invalid(path, "it is not a regular file"));
    }
    let bytes = read_bounded(file, FILE_BYTES_MAX + 1).map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(invalid(
            path,
            &format!("it has more than {FILE_BYTES_MAX} bytes"),
        ));
    }
    Ok(Some(bytes))
}

/// Returns all members of the file. Call [`Config::read`] first, which checks the file.
pub(super) fn read_whole(path: &Path) -> Result<Map<String, Value>> {
    let bytes = read_bytes(path)?.unwrap_or_default();
    if bytes.trim_ascii().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_slice(&bytes).map_err(|_| invalid(path, "it is not JSON"))
}

/// Returns a credential in the form of the member `auth`.
pub(super) fn encode(user: &str, password: &Secret) -> Secret {
    Secret::new(BASE64.encode(format!("{user}:{}", password.reveal())))
}

/// True if `name`, a key of `auths`, stands for a registry with these names.
pub(super) fn is_key(keys: &[&str], name: &str) -> bool {
    keys.contains(&name) || keys.contains(&host_of(name))
}

/// Returns the host of a key, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or(key.strip_prefix("http://"))
        .unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

impl Entry {
    /// Returns the credential of the entry, or None if the entry is malformed.
    fn credential(&self) -> Option<Credential> {
        let given = |secret: &Option<Secret>| {
            let secret = secret.clone();
            secret.filter(|secret| !secret.reveal().is_empty())
        };
        if let Some(token) = given(&self.identitytoken) {
            return Some(Credential::Identity { token });
        }
        let (user, password) = match given(&self.auth) {
            Some(auth) => {
                let pair = BASE64.decode(auth.reveal().trim()).ok()?;
                let pair = String::from_utf8(pair).ok()?;
                let (user, password) = pair.split_once(':')?;
                // Docker once filled the field with zeros.
                let password = password.trim_end_matches('\0');
                (user.to_owned(), Secret::new(password))
            }
            None => match (&self.username, given(&self.password)) {
                (Some(user), Some(password)) => (user.clone(), password),
                _ => return Some(Credential::Anonymous),
            },
        };
        Some(match user.is_empty() {
            true => Credential::Anonymous,
            false => Credential::Basic { user, password },
        })
    }
}

fn invalid(path: &Path, why: &str) -> Error {
    Error::new(
        Kind::InvalidConfig,
        format!(
            "docker's configuration {} is not usable: {why}",
            path.display()
        ),
    )
    .hint("correct the file, or set DOCKER_CONFIG to another directory")
}
